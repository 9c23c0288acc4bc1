"""The expert cache: where policy, storage and memory meet.

A fixed number of equal slots holds whole experts. An event (one layer of one step) asks for its experts;
resident ones are served at once while the others are read, and those are served as they arrive. Who is
resident, who comes and who leaves is decided in `cache_policies/residency.py`, in ids alone and whatever the
order in which reads finish; here are slots, addresses and reads. Knows nothing about tokens, attention
or the arithmetic of experts.
"""

import ctypes
import queue
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from cache_policies.policy import CachePolicy, Geometry
from cache_policies.residency import ChunkPlan, Residency
from flashmoe.weights import ExpertId
from kernels.expert_ffn import Addresses
from storage.expert_reader import ExpertReader, ReadPlan
from storage.host import allocate_aligned
from storage.read_queue import Completion, ReadQueue

# How often to look whether a read that is waited for exists: a Ctrl-C may have come in the instant between
# noting it and asking for it, or taking it.
LOST_READ_S = 1.0


@dataclass(slots=True)
class CacheCounters:
    """What the cache did so far; subtract two snapshots for a span of work. Bytes as int, time in seconds."""

    hits: int = 0
    misses: int = 0
    bytes_read: int = 0
    stall_s: float = 0.0  # time the computation waited for reads
    read_s: float = 0.0  # time with at least one read in flight, whether anybody waited or not

    def snapshot(self) -> "CacheCounters":
        return CacheCounters(*(getattr(self, f.name) for f in fields(self)))

    def __sub__(self, other: "CacheCounters") -> "CacheCounters":
        return CacheCounters(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)))


@dataclass(frozen=True, slots=True)
class _Resident:
    slot: int
    addresses: Addresses


@dataclass(frozen=True, slots=True, eq=False)
class _Read:
    """One read asked for: the expert, and the slot that its bytes go to."""

    key: ExpertId
    slot: int


