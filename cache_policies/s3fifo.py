"""S3-FIFO: newcomers prove themselves in a small queue before they enter the main one."""

from collections.abc import Collection

from cache_policies.policy import ExpertId
from cache_policies.queue_policy import QueuePolicy

SMALL_SHARE = 0.1  # of the capacity, as published
MOST_USES = 3  # two bits, as published


class S3FIFO(QueuePolicy):
    """S3-FIFO (J. Yang et al., SOSP 2023, algorithm 1): a small queue, a main queue, and ghosts.

    A miss enters the small queue, or the main one if a ghost remembers it. While the small queue has a tenth
    of the capacity its oldest leaves: to the main queue, uses forgotten, when it was used more than once
    since it came; else it is evicted and becomes a ghost. Otherwise the main queue's oldest leaves, unless it
    was used: then it goes to the end with one use less. As many ghosts as the main queue has places.

    Adapted to events: residents that may not leave are passed over where they stand, and exactly as many
    leave as are asked for.
    """

    name = "s3fifo"

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self._small_size = SMALL_SHARE * capacity
        self._main_size = capacity - max(1, int(self._small_size))
        self._small: dict[ExpertId, int] = {}  # expert -> uses since it came, the oldest first
        self._main: dict[ExpertId, int] = {}
        self._ghosts: dict[ExpertId, None] = {}

    def _has(self, key: ExpertId) -> bool:
        return key in self._small or key in self._main

    def _hit(self, key: ExpertId) -> None:
        queue = self._small if key in self._small else self._main
        queue[key] = min(queue[key] + 1, MOST_USES)

    def _admit(self, key: ExpertId) -> None:
        if key in self._ghosts:
            del self._ghosts[key]
            self._main[key] = 0
        else:
            self._small[key] = 0

    def _evict(self, candidates: Collection[ExpertId]) -> ExpertId | None:
        if len(self._small) >= self._small_size:
            return self._evict_small(candidates) or self._evict_main(candidates)
        return self._evict_main(candidates) or self._evict_small(candidates)

    def _evict_small(self, candidates: Collection[ExpertId]) -> ExpertId | None:
        while True:
            key = next((key for key in self._small if key in candidates), None)
            if key is None:
                return None
            if self._small.pop(key) <= 1:
                self._ghosts[key] = None
                if len(self._ghosts) > self._main_size:
                    del self._ghosts[next(iter(self._ghosts))]
                return key
            victim = self._evict_main(candidates) if len(self._main) >= self._main_size else None
            self._main[key] = 0
            if victim is not None:
                return victim

    def _evict_main(self, candidates: Collection[ExpertId]) -> ExpertId | None:
        while True:
            spared: list[ExpertId] = []
            victim = None
            for key, uses in self._main.items():
                if key in candidates:
                    if uses == 0:
                        victim = key
                        break
                    spared.append(key)
            for key in spared:
                self._main[key] = self._main.pop(key) - 1
            if victim is not None:
                del self._main[victim]
            if victim is not None or not spared:
                return victim
