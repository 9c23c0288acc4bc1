"""The contract of a cache policy: ids in, ids out.

A policy chooses which experts leave the expert cache. It knows nothing about bytes, tensors, files or the
model, and it does not choose what is read. The same object runs in the engine and in a replay of a recorded
trace.

Time is counted in events. One event is one layer's routed set of one token. Its life:

    policy.step(layer, routed, weights)     # observe the whole set, hits and misses alike
    policy.victims(candidates, lacking)     # no candidate is an expert that this event needs
    policy.inserted(expert)                 # once for each expert that became resident, in any order

A set arrives whole, so that no member can be evicted for another one. Serving experts one by one would
flatter some policies, and no engine works like that.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar

ExpertId = tuple[int, int]
"""(layer, expert), both from 0."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """The model and the cache that a policy works for, in numbers of experts.

    `capacity`: how many experts may be resident, in all layers together, or with `per_layer` in each layer
    by itself. Layers without experts count too: their ids simply never turn up.
    """

    layers: int
    experts: int
    top_k: int
    capacity: int
    per_layer: bool = False

    @property
    def layer_capacity(self) -> float:
        """The slots that a layer has, on average where they are shared."""
        return float(self.capacity) if self.per_layer else self.capacity / self.layers


class CachePolicy(ABC):
    """Chooses victims. Its state covers all experts, resident or not, so what it learnt survives eviction.

    The same calls give the same victims: ties are broken by (layer, expert), and it does not matter in which
    order the experts of one event are inserted, which is the order in which their reads finish.
    """

    name: ClassVar[str]

    @abstractmethod
    def step(
        self,
        layer: int,
        routed: Sequence[int],
        weights: Sequence[float] | None = None,
        scores: Sequence[float] | None = None,
        token: int = -1,
    ) -> None:
        """Observe one event.

        `routed`: the experts chosen, each once, in top-k order; `weights`: theirs, in the same order.
        `scores`: the router's probability of every expert of the layer; recorded traces may lack them.
        `token`: the id of the token that is routed, -1 where it is not known.
        """

    @property
    def summary(self) -> str:
        """What a run's statistics say of it."""
        return self.name

    def inserted(self, expert: ExpertId) -> None:  # noqa: B027 - not every policy needs to know
        """Learn that `expert` has become resident, by a demand read or a prefetch read."""

    @abstractmethod
    def victims(self, candidates: Collection[ExpertId], n: int) -> list[ExpertId]:
        """Choose `n` residents to drop, the first to go first; the caller drops them.

        `candidates`: the residents that may go, never changed here; `in` must be fast (a set, a dict, its
        keys). Raises ValueError when there are fewer than `n`.
        """
