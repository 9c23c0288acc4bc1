"""LeCaR: two voters, recency and frequency; who regrets an eviction loses weight."""

import math
import random
from collections.abc import Collection, Iterator

from cache_policies.policy import ExpertId
from cache_policies.queue_policy import QueuePolicy

LEARNING_RATE = 0.45  # as published
DISCOUNT = 0.005  # a regret fades to this over as many requests as the cache has slots, as published


class LeCaR(QueuePolicy):
    """LeCaR (G. Vietri et al., HotStorage 2018, algorithm 1): regret minimisation over LRU and LFU.

    Each eviction follows LRU with probability w_LRU, else LFU; the victim joins the history of the one
    followed, of `capacity` entries. A miss found in LRU's history after t requests multiplies w_LFU by
    exp(0.45 * d^t), d = 0.005^(1/capacity); one in LFU's, w_LRU; then both are scaled to sum to 1. Uses are
    counted as long as an expert is resident or in a history. LFU's ties go to the least recently used.

    Adapted to events: all misses of an event move the weights before anyone leaves, and t counts experts
    asked for. `seed` makes the choices repeatable.
    """

    name = "lecar"

    def __init__(self, capacity: int, seed: int = 0) -> None:
        super().__init__()
        self._capacity = capacity
        self._random = random.Random(seed)
        self._requests = 0
        self._weight_lru = 0.5
        self._uses: dict[ExpertId, int] = {}  # of residents, the least recently used first
        self._by_uses: dict[int, dict[ExpertId, None]] = {}  # uses -> residents, ditto
        self._remembered_uses: dict[ExpertId, int] = {}
        # expert -> the time it left at; of what LRU, and what LFU, sent away
        self._lru_history: dict[ExpertId, int] = {}
        self._lfu_history: dict[ExpertId, int] = {}

    def _has(self, key: ExpertId) -> bool:
        return key in self._uses

    def _hit(self, key: ExpertId) -> None:
        self._requests += 1
        uses = self._leave(key)
        self._enter(key, uses + 1)

    def _miss(self, key: ExpertId) -> None:
        self._requests += 1
        weight_lru, weight_lfu = self._weight_lru, 1 - self._weight_lru
        if key in self._lru_history:
            weight_lfu *= self._regret(self._lru_history.pop(key))
        elif key in self._lfu_history:
            weight_lru *= self._regret(self._lfu_history.pop(key))
        else:
            return
        self._weight_lru = weight_lru / (weight_lru + weight_lfu)

    def _regret(self, left: int) -> float:
        discounted = math.pow(DISCOUNT, (self._requests - left) / self._capacity)
        return math.exp(LEARNING_RATE * discounted)

    def _admit(self, key: ExpertId) -> None:
        self._lru_history.pop(key, None)  # of what was prefetched
        self._lfu_history.pop(key, None)
        self._enter(key, self._remembered_uses.pop(key, 0) + 1)

    def _evict(self, candidates: Collection[ExpertId]) -> ExpertId | None:
        follow_lru = self._random.random() < self._weight_lru
        order = iter(self._uses) if follow_lru else self._by_frequency()
        victim = next((key for key in order if key in candidates), None)
        if victim is not None:
            self._remembered_uses[victim] = self._leave(victim)
            history = self._lru_history if follow_lru else self._lfu_history
            history[victim] = self._requests
            if len(history) > self._capacity:
                oldest = next(iter(history))
                del history[oldest], self._remembered_uses[oldest]
        return victim

    def _by_frequency(self) -> Iterator[ExpertId]:
        """Residents, the least frequently used first."""
        yield from self._by_uses[min(self._by_uses)] if self._by_uses else ()
        for uses in sorted(self._by_uses)[1:]:
            yield from self._by_uses[uses]

    def _enter(self, key: ExpertId, uses: int) -> None:
        self._uses[key] = uses
        self._by_uses.setdefault(uses, {})[key] = None

    def _leave(self, key: ExpertId) -> int:
        uses = self._uses.pop(key)
        equals = self._by_uses[uses]
        del equals[key]
        if not equals:
            del self._by_uses[uses]
        return uses
