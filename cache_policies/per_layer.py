"""One policy object a layer, for a cache whose layers have slots of their own."""

from collections.abc import Callable, Collection, Sequence

from cache_policies.policy import CachePolicy, ExpertId


class PerLayer(CachePolicy):
    """Keeps every layer to itself: `make` gives a fresh policy for each, and no candidates are ever mixed.

    Policies with queues (ARC, S3-FIFO, SIEVE) mean one cache by them; here each layer is such a cache.
    """

    name = "per layer"

    def __init__(self, make: Callable[[], CachePolicy], layers: int) -> None:
        self._policies = [make() for _ in range(layers)]

    def step(
        self,
        layer: int,
        routed: Sequence[int],
        weights: Sequence[float] | None = None,
        scores: Sequence[float] | None = None,
        token: int = -1,
    ) -> None:
        self._policies[layer].step(layer, routed, weights, scores, token)

    def inserted(self, expert: ExpertId) -> None:
        self._policies[expert[0]].inserted(expert)

    def victims(self, candidates: Collection[ExpertId], n: int) -> list[ExpertId]:
        """`candidates` are of one layer."""
        layer = next(iter(candidates), (0, 0))[0]
        return self._policies[layer].victims(candidates, n)
