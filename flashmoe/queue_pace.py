"""How fast requests get through: so that one that is refused knows when to come back.

Knows times and numbers of requests only. Guarded by whoever owns it.
"""

import time
from collections import deque
from collections.abc import Callable

RECENT = 32  # requests whose time is remembered
UNKNOWN_S = 2.0  # what is said before anything is known
SHORTEST_S, LONGEST_S = 1.0, 60.0  # OpenAI's client waits for no more than 60 s


class QueuePace:
    """Told when requests begin to run and end."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began: dict[int, float] = {}
        self._took: deque[float] = deque(maxlen=RECENT)

    def begins(self, number: int) -> None:
        """A request runs; whoever gave its place up for others keeps its first time."""
        self._began.setdefault(number, self._clock())

    def ends(self, number: int) -> None:
        """However it ended; nothing if it never ran."""
        if (began_s := self._began.pop(number, None)) is not None:
            self._took.append(self._clock() - began_s)

    def wait_s(self, ahead: int, running: int) -> float:
        """Seconds until a request with so many ahead of it would begin, if `running` run at a time: each
        takes as long as recent ones took, or as those that run have taken already, if that is more."""
        now = self._clock()
        ages = [now - began_s for began_s in self._began.values()]
        known = [sum(times) / len(times) for times in (ages, self._took) if times]
        estimate_s = max(known) * (ahead + 1) / max(1, running) if known else UNKNOWN_S
        return min(LONGEST_S, max(SHORTEST_S, estimate_s))