class ExpertCache:
    """Experts in memory, the rest on the drive. Not thread-safe; one computation at a time.

    `plans` and the methods name layers as the model does. Policy, residency and everything inside count
    only the layers that have experts.
    """

    def __init__(
        self,
        plans: Mapping[ExpertId, ReadPlan],
        reader: ExpertReader,
        reads: ReadQueue,
        policy: CachePolicy,
        geometry: Geometry,
        spare: int = 0,
    ) -> None:
        """`spare`: slots beyond the policy's capacity, through which a prefill's experts pass."""
        self.policy, self.counters = policy, CacheCounters()
        self._residency = Residency(policy, geometry, spare)
        self.slots = self._residency.slots + spare
        self._ordinals = {layer: i for i, layer in enumerate(sorted({layer for layer, _ in plans}))}
        self._plans = {(self._ordinals[layer], expert): plan for (layer, expert), plan in plans.items()}
        self._reader, self._reads = reader, reads
        self._buffers = _slot_buffers(self.slots, max(p.slot_bytes for p in plans.values()), reader.in_place)
        self._free = list(range(self.slots - 1, -1, -1))
        self._residents: dict[ExpertId, _Resident] = {}
        self._in_flight: dict[ExpertId, _Read] = {}
        self._chunk: ChunkPlan | None = None  # of the prefill event that goes on
        self._event = 0  # counts up: a generator left over from an earlier event must not end a later one
        self._done: queue.SimpleQueue[Completion] = queue.SimpleQueue()

    @property
    def resident(self) -> frozenset[ExpertId]:
        """The experts in memory; layers are counted among those with experts."""
        return self._residency.residents

    def fetch(
        self,
        layer: int,
        routed: Sequence[int],
        weights: Sequence[float],
        scores: Sequence[float] | None = None,
        token: int = -1,
    ) -> Iterator[list[tuple[int, Addresses]]]:
        """One decode event: ask for what is missing, and return an iterator of batches of (place in
        `routed`, the expert's addresses), the hits first, then whatever reads have finished.

        What the policy is told is as in `CachePolicy.step`. The addresses are valid until the next batch is
        asked for. Raises ReadError when the drive fails; the cache stays usable.
        """
        self._end_event()
        ordinal = self._ordinals[layer]
        missing, victims = self._residency.begin(ordinal, routed, weights, scores, token)
        self.counters.hits += len(routed) - len(missing)
        self.counters.misses += len(missing)
        for key in victims:
            self._drop(key)
        for key in missing:
            self._submit(key)
        return self._batches(ordinal, routed, self._event)

    def _batches(
        self, layer: int, routed: Sequence[int], event: int
    ) -> Iterator[list[tuple[int, Addresses]]]:
        places: dict[ExpertId, int] = {}  # of those that are being read
        hits: list[tuple[int, Addresses]] = []
        for place, expert in enumerate(routed):
            resident = self._residents.get((layer, expert))
            if resident is None:
                places[layer, expert] = place
            else:
                hits.append((place, resident.addresses))
        try:
            if hits:
                yield hits
            while self._in_flight:
                batch: list[tuple[int, Addresses]] = []
                completion: Completion | None = self._arrival()
                while completion is not None:
                    key = self._take(completion)
                    self._residency.arrived(key)
                    batch.append((places[key], self._residents[key].addresses))
                    completion = self._arrived_already()
                yield batch
        finally:
            if event == self._event:
                self._end_event()

    def observe(
        self,
        layer: int,
        routed: Sequence[Sequence[int]],
        weights: Sequence[Sequence[float]],
        scores: NDArray[np.float32] | None = None,
        tokens: Sequence[int] | None = None,
    ) -> None:
        """Show the policy the tokens of a prefill chunk, in order: routed and weights are [T, K], scores
        [T, E], tokens [T]."""
        ordinal = self._ordinals[layer]
        for i, (ids, w) in enumerate(zip(routed, weights, strict=True)):
            self.policy.step(
                ordinal, ids, w, None if scores is None else scores[i], -1 if tokens is None else tokens[i]
            )

    def stream(self, layer: int, experts: Sequence[int]) -> Iterator[tuple[int, Addresses]]:
        """One prefill event: yield every expert of a chunk once, with its addresses, reading ahead.

        `experts`: each once, in `serving_order`. Which of them stay, the policy has decided before the first
        is read; the others pass through few slots, so that a long prompt does not wash out what decoding
        will need elsewhere. Raises ReadError when the drive fails; the cache stays usable.
        """
        self._end_event()
        event = self._event
        plan = self._chunk = self._residency.begin_chunk(self._ordinals[layer], experts)
        self.counters.hits += len(plan.hits)
        self.counters.misses += len(plan.passing) + len(plan.staying)
        pending = deque([*plan.passing, *plan.staying])
        passing = set(plan.passing)
        try:
            for key in plan.victims:
                self._drop(key)
            for key in plan.hits:
                self._read_ahead(pending)
                yield key[1], self._residents[key].addresses
                if key in plan.leaving:
                    self._drop(key)
            while pending or self._in_flight:
                self._read_ahead(pending)
                key = self._take(self._arrival())
                yield key[1], self._residents[key].addresses
                if key in passing:
                    self._drop(key)
        finally:
            if event == self._event:
                self._end_event()

    def evict_all(self) -> None:
        """Empty every slot, for a cold start; the policy keeps what it learnt."""
        self._end_event()
        for key in self._residency.evict_all():
            self._drop(key)

    def close(self) -> None:
        """Stop reading and give the memory back."""
        self.evict_all()
        self._reads.close()
        self._buffers.clear()
        self._reader.close()

    def _read_ahead(self, pending: deque[ExpertId]) -> None:
        while pending and self._free:
            self._submit(pending.popleft())

    def _submit(self, key: ExpertId) -> None:
        self._drop(key)  # there only if a Ctrl-C came between the decision that it goes and the deed
        if not self._free:
            for resident in [k for k in self._residents if k not in self._residency]:
                self._drop(resident)  # as above
        read = _Read(key, self._free.pop())
        self._in_flight[key] = read
        self._reads.submit(read, self._plans[key], self._buffers[read.slot], self._done)

    def _drop(self, key: ExpertId) -> None:
        """Give the slot back, if the expert has one."""
        resident = self._residents.pop(key, None)
        if resident is not None:
            self._reader.release(self._plans[key])
            self._free.append(resident.slot)

    def _arrival(self) -> Completion:
        """Wait for the next read."""
        assert self._in_flight, "no slot is free for what must come"
        begin = time.perf_counter()
        completion = self._done.get()
        while not self._is_awaited(completion):
            completion = self._done.get()
        self.counters.stall_s += time.perf_counter() - begin
        return completion

    def _arrived_already(self) -> Completion | None:
        """A read of this event that has finished meanwhile, if there is one."""
        try:
            while True:
                completion = self._done.get_nowait()
                if self._is_awaited(completion):
                    return completion
        except queue.Empty:
            return None

    def _is_awaited(self, completion: Completion) -> bool:
        """Not a read that `_settle` had given up."""
        return self._in_flight.get(completion.tag.key) is completion.tag

    def _take(self, completion: Completion) -> ExpertId:
        """An expert is in its slot now. Raises the error of a read that failed."""
        read: _Read = completion.tag
        del self._in_flight[read.key]
        self.counters.bytes_read += completion.read_bytes
        self.counters.read_s = self._reads.busy_s
        if completion.views is None:
            self._free.append(read.slot)
            assert completion.error is not None
            raise completion.error
        self._residents[read.key] = _Resident(read.slot, _addresses(completion.views))
        return read.key

    def _end_event(self) -> None:
        """No read in flight, nothing held; also after an event that an error or Ctrl-C cut short."""
        arrived: list[ExpertId] = []
        interrupt = self._await_reads(arrived) if self._in_flight else None
        self._event += 1
        chunk, self._chunk = self._chunk, None
        if chunk is None:
            for key in arrived:
                self._residency.arrived(key)
            self._residency.settle()
        else:
            for key in (*chunk.passing, *chunk.leaving):  # what is left of them
                self._drop(key)
            self._residency.chunk_served(chunk, lost=[k for k in chunk.staying if k not in self._residents])
        if interrupt is not None:
            raise interrupt

    def _await_reads(self, arrived: list[ExpertId]) -> KeyboardInterrupt | None:
        """Wait until no read is in flight: a slot must not be reused while one still writes to it. Adds to
        `arrived`; returns the Ctrl-C that came meanwhile. Errors are passed over: the event's first one is
        on its way up."""
        interrupt: KeyboardInterrupt | None = None
        while self._in_flight:
            try:
                completion = self._done.get(timeout=LOST_READ_S)
                if self._is_awaited(completion):
                    arrived.append(self._take(completion))
            except queue.Empty:
                for read in [r for r in self._in_flight.values() if not self._reads.is_pending(r)]:
                    del self._in_flight[read.key]
                    self._free.append(read.slot)
            except KeyboardInterrupt as error:
                interrupt = error
            except Exception:
                continue
        return interrupt


def _addresses(views: Sequence[memoryview]) -> Addresses:
    """Where the parts of an expert lie: three, or one that holds all."""
    first, *others = (ctypes.addressof(ctypes.c_char.from_buffer(view)) for view in views)
    return (first, others[0], others[1]) if others else (first, 0, 0)


def _slot_buffers(slots: int, slot_bytes: int, in_place: bool) -> list[memoryview | None]:
    """One aligned memoryview a slot; none where the reader serves its own mapping."""
    if in_place:
        return [None] * slots
    arena = memoryview(allocate_aligned(slots * slot_bytes))
    return [arena[i * slot_bytes : (i + 1) * slot_bytes] for i in range(slots)]
