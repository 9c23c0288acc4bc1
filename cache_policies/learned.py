"""The learned policy: boosted trees foretell when each expert is needed again; what is needed last leaves.

The features and their native form are in cache_policies/native (docs/policies.md): recency, decayed use
counts, gaps, router weights and the router's scores of unselected experts, transitions within the layer, and
what followed the past tokens whose routing was most like the present one's. All are scaled by top-k and the
number of experts, so that one model serves architectures it has never seen.

A shadow cache under LFU with ageing, the best of the simple policies, runs beside it. While the learned rule
would miss more, that one chooses the victims.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from cache_policies.native import _learned
from cache_policies.native._learned import Trees
from cache_policies.policy import CachePolicy, ExpertId, Geometry

FEATURE_NAMES = _learned.FEATURE_NAMES
# Candidates up to which they are all scored one by one: the residents of one layer.
FEW = 32


@dataclass(frozen=True, slots=True)
class LearnedStats:
    """How the learned rule fares against its shadow, in experts that each would have had to read."""

    learned_misses: int
    simple_misses: int
    stepped_back: bool
    step_backs: int
    tokens_stepped_back: int


class Learned(CachePolicy):
    """Evicts the expert whose predicted next use lies farthest ahead.

    One object serves a cache with shared slots and one with slots for each layer. With shared slots distances
    are counted in events of all layers: an expert of a layer that is about to run is needed sooner.
    """

    name = "learned"

    def __init__(self, geometry: Geometry, trees: Trees) -> None:
        g = geometry
        self.core = _learned.Policy(g.layers, g.experts, g.top_k, g.capacity, g.per_layer, trees)
        self._per_layer = g.per_layer
        self._experts, self._top_k = g.experts, g.top_k

    def step(
        self,
        layer: int,
        routed: Sequence[int],
        weights: Sequence[float] | None = None,
        scores: Sequence[float] | None = None,
        token: int = -1,
    ) -> None:
        address = 0
        if scores is not None:
            row = np.ascontiguousarray(scores, dtype=np.float32)
            if row.shape != (self._experts,):
                raise ValueError(f"scores of shape {row.shape}, but a layer has {self._experts} experts")
            address = row.ctypes.data
        self.core.step(layer, routed, weights, address, token)

    def inserted(self, expert: ExpertId) -> None:
        self.core.inserted(*expert)

    def victims(self, candidates: Collection[ExpertId], n: int) -> list[ExpertId]:
        if n > len(candidates):
            raise ValueError(f"{n} victims asked for, but only {len(candidates)} experts may leave")
        if n == 0:
            return []
        if self._per_layer or len(candidates) <= FEW:
            chosen = self.core.rank(candidates)[:n]
        else:
            # Among the worst residents are at most those of the event that may not go.
            chosen = _among(candidates, self.core.worst(n + 2 * self._top_k), n)
            if len(chosen) < n:
                chosen = self.core.rank(candidates)[:n]
        for expert in chosen:
            self.core.left(*expert)
        return chosen

    @property
    def stats(self) -> LearnedStats:
        c = self.core
        return LearnedStats(
            c.learned_misses, c.simple_misses, c.stepped_back, c.step_backs, c.tokens_stepped_back
        )

    @property
    def summary(self) -> str:
        s = self.stats
        if not s.simple_misses:
            return self.name
        more = s.learned_misses / s.simple_misses - 1
        text = f"learned, {more:+.1%} misses against lfu-aged in its shadow"
        if s.step_backs:
            text += f"; stepped back to lfu-aged for {s.tokens_stepped_back} tokens"
        return text + (", and is still" if s.stepped_back else "")

    @staticmethod
    def memory_bytes(geometry: Geometry) -> int:
        """What the policy will hold for this model, trees not included."""
        return _learned.history_bytes(geometry.layers, geometry.experts, geometry.top_k)


def _among(candidates: Collection[ExpertId], ranked: Iterable[ExpertId], n: int) -> list[ExpertId]:
    """The first `n` of `ranked` that are candidates, as far as there are."""
    chosen: list[ExpertId] = []
    for expert in ranked:
        if expert in candidates:
            chosen.append(expert)
            if len(chosen) == n:
                break
    return chosen
