"""The common part of the classic queue policies: which experts are in, which hit, which are on their way.

ARC, LeCaR, S3-FIFO and SIEVE were written for caches that serve one request after the other. Here an event's
experts are requested in the order of their ids, and all of them before any victim is chosen:

    step      every expert is a hit or a miss; what misses waits in line, outside the queues
    victims   make room in queues that do not hold the newcomers yet, as in the papers
    then      the newcomers are admitted, before the next event or when nobody else is left to go

With events of one expert each this is the published algorithm, request by request. A queue policy takes
itself for one cache: for layers with slots of their own, use one object a layer (`per_layer.PerLayer`).
"""

from abc import abstractmethod
from collections.abc import Collection, Sequence

from cache_policies.policy import CachePolicy, ExpertId


class QueuePolicy(CachePolicy):
    """Turns events into hits, misses, evictions and admissions; a subclass keeps the queues.

    It does not matter when reads finish: an expert is taken for resident once an event has asked for it.
    A prefetched expert joins at the end of the event during which it came.
    """

    def __init__(self) -> None:
        self._coming: dict[ExpertId, None] = {}

    @abstractmethod
    def _has(self, key: ExpertId) -> bool:
        """Whether it is in the queues of residents."""

    @abstractmethod
    def _hit(self, key: ExpertId) -> None:
        """A resident is used."""

    def _miss(self, key: ExpertId) -> None:  # noqa: B027 - not every policy learns from misses
        """An expert is used that is not resident; it will be admitted."""

    @abstractmethod
    def _admit(self, key: ExpertId) -> None:
        """It is resident from now on."""

    @abstractmethod
    def _evict(self, candidates: Collection[ExpertId]) -> ExpertId | None:
        """Take a candidate out of the queues; None when they hold none."""

    def step(
        self,
        layer: int,
        routed: Sequence[int],
        weights: Sequence[float] | None = None,
        scores: Sequence[float] | None = None,
        token: int = -1,
    ) -> None:
        self._admit_coming()
        for expert in sorted(routed):
            key = (layer, expert)
            if self._has(key):
                self._hit(key)
            else:
                self._miss(key)
                self._coming[key] = None

    def inserted(self, expert: ExpertId) -> None:
        if not self._has(expert):
            self._coming[expert] = None

    def victims(self, candidates: Collection[ExpertId], n: int) -> list[ExpertId]:
        if n > len(candidates):
            raise ValueError(f"{n} victims asked for, but only {len(candidates)} experts may leave")
        chosen: list[ExpertId] = []
        while len(chosen) < n:
            victim = self._evict(candidates)
            if victim is not None:
                chosen.append(victim)
            elif self._coming:
                self._admit_coming()
            else:  # experts that came unannounced
                chosen += sorted(set(candidates).difference(chosen))[: n - len(chosen)]
        return chosen

    def _admit_coming(self) -> None:
        for key in sorted(self._coming):
            self._admit(key)
        self._coming.clear()
