"""Least frequently and recently used: the largest age / (1 + count) leaves."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cache_policies.policy import ExpertId
from cache_policies.table_policy import TablePolicy


class LFRU(TablePolicy):
    """Evicts the expert with the largest age / (1 + count); both survive eviction.

    Count: the events that used it. Age: the events of *its own layer* since its last use, that one included.
    On a clock common to all layers, experts of the layer about to run would look oldest just when they are
    needed. The age of an expert never used counts from its insertion.
    """

    name = "lfru"

    def __init__(self) -> None:
        super().__init__()
        self._age = np.zeros((0, 0))
        self._uses = np.zeros((0, 0))

    def inserted(self, expert: ExpertId) -> None:
        super().inserted(expert)
        if self._uses[expert] == 0:
            self._age[expert] = 1

    def _use(self, layer: int, routed: Sequence[int]) -> None:
        self._age[layer] += 1
        self._age[layer, routed] = 1
        self._uses[layer, routed] += 1

    def _worth(self) -> NDArray[np.float64]:
        return -self._age / (1 + self._uses)
