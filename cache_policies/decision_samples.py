"""Training data of the learned policy: what it sees of each candidate when it must choose, and the truth.

Samples are taken at decision points, from the states that a policy itself brings about (DAgger, arXiv
1011.0686): its candidates are what is left after its own earlier choices, and a model trained on another
policy's candidates would be asked about cases it has never seen.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cache_policies.learned import FEATURE_NAMES, Learned
from cache_policies.policy import CachePolicy, ExpertId, Geometry
from cache_policies.replay import replay
from cache_policies.routing_trace import RoutingTrace

# Own-layer events beyond which one distance is as good as another: log2 of it is what the trees predict.
FARTHEST = 256


@dataclass(frozen=True, slots=True)
class DecisionSamples:
    """`features` [N, F] float32; `distance` [N] float32, log2 of the own-layer events until the next use,
    from 0 to log2(FARTHEST); `decision` [N] int64, rows of one decision share a number."""

    features: NDArray[np.float32]
    distance: NDArray[np.float32]
    decision: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.features)


def join(parts: Sequence[DecisionSamples]) -> DecisionSamples:
    """All of them, decisions kept apart."""
    offsets = np.cumsum([0, *(int(p.decision.max(initial=-1)) + 1 for p in parts)])
    return DecisionSamples(
        np.concatenate([p.features for p in parts]),
        np.concatenate([p.distance for p in parts]),
        np.concatenate([p.decision + offset for p, offset in zip(parts, offsets, strict=False)]),
    )


def sample_decisions(
    trace: RoutingTrace,
    policy: CachePolicy,
    observer: Learned,
    geometry: Geometry,
    share: float,
    seed: int,
    with_scores: bool = True,
) -> DecisionSamples:
    """Replay `trace` under `policy` and keep about `share` of its decisions.

    `observer` sees all events and makes the features; it may be `policy` itself. `with_scores` False hides
    the router's scores of unselected experts, as in traces that lack them.
    """
    sampler = _Sampler(policy, observer, share, seed, with_scores and trace.scores is not None)
    replay(trace, sampler, geometry)
    if not sampler.rows:
        return DecisionSamples(
            np.zeros((0, len(FEATURE_NAMES)), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64)
        )
    layer, expert, event = np.array(sampler.keys, dtype=np.int64).T
    return DecisionSamples(
        np.array(sampler.rows, dtype=np.float32),
        np.log2(next_use_distances(trace, layer, expert, event).clip(1, FARTHEST)).astype(np.float32),
        np.array(sampler.decisions, dtype=np.int64),
    )


class _Sampler(CachePolicy):
    """Lets another policy choose and notes what there was to choose from."""

    name = "sampler"

    def __init__(
        self, policy: CachePolicy, observer: Learned, share: float, seed: int, with_scores: bool
    ) -> None:
        self._policy, self._observer = policy, observer
        self._share, self._random = share, np.random.default_rng(seed)
        self._with_scores = with_scores
        self._events: dict[int, int] = {}
        self.rows: list[list[float]] = []
        self.keys: list[tuple[int, int, int]] = []  # layer, expert, events of that layer so far
        self.decisions: list[int] = []

    def step(
        self,
        layer: int,
        routed: Sequence[int],
        weights: Sequence[float] | None = None,
        scores: Sequence[float] | None = None,
        token: int = -1,
    ) -> None:
        shown = scores if self._with_scores else None
        self._events[layer] = self._events.get(layer, 0) + 1
        self._policy.step(layer, routed, weights, shown, token)
        if self._observer is not self._policy:
            self._observer.step(layer, routed, weights, shown, token)

    def inserted(self, expert: ExpertId) -> None:
        self._policy.inserted(expert)

    def victims(self, candidates: Collection[ExpertId], n: int) -> list[ExpertId]:
        if n and self._random.random() < self._share:
            number = self.decisions[-1] + 1 if self.decisions else 0
            for layer, expert in sorted(candidates):
                self.rows.append(self._observer.core.features(layer, expert))
                self.keys.append((layer, expert, self._events.get(layer, 0)))
                self.decisions.append(number)
        return self._policy.victims(candidates, n)


def next_use_distances(
    trace: RoutingTrace, layer: NDArray[np.int64], expert: NDArray[np.int64], event: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Own-layer events from the `event`-th one (from 1) to the next use behind it, [N] from 1; a large number
    for never. A token is one event of each layer, also inside a chunk."""
    tokens, span = len(trace), len(trace) + 1
    uses = np.arange(trace.layers)[None, :, None] * trace.num_experts + trace.experts.astype(np.int64)
    rows = np.broadcast_to(np.arange(1, tokens + 1)[:, None, None], uses.shape)
    ordered = np.sort((uses * span + rows).ravel())
    wanted = layer * trace.num_experts + expert
    found = np.searchsorted(ordered, wanted * span + event, side="right")
    inside = found < len(ordered)
    following = ordered[np.minimum(found, len(ordered) - 1)]
    known = inside & (following // span == wanted)
    return np.where(known, following % span - event, np.iinfo(np.int32).max)
