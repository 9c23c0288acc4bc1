"""The policies by name."""

from collections.abc import Callable

from cache_policies.fifo import FIFO
from cache_policies.lfru import LFRU
from cache_policies.lfu import LFU
from cache_policies.lru import LRU
from cache_policies.per_layer import PerLayer
from cache_policies.policy import CachePolicy, Geometry
from cache_policies.random_policy import Random

POLICY_NAMES = (LRU.name, LFU.name, LFRU.name, FIFO.name, Random.name)


def make_policy(name: str, geometry: Geometry, *, seed: int = 0) -> CachePolicy:
    """A new policy that has seen nothing yet; `seed` matters to "random" alone.

    Raises ValueError for an unknown name.
    """
    makers: dict[str, Callable[[], CachePolicy]] = {
        LRU.name: LRU,
        LFU.name: LFU,
        LFRU.name: LFRU,
        FIFO.name: FIFO,
        Random.name: lambda: Random(seed),
    }
    if name not in makers:
        raise ValueError(f"unknown policy {name!r}; known are {', '.join(POLICY_NAMES)}")
    return PerLayer(makers[name], geometry.layers) if geometry.per_layer else makers[name]()
