"""What the simple policies share: tables of all experts, out of which the resident of least worth leaves.

A policy is then its formula. One numpy pass over 48 x 128 experts takes 10 to 20 microseconds, however many
are resident, and stays exact where time alone changes the order (LFRU). None of these policies looks at
router weights or scores. L layers, E experts per layer; both grow as ids turn up.
"""

from abc import abstractmethod
from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from cache_policies.policy import CachePolicy, ExpertId

# Up to this many candidates are sorted at once. Among more, this many residents that may not go are passed
# over before sorting all the same.
FEW = 32


class TablePolicy(CachePolicy):
    """Evicts the candidate of least worth, the lowest (layer, expert) among equals.

    A subclass defines `_use` and `_worth` and keeps its state in float64 arrays [L, E]. Every array attribute
    is such a table: it grows with the others and reads 0 for an expert never seen.
    """

    def __init__(self) -> None:
        self._clock = 0  # events so far, of all layers
        self._resident = np.zeros((0, 0), dtype=np.bool_)

    @abstractmethod
    def _use(self, layer: int, routed: Sequence[int]) -> None:
        """Note an event; the clock counts it already."""

    @abstractmethod
    def _worth(self) -> NDArray[np.float64]:
        """How much each expert deserves to stay, [L, E], finite. Not changed by the caller."""

    def step(
        self,
        layer: int,
        routed: Sequence[int],
        weights: Sequence[float] | None = None,
        scores: Sequence[float] | None = None,
        token: int = -1,
    ) -> None:
        self._cover(layer, max(routed, default=0))
        self._clock += 1
        self._use(layer, routed)

    def inserted(self, expert: ExpertId) -> None:
        self._cover(*expert)
        self._resident[expert] = True

    def victims(self, candidates: Collection[ExpertId], n: int) -> list[ExpertId]:
        if n > len(candidates):
            raise ValueError(f"{n} victims asked for, but only {len(candidates)} experts may leave")
        if n == 0:
            return []
        worth = self._worth()
        chosen = self._least_worth(worth, candidates, n) if len(candidates) > FEW else []
        if len(chosen) < n:
            rest = sorted(set(candidates).difference(chosen))
            rest.sort(key=worth.__getitem__)  # a stable sort: equals stay in order of (layer, expert)
            chosen += rest[: n - len(chosen)]
        for expert in chosen:
            self._resident[expert] = False
        return chosen

    def _least_worth(
        self, worth: NDArray[np.float64], candidates: Collection[ExpertId], n: int
    ) -> list[ExpertId]:
        """The first of the victims, in order; fewer than `n` if many residents of less worth may not go."""
        chosen: list[ExpertId] = []
        remaining = np.where(self._resident, worth, np.inf)
        flat = remaining.ravel()
        for _ in range(n + FEW):
            lowest = int(flat.argmin())  # the first of equals, so the lowest (layer, expert)
            if len(chosen) == n or flat[lowest] == np.inf:
                break
            flat[lowest] = np.inf
            expert = divmod(lowest, remaining.shape[1])
            if expert in candidates:
                chosen.append(expert)
        return chosen

    def _cover(self, layer: int, expert: int) -> None:
        """Grow every table so that it has a place for this expert."""
        layers, experts = self._resident.shape
        if layer < layers and expert < experts:
            return
        more = ((0, max(0, layer + 1 - layers)), (0, max(0, expert + 1 - experts)))
        for name, table in vars(self).items():
            if isinstance(table, np.ndarray):
                setattr(self, name, np.pad(table, more))
