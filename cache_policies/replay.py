"""Replay a recorded trace against a policy: the engine's own rules, without bytes.

The same policy objects and the same `Residency` run in the engine; a recorded run, replayed with its
geometry, gives the engine's hits exactly. Prefetching is not replayed.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cache_policies.policy import CachePolicy, Geometry
from cache_policies.residency import Residency
from cache_policies.routing_trace import RoutingTrace


@dataclass(frozen=True, slots=True)
class ReplayCounts:
    """`events`: layers times passes through the model. A chunk asks once for each expert that it needs."""

    events: int
    hits: int
    misses: int

    @property
    def hit_rate(self) -> float:
        """0 for a trace of no events."""
        return self.hits / max(1, self.hits + self.misses)


def replay(trace: RoutingTrace, policy: CachePolicy, geometry: Geometry, spare: int = 0) -> ReplayCounts:
    """Serve every event of `trace` from an empty cache. `policy` is changed, and may go on to the next trace.

    Raises ValueError when the geometry is not the trace's.
    """
    shape = trace.layers, trace.num_experts, trace.top_k
    expected = geometry.layers, geometry.experts, geometry.top_k
    if shape != expected:
        raise ValueError(f"{trace.name} has (layers, experts, top-k) {shape}, the geometry {expected}")
    cache = Residency(policy, geometry, spare)
    events = hits = misses = 0
    for begin, end, is_chunk in trace.spans():
        serve = _serve_chunk if is_chunk else _serve_tokens
        span_hits, span_misses = serve(trace, cache, begin, end)
        events += trace.layers * (1 if is_chunk else end - begin)
        hits += span_hits
        misses += span_misses
    return ReplayCounts(events, hits, misses)


def _serve_tokens(trace: RoutingTrace, cache: Residency, begin: int, end: int) -> tuple[int, int]:
    """Rows that ran one by one -> (hits, misses). This loop is what a replay's speed hangs on."""
    rows = trace.experts[begin:end].tolist()
    weights = None if trace.weights is None else trace.weights[begin:end].tolist()
    tokens = [-1] * len(rows) if trace.tokens is None else trace.tokens[begin:end].tolist()
    event_weights, event_scores, misses = None, None, 0
    for i, row in enumerate(rows):
        for layer, routed in enumerate(row):
            if weights is not None:
                event_weights = weights[i][layer]
            if trace.scores is not None:
                event_scores = trace.scores[begin + i, layer]
            missing, _ = cache.begin(layer, routed, event_weights, event_scores, tokens[i])
            for key in missing:
                cache.arrived(key)
            cache.settle()
            misses += len(missing)
    return trace.experts[begin:end].size - misses, misses


def _serve_chunk(trace: RoutingTrace, cache: Residency, begin: int, end: int) -> tuple[int, int]:
    """Rows that ran through the model together -> (hits, misses) of distinct experts."""
    hits = misses = 0
    for layer in range(trace.layers):
        routed = trace.experts[begin:end, layer]
        for i, row in enumerate(routed.tolist(), begin):
            cache.policy.step(
                layer,
                row,
                None if trace.weights is None else trace.weights[i, layer].tolist(),
                None if trace.scores is None else trace.scores[i, layer],
                -1 if trace.tokens is None else int(trace.tokens[i]),
            )
        plan = cache.begin_chunk(layer, serving_order(routed))
        cache.chunk_served(plan)
        hits += len(plan.hits)
        misses += len(plan.passing) + len(plan.staying)
    return hits, misses


def serving_order(routed: NDArray[np.integer]) -> list[int]:
    """The distinct experts of a chunk, routed [T, K]: those that its last tokens use come last."""
    last_use: dict[int, None] = {}
    for expert in routed.ravel().tolist():
        last_use.pop(expert, None)
        last_use[expert] = None
    return list(last_use)
