"""Least recently used: what was not needed for the longest time leaves."""

from collections.abc import Collection, Sequence

from cache_policies.policy import CachePolicy, ExpertId


class LRU(CachePolicy):
    """Evicts the expert whose last use is the oldest event; one never used counts as used when it came.

    A dict in the order of use, so that neither a use nor an eviction looks at the other residents. An expert
    joins it when an event asks for it, not when its read finishes; equals stand in order of (layer, expert).
    """

    name = "lru"

    def __init__(self) -> None:
        self._order: dict[ExpertId, None] = {}  # the oldest use first
        self._unasked: list[ExpertId] = []  # came since the last event though none has asked for them

    def step(
        self,
        layer: int,
        routed: Sequence[int],
        weights: Sequence[float] | None = None,
        scores: Sequence[float] | None = None,
        token: int = -1,
    ) -> None:
        if self._unasked:
            self._admit_unasked()
        order = self._order
        for expert in sorted(routed):
            key = (layer, expert)
            if key in order:
                del order[key]
            order[key] = None

    def inserted(self, expert: ExpertId) -> None:
        if expert not in self._order:
            self._unasked.append(expert)

    def victims(self, candidates: Collection[ExpertId], n: int) -> list[ExpertId]:
        if n > len(candidates):
            raise ValueError(f"{n} victims asked for, but only {len(candidates)} experts may leave")
        if self._unasked:
            self._admit_unasked()
        chosen: list[ExpertId] = []
        if n == 0:
            return chosen
        for key in self._order:
            if key in candidates:
                chosen.append(key)
                if len(chosen) == n:
                    break
        else:  # not enough of those we know: experts that came unannounced
            chosen += sorted(set(candidates).difference(chosen))[: n - len(chosen)]
        for key in chosen:
            self._order.pop(key, None)
        return chosen

    def _admit_unasked(self) -> None:
        self._order.update(dict.fromkeys(sorted(self._unasked)))
        self._unasked.clear()
