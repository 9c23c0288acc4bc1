"""Least recently used: what was not needed for the longest time leaves."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cache_policies.policy import ExpertId
from cache_policies.table_policy import TablePolicy


class LRU(TablePolicy):
    """Evicts the expert whose last use is the oldest event; one never used counts as used when it came."""

    name = "lru"

    def __init__(self) -> None:
        super().__init__()
        self._last_used = np.zeros((0, 0))

    def inserted(self, expert: ExpertId) -> None:
        super().inserted(expert)
        if self._last_used[expert] == 0:
            self._last_used[expert] = self._clock

    def _use(self, layer: int, routed: Sequence[int]) -> None:
        self._last_used[layer, routed] = self._clock

    def _worth(self) -> NDArray[np.float64]:
        return self._last_used
