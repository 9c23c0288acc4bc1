"""What those that keep experts in memory share: counters, and slots as native code sees them."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, fields

from kernels.expert_ffn import Addresses


@dataclass(slots=True)
class CacheCounters:
    """What the cache did so far; subtract two snapshots for a span of work. Bytes as int, time in seconds."""

    hits: int = 0
    misses: int = 0
    bytes_read: int = 0
    stall_s: float = 0.0  # time the computation waited for reads
    read_s: float = 0.0  # time with at least one read in flight, whether anybody waited or not
    # Guesses. They are misses of the policy all the same: what they save is time.
    prefetch_issued: int = 0
    prefetch_hits: int = 0  # had arrived when they were asked for
    prefetch_late: int = 0  # were still being read
    prefetch_wasted: int = 0  # had arrived, and were not asked for
    prefetch_cancelled: int = 0  # were given up before they had arrived
    prefetch_failed: int = 0  # could not be read; if asked for, read again
    prefetch_bytes_wasted: int = 0  # of those not asked for

    def snapshot(self) -> "CacheCounters":
        return type(self)(*(getattr(self, f.name) for f in fields(self)))

    def __sub__(self, other: "CacheCounters") -> "CacheCounters":
        return type(self)(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)))


def slot_addresses(views: Sequence[memoryview]) -> Addresses:
    """Where the parts of an expert lie: three, or one that holds all."""
    first, *others = (ctypes.addressof(ctypes.c_char.from_buffer(view)) for view in views)
    return (first, others[0], others[1]) if others else (first, 0, 0)


def slot_buffers(arena: memoryview | None, slots: int, slot_bytes: int) -> list[memoryview | None]:
    """One aligned memoryview a slot; none where the reader serves its own mapping."""
    if arena is None:
        return [None] * slots
    return [arena[i * slot_bytes : (i + 1) * slot_bytes] for i in range(slots)]
