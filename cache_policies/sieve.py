"""SIEVE: a queue in order of arrival and a hand that spares, once, what was used since it last passed."""

from collections.abc import Collection

from cache_policies.policy import ExpertId
from cache_policies.queue_policy import QueuePolicy


class SIEVE(QueuePolicy):
    """SIEVE (Y. Zhang et al., NSDI 2024, algorithm 1): lazy promotion, quick demotion.

    A use marks a resident. The hand goes from the oldest towards the newest and round again: it unmarks what
    is marked and evicts the first that is not. What it spared keeps its place; newcomers join at the new end.

    Adapted to events: the hand passes residents that may not leave without unmarking them.
    """

    name = "sieve"

    def __init__(self) -> None:
        super().__init__()
        self._queue: list[ExpertId] = []  # the oldest first; a cut costs less than links would
        self._marked: dict[ExpertId, bool] = {}  # of every resident
        self._hand = 0

    def _has(self, key: ExpertId) -> bool:
        return key in self._marked

    def _hit(self, key: ExpertId) -> None:
        self._marked[key] = True

    def _admit(self, key: ExpertId) -> None:
        self._queue.append(key)
        self._marked[key] = False

    def _evict(self, candidates: Collection[ExpertId]) -> ExpertId | None:
        for _ in range(2 * len(self._queue)):  # after one round nothing that may leave is marked
            key = self._queue[self._hand]
            leaves = key in candidates and not self._marked[key]
            if leaves:
                del self._queue[self._hand], self._marked[key]
            else:
                if key in candidates:
                    self._marked[key] = False
                self._hand += 1
            if self._hand == len(self._queue):  # now, not when it is moved next: a newcomer would be there
                self._hand = 0
            if leaves:
                return key
        return None
