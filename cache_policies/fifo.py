"""First in, first out: what has been resident for the longest time leaves, used or not."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cache_policies.policy import ExpertId
from cache_policies.table_policy import TablePolicy


class FIFO(TablePolicy):
    """Evicts the expert that became resident in the oldest event."""

    name = "fifo"

    def __init__(self) -> None:
        super().__init__()
        self._arrived = np.zeros((0, 0))

    def inserted(self, expert: ExpertId) -> None:
        super().inserted(expert)
        self._arrived[expert] = self._clock

    def _use(self, layer: int, routed: Sequence[int]) -> None:
        """A use does not lengthen the stay."""

    def _worth(self) -> NDArray[np.float64]:
        return self._arrived
