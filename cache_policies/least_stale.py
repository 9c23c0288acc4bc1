"""Least-Stale: what the running pass through the layers has not touched leaves, layer by layer."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cache_policies.policy import ExpertId
from cache_policies.table_policy import TablePolicy


class LeastStale(TablePolicy):
    """Evicts stale experts first, those that this forward pass has not used; then the others. Either way
    first in, first out by layer: the lowest layer, whose turn lies farthest ahead, and in it the first that
    came (SpecMD, arXiv 2602.03921, whose code is not public: the order is our reading of its abstract).

    A pass begins when a layer runs that is not behind the last one. Prefetched experts are stale until used.
    In layers with slots of their own nothing tells passes apart, and this is FIFO.
    """

    name = "least-stale"

    def __init__(self) -> None:
        super().__init__()
        self._pass = 1
        self._last_layer = 0
        self._touched = np.zeros((0, 0))  # the pass of the last use
        self._arrived = np.zeros((0, 0))

    def inserted(self, expert: ExpertId) -> None:
        super().inserted(expert)
        self._arrived[expert] = self._clock

    def _use(self, layer: int, routed: Sequence[int]) -> None:
        if layer < self._last_layer:
            self._pass += 1
        self._last_layer = layer
        self._touched[layer, routed] = self._pass

    def _worth(self) -> NDArray[np.float64]:
        # One number for (touched, layer, arrival): float64 keeps them apart up to 2**10 layers, 2**42 events.
        layer = np.arange(len(self._arrived))[:, None]
        touched: NDArray[np.bool_] = self._touched == self._pass
        worth: NDArray[np.float64] = (touched * 2.0**10 + layer) * 2.0**42 + self._arrived
        return worth
