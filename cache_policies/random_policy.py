"""Random: any resident leaves. The floor that a policy with a memory has to beat."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cache_policies.table_policy import TablePolicy


class Random(TablePolicy):
    """Evicts candidates with equal chances; the same seed and calls give the same victims."""

    name = "random"

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self._generator = np.random.default_rng(seed)

    def _use(self, layer: int, routed: Sequence[int]) -> None:
        """Nothing is remembered."""

    def _worth(self) -> NDArray[np.float64]:
        return self._generator.random(self._resident.shape)
