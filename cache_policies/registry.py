"""The policies by name."""

from collections.abc import Callable

from cache_policies.arc import ARC
from cache_policies.belady import Belady
from cache_policies.fifo import FIFO
from cache_policies.least_stale import LeastStale
from cache_policies.lecar import LeCaR
from cache_policies.lfru import LFRU
from cache_policies.lfu import LFU
from cache_policies.lfu_aged import AgedLFU
from cache_policies.lrb import LRB
from cache_policies.lru import LRU
from cache_policies.paper_network import PaperNetwork, PaperWeights
from cache_policies.per_layer import PerLayer
from cache_policies.policy import CachePolicy, Geometry
from cache_policies.random_policy import Random
from cache_policies.routing_trace import RoutingTrace
from cache_policies.s3fifo import S3FIFO
from cache_policies.sieve import SIEVE

POLICY_NAMES = (
    LRU.name,
    LFU.name,
    AgedLFU.name,
    LFRU.name,
    FIFO.name,
    Random.name,
    ARC.name,
    LeCaR.name,
    S3FIFO.name,
    SIEVE.name,
    LeastStale.name,
)
"""What a user can choose for a live run."""

REPLAY_NAMES = (*POLICY_NAMES, LRB.name, PaperNetwork.name, Belady.name)
"""These, and what is compared on recorded traces only: too slow, in need of training, or of the future."""


def make_policy(
    name: str,
    geometry: Geometry,
    *,
    seed: int = 0,
    trace: RoutingTrace | None = None,
    paper_weights: PaperWeights | None = None,
) -> CachePolicy:
    """A new policy that has seen nothing yet.

    `seed`: for those that draw lots. `trace`: what "belady" will be replayed on. `paper_weights`: for
    "paper".
    Raises ValueError for an unknown name, and when one of these two is asked for without what it needs.
    """
    capacity = geometry.capacity
    caches: dict[str, Callable[[], CachePolicy]] = {
        LRU.name: LRU,
        LFU.name: LFU,
        AgedLFU.name: AgedLFU,
        LFRU.name: LFRU,
        FIFO.name: FIFO,
        Random.name: lambda: Random(seed),
        ARC.name: lambda: ARC(capacity),
        LeCaR.name: lambda: LeCaR(capacity, seed),
        S3FIFO.name: lambda: S3FIFO(capacity),
        SIEVE.name: SIEVE,
        LeastStale.name: LeastStale,
    }
    if name in caches:
        return PerLayer(caches[name], geometry.layers) if geometry.per_layer else caches[name]()
    # These look at each expert by itself, so one object serves layers with slots of their own as well.
    if name == LRB.name:
        return LRB(geometry, seed)
    if name == Belady.name and trace is not None:
        return Belady(trace)
    if name == PaperNetwork.name and paper_weights is not None:
        return PaperNetwork(paper_weights)
    if name in REPLAY_NAMES:
        raise ValueError(f"policy {name!r} needs {'a trace' if name == Belady.name else 'trained weights'}")
    raise ValueError(f"unknown policy {name!r}; known are {', '.join(POLICY_NAMES)}")
