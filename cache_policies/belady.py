"""Belady: what is needed again last leaves. Knows the future, so it runs over recorded traces only."""

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from cache_policies.policy import CachePolicy, ExpertId
from cache_policies.routing_trace import RoutingTrace

NEVER = 2**62


class Belady(CachePolicy):
    """Evicts the expert whose next use lies farthest ahead: the fewest misses that any policy can have when
    every expert that an event lacks must be admitted (L. A. Belady, IBM Systems Journal 5(2), 1966).

    It must see exactly the events of `trace`, in order. Prefill chunks keep to the same rule, but there it
    is only near the optimum: who stays is chosen at a chunk's end.
    """

    name = "belady"

    def __init__(self, trace: RoutingTrace) -> None:
        self._next_uses, first_uses = next_uses(trace)
        self._next: list[list[int]] = first_uses.tolist()
        self._routed_next: list[list[int]] = []
        self._seen = 0

    def step(
        self,
        layer: int,
        routed: Sequence[int],
        weights: Sequence[float] | None = None,
        scores: Sequence[float] | None = None,
        token: int = -1,
    ) -> None:
        if not self._routed_next:
            block = self._next_uses[self._seen : self._seen + 4096]
            self._routed_next = block.tolist()[::-1]
            if not self._routed_next:
                raise ValueError(f"belady knows a trace of {self._seen} events; this is one more")
        self._seen += 1
        ahead = self._next[layer]
        for expert, use in zip(routed, self._routed_next.pop(), strict=True):
            ahead[expert] = use

    def victims(self, candidates: Collection[ExpertId], n: int) -> list[ExpertId]:
        if n > len(candidates):
            raise ValueError(f"{n} victims asked for, but only {len(candidates)} experts may leave")
        ahead = self._next
        ranked = sorted((-ahead[layer][expert], layer, expert) for layer, expert in candidates)
        return [(layer, expert) for _, layer, expert in ranked[:n]]


def next_uses(trace: RoutingTrace) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """([events, K] the step number of the next use of each routed expert; [L, E] of the first use), NEVER for
    none. Events stand in the order of `trace.step_numbers`."""
    layers, k, experts = trace.layers, trace.top_k, trace.num_experts
    steps = np.repeat(trace.step_numbers()[:, :, None], k, axis=2).ravel()
    expert = (np.arange(layers)[None, :, None] * experts + trace.experts.astype(np.int64)).ravel()
    order = np.argsort(expert, kind="stable")  # each expert's uses, one behind the other, in order of rows
    same = expert[order][1:] == expert[order][:-1]
    following = np.full(len(order), NEVER, dtype=np.int64)
    following[order[:-1][same]] = steps[order[1:][same]]
    first = np.full(layers * experts, NEVER, dtype=np.int64)
    begins = np.flatnonzero(np.concatenate(([True], ~same)))[: len(order)]
    first[expert[order[begins]]] = steps[order[begins]]
    by_event = np.empty((len(trace) * layers, k), dtype=np.int64)
    by_event[trace.step_numbers().ravel()] = following.reshape(-1, k)
    return by_event, first.reshape(layers, experts)
