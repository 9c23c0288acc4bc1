"""ARC: a list of what was used once and one of what was used again; ghosts say which deserves more room."""

from collections.abc import Collection

from cache_policies.policy import ExpertId
from cache_policies.queue_policy import QueuePolicy

Queue = dict[ExpertId, None]  # the least recently used first


class ARC(QueuePolicy):
    """Adaptive Replacement Cache (N. Megiddo, D. Modha, FAST 2003, figure 4), with c = `capacity`.

    T1 holds residents used once, T2 those used again; B1 and B2 remember what left them. p is the room that
    T1 aims at. A miss that B1 remembers: p += max(1, |B2| / |B1|); B2: p -= max(1, |B1| / |B2|). T1's oldest
    leaves when |T1| > p, or |T1| = p and the miss was in B2; otherwise T2's. |T1| + |B1| <= c, all <= 2c.

    Adapted to events: all misses of an event move p before anyone leaves, and "the miss was in B2" holds when
    any of them was. An event's own experts never leave for one another. Prefetched experts enter T1.
    """

    name = "arc"

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self._capacity = capacity
        self._once: Queue = {}  # T1
        self._again: Queue = {}  # T2
        self._once_ghosts: Queue = {}  # B1
        self._again_ghosts: Queue = {}  # B2
        self._room_for_once = 0.0  # p
        self._returning: set[ExpertId] = set()  # misses of this event that a ghost list remembered
        self._from_again = False  # one of them in B2

    def _has(self, key: ExpertId) -> bool:
        return key in self._once or key in self._again

    def _hit(self, key: ExpertId) -> None:
        (self._once if key in self._once else self._again).pop(key)
        self._again[key] = None

    def _miss(self, key: ExpertId) -> None:
        b1, b2 = self._once_ghosts, self._again_ghosts
        if key in b1:
            self._room_for_once = min(self._capacity, self._room_for_once + max(1, len(b2) / len(b1)))
            del b1[key]
        elif key in b2:
            self._room_for_once = max(0, self._room_for_once - max(1, len(b1) / len(b2)))
            del b2[key]
            self._from_again = True
        else:
            return
        self._returning.add(key)

    def _admit(self, key: ExpertId) -> None:
        if key in self._returning:
            self._returning.discard(key)
            self._again[key] = None
        else:
            self._once[key] = None
        self._once_ghosts.pop(key, None)  # of what was prefetched
        self._again_ghosts.pop(key, None)
        self._from_again = False
        self._forget()

    def _evict(self, candidates: Collection[ExpertId]) -> ExpertId | None:
        size, room = len(self._once), self._room_for_once
        from_once = size > 0 and (size > room or (self._from_again and size == room))
        ways = [(self._once, self._once_ghosts), (self._again, self._again_ghosts)]
        for queue, ghosts in ways if from_once else reversed(ways):
            victim = next((key for key in queue if key in candidates), None)
            if victim is not None:
                del queue[victim]
                ghosts[victim] = None
                return victim
        return None

    def _forget(self) -> None:
        """Cut the ghosts to the size of the directory."""
        while self._once_ghosts and len(self._once) + len(self._once_ghosts) > self._capacity:
            del self._once_ghosts[next(iter(self._once_ghosts))]
        residents = len(self._once) + len(self._again)
        while self._again_ghosts and (
            residents + len(self._once_ghosts) + len(self._again_ghosts) > 2 * self._capacity
        ):
            del self._again_ghosts[next(iter(self._again_ghosts))]
