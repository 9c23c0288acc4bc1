"""Least frequently used: what was needed least often leaves."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cache_policies.table_policy import TablePolicy


class LFU(TablePolicy):
    """Evicts the expert used in the fewest events since the start, the least recently used of equals.

    Counts survive eviction and never decay. An expert that was prefetched but never used is the first to go.
    """

    name = "lfu"

    def __init__(self) -> None:
        super().__init__()
        self._uses = np.zeros((0, 0))
        self._last_used = np.zeros((0, 0))

    def _use(self, layer: int, routed: Sequence[int]) -> None:
        self._uses[layer, routed] += 1
        self._last_used[layer, routed] = self._clock

    def _worth(self) -> NDArray[np.float64]:
        # One number for (uses, last use): float64 keeps both apart up to 2**21 uses and 2**32 events.
        return self._uses * 2.0**32 + self._last_used
