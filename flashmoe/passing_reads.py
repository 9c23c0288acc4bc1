"""Experts that only pass through: read when no demand read waits, used once, gone.

For work in the background, which must not change what is resident. A few slots of their own; who asks waits
for nobody but the drive.
"""

import queue
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from flashmoe.expert_slots import CacheCounters, slot_addresses, slot_buffers
from flashmoe.weights import ExpertId
from kernels.expert_ffn import Addresses
from storage.expert_reader import ExpertReader, ReadPlan
from storage.host import allocate_aligned
from storage.read_queue import Completion, ReadQueue, Request


class _Passing(NamedTuple):
    key: ExpertId
    slot: int
    addresses: Addresses


class PassingReads:
    """Reads `wanted` experts in their order, as slots are free. Not thread-safe."""

    def __init__(
        self, plans: Mapping[ExpertId, ReadPlan], reader: ExpertReader, reads: ReadQueue,
        counters: CacheCounters, slots: int, is_resident: Callable[[ExpertId], bool],
    ) -> None:  # fmt: skip
        """`reader` and `reads` stay the caller's. Bytes and misses are counted in `counters`."""
        slot_bytes = max(plan.slot_bytes for plan in plans.values())
        arena = None if reader.in_place else memoryview(allocate_aligned(slots * slot_bytes))
        self._buffers = slot_buffers(arena, slots, slot_bytes)
        self._plans, self._reader, self._reads, self._counters = plans, reader, reads, counters
        self._is_resident, self._urgent = is_resident, False
        self._free = list(range(slots - 1, -1, -1))
        self._wanted: deque[ExpertId] = deque()
        self._in_flight: dict[ExpertId, tuple[int, Request]] = {}
        self._arrived: deque[_Passing] = deque()
        self._done: queue.SimpleQueue[Completion] = queue.SimpleQueue()

    def want(self, keys: Iterable[ExpertId]) -> None:
        """Have experts read, behind those wanted already."""
        self._wanted.extend(keys)
        self._submit()

    def unwant(self, key: ExpertId) -> bool:
        """It has come to be resident: True if it need not be read any more."""
        if key not in self._wanted:
            return False
        self._wanted.remove(key)
        return True

    def take(self, timeout_s: float = 0.0) -> _Passing | None:
        """The next expert that has arrived, waiting for it so long; `drop` it after use. Raises ReadError."""
        while not self._arrived:
            try:
                completion = self._done.get(timeout=timeout_s) if timeout_s else self._done.get_nowait()
            except queue.Empty:
                return None
            self._file(completion)
        return self._arrived.popleft()

    def drop(self, passing: _Passing) -> None:
        """Its slot may be used for another one."""
        self._free_slot(passing.key, passing.slot)
        self._submit()

    def hurry(self, urgent: bool) -> None:
        """Whether nobody else needs the drive, so that these are demand reads."""
        self._urgent = urgent
        if urgent:
            for _, request in self._in_flight.values():
                self._reads.promote(request)

    def give_up(self) -> None:
        """Want nothing any more, and wait until no read writes to a slot."""
        self._wanted.clear()
        for key, (slot, request) in list(self._in_flight.items()):
            if self._reads.cancel(request):
                self._counters.bytes_read += request.read_bytes
                del self._in_flight[key]
                self._free_slot(key, slot)
        while self._in_flight:
            completion = self._done.get()
            key = completion.tag
            slot, _ = self._in_flight.pop(key)
            self._counters.bytes_read += completion.read_bytes
            self._free_slot(key, slot)
        while self._arrived:
            passing = self._arrived.popleft()
            self._free_slot(passing.key, passing.slot)

    def _submit(self) -> None:
        while self._wanted and self._free:
            key, slot = self._wanted.popleft(), self._free.pop()
            self._in_flight[key] = slot, self._reads.submit(
                key, self._plans[key], self._buffers[slot], self._done, prefetch=not self._urgent
            )
            self._counters.misses += 1

    def _file(self, completion: Completion) -> None:
        key = completion.tag
        slot, _ = self._in_flight.pop(key)
        self._counters.bytes_read += completion.read_bytes
        if completion.views is None:
            self._free_slot(key, slot)
            assert completion.error is not None
            raise completion.error
        self._arrived.append(_Passing(key, slot, slot_addresses(completion.views)))

    def _free_slot(self, key: ExpertId, slot: int) -> None:
        if not self._is_resident(key):  # or a mapped reader would drop the pages of one that stays
            self._reader.release(self._plans[key])
        self._free.append(slot)
