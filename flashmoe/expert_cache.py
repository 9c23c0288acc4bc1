"""The expert cache: where policy, storage and memory meet.

A fixed number of equal slots holds whole experts. An event (one layer of one step) asks for its experts;
resident ones are served at once while the others are read, and those are served as they arrive. Who is
resident, who comes and who leaves is decided in `cache_policies/residency.py`, in ids alone and whatever the
order in which reads finish; here are slots, addresses and reads. A guess is read into a spare slot beyond the
policy's capacity and becomes resident only when it is asked for, as any miss does: it may come early, but it
evicts nothing. Below a faster tier (flashmoe/vram_cache.py) the same slots and reads serve events that the
upper tier begins. Knows nothing about tokens, attention or the arithmetic of experts.
"""

import ctypes
import queue
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cache_policies.lower_tier import Descent, LowerTier
from cache_policies.policy import CachePolicy, Geometry
from cache_policies.residency import ChunkPlan, Residency
from flashmoe.expert_slots import CacheCounters, slot_addresses, slot_buffers
from flashmoe.passing_reads import PassingReads
from flashmoe.weights import ExpertId
from kernels.expert_ffn import Addresses
from storage.expert_reader import ExpertReader, ReadPlan
from storage.host import allocate_aligned
from storage.read_queue import Completion, ReadQueue, Request

# How often to look whether a read that is waited for exists: a Ctrl-C may have come in the instant between
# noting it and asking for it, or taking it.
LOST_READ_S = 1.0
IN_WAIT_S = 0.001  # how often to look for work while a read is waited for and there was none


@dataclass(frozen=True, slots=True)
class _Resident:
    slot: int
    addresses: Addresses


@dataclass(slots=True, eq=False)
class _Read:
    """One read asked for: the expert, the slot that its bytes go to, and of a guess the request itself."""

    key: ExpertId
    slot: int
    guess: Request | None = None


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
        """`spare`: slots beyond the policy's capacity, for guesses and for a prefill's experts to pass."""
        self.policy, self.counters = policy, CacheCounters()
        self._residency = Residency(policy, geometry, spare)
        self._lower: LowerTier | None = None  # the residency, if there is a faster tier
        self.slots = self._residency.slots + spare
        self._ordinals = {layer: i for i, layer in enumerate(sorted({layer for layer, _ in plans}))}
        self._plans = {(self._ordinals[layer], expert): plan for (layer, expert), plan in plans.items()}
        self._expert_bytes = max(plan.read_bytes for plan in plans.values())
        self._reader, self._reads = reader, reads
        slot_bytes = max(p.slot_bytes for p in plans.values())
        self._arena = None if reader.in_place else memoryview(allocate_aligned(self.slots * slot_bytes))
        self._buffers = slot_buffers(self._arena, self.slots, slot_bytes)
        self._free = list(range(self.slots - 1, -1, -1))
        self._residents: dict[ExpertId, _Resident] = {}
        self._copies: dict[ExpertId, None] = {}  # residents that the tier above has, too: the oldest first
        self._before_reuse: Callable[[ExpertId], None] = _no_wait
        self._moved: Callable[[ExpertId, int], None] = _no_watch
        self._in_flight: dict[ExpertId, _Read] = {}  # that the event waits for
        self._guesses: dict[ExpertId, _Read] = {}  # in flight
        self._staged: dict[ExpertId, _Resident] = {}  # guesses that have arrived
        self._cancelled: set[_Read] = set()  # guesses given up whose slot may still be written to
        self._chunk: ChunkPlan | None = None  # of the prefill event that goes on
        self._event = 0  # counts up: a generator left over from an earlier event must not end a later one
        self._done: queue.SimpleQueue[Completion] = queue.SimpleQueue()
        # A piece of other work, some milliseconds, to do while a read is waited for: whether it did any.
        self.in_wait: Callable[[], bool] | None = None

    @property
    def resident(self) -> frozenset[ExpertId]:
        """The experts in memory; layers are counted among those with experts."""
        return self._residency.residents

    @property
    def demand_busy_s(self) -> float:
        """Seconds during which a demand read was waited for."""
        return self._reads.demand_busy_s

    @property
    def seconds_per_read(self) -> float:
        """What the drive has needed for one expert so far; 0 before the first."""
        bytes_read = self._reads.bytes_read
        return self._reads.busy_s * self._expert_bytes / bytes_read if bytes_read else 0.0

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
        self._bring(ordinal, len(routed), missing, victims)
        return self._batches(ordinal, routed, self._event)

    def can_keep(self, experts: int) -> bool:
        """Whether one event may keep so many experts of a layer at once."""
        return experts <= self._residency.geometry.capacity

    def fetch_together(
        self, layer: int, experts: Sequence[int], routed: Sequence[Sequence[int]],
        weights: Sequence[Sequence[float]], scores: NDArray[np.float32], tokens: Sequence[int],
    ) -> Iterator[list[tuple[int, Addresses]]]:  # fmt: skip
        """One decode event of several sequences, as `fetch`: `experts`, each once, are those that the tokens
        are routed to; places are theirs. The policy sees the tokens as in `observe`."""
        self._end_event()
        ordinal = self._ordinals[layer]
        show_chunk(self.policy, ordinal, routed, weights, scores, tokens)
        missing, victims = self._residency.begin_together(ordinal, experts)
        self._bring(ordinal, len(experts), missing, victims)
        return self._batches(ordinal, experts, self._event)

    def prefetch(self, guesses: Iterable[ExpertId], at_most: int) -> None:
        """Read experts ahead, in the order given, as far as they are not in memory and spare slots last.

        They wait for demand reads. When a layer's event begins, what it does not ask for is given up.
        """
        for layer, expert in guesses:
            room = self._residency.spare - len(self._guesses) - len(self._staged) - len(self._cancelled)
            if min(at_most, room) <= 0:
                return
            key = (self._ordinals[layer], expert)
            elsewhere = (self._in_flight, self._guesses, self._staged)
            if key in self._residency or any(key in reads for reads in elsewhere):
                continue
            read = self._guesses[key] = _Read(key, self._free_slot())
            read.guess = self._reads.submit(
                read, self._plans[key], self._buffers[read.slot], self._done, prefetch=True
            )
            self.counters.prefetch_issued += 1
            at_most -= 1

    def look(self, key: ExpertId) -> Addresses | None:
        """Where an expert is, if it is resident; valid until anything else is asked of the cache. Its use is
        not counted."""
        resident = self._residents.get(key)
        return resident.addresses if resident is not None else None

    def keys(self, layer: int, experts: Sequence[int]) -> list[ExpertId]:
        """The experts of a layer as this class counts layers."""
        return [(self._ordinals[layer], expert) for expert in experts]

    def passing_reads(self, slots: int) -> PassingReads:
        """For work in the background: reads into `slots` of its own, behind all demand reads."""
        return PassingReads(
            self._plans, self._reader, self._reads, self.counters, slots, self._residents.__contains__
        )

    def _bring(
        self, ordinal: int, asked: int, missing: Sequence[ExpertId], victims: Sequence[ExpertId]
    ) -> None:
        """Make room and ask for what a decode event lacks."""
        self.counters.hits += asked - len(missing)
        self.counters.misses += len(missing)
        for key in victims:
            self._drop(key)
        self._file_arrivals()
        lacking = [key for key in missing if not self._was_guessed(key)]
        for key in lacking:
            self._submit(key)
        if self._guesses or self._staged:
            self._drop_guesses(lambda key: key[0] == ordinal)

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
        show_chunk(self.policy, self._ordinals[layer], routed, weights, scores, tokens)

    def stream(self, layer: int, experts: Sequence[int]) -> Iterator[tuple[int, Addresses]]:
        """One prefill event: yield every expert of a chunk once, with its addresses, reading ahead.

        `experts`: each once, in `serving_order`. Which of them stay, the policy has decided before the first
        is read; the others pass through few slots, so that a long prompt does not wash out what decoding
        will need elsewhere. Raises ReadError when the drive fails; the cache stays usable.
        """
        self._end_event()
        self._drop_all_guesses()
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

    # Below a faster tier. Keys count layers among those with experts: `ordinal` tells how.

    @property
    def layers(self) -> list[int]:
        """The layers with experts: their place here is their ordinal."""
        return list(self._ordinals)

    @property
    def arena(self) -> tuple[int, int]:
        """(address, bytes) of all slots."""
        assert self._arena is not None, "this reader has no slots"
        return ctypes.addressof(ctypes.c_char.from_buffer(self._arena)), self._arena.nbytes

    def serve_above(
        self, capacity: int, before_reuse: Callable[[ExpertId], None], moved: Callable[[ExpertId, int], None]
    ) -> None:
        """Be the lower of two tiers from now on; empty yet. `capacity`: the upper one's, as its geometry
        counts it. `before_reuse` waits until nobody reads or writes an expert's slot; `moved` is told when
        one is in a slot, or -1: not any more."""
        assert not self._residents, "this tier has been used by itself"
        r = self._residency
        self._residency = self._lower = LowerTier(r.policy, r.geometry, r.spare, capacity)
        self._before_reuse, self._moved = before_reuse, moved

    @property
    def lower(self) -> LowerTier:
        """Who is in this tier only."""
        assert self._lower is not None, "no tier above"
        return self._lower

    def holds(self, key: ExpertId) -> bool:
        """Whether an expert's bytes are in a slot, no longer being read."""
        return key in self._residents

    def addresses(self, key: ExpertId) -> Addresses:
        return self._residents[key].addresses

    def slot(self, key: ExpertId) -> int:
        """Where an expert is, -1 if it is in no slot."""
        resident = self._residents.get(key)
        return -1 if resident is None else resident.slot

    def read_early(self, keys: Iterable[ExpertId]) -> None:
        """Ask for reads of the event that begins, as far as slots are free or hold copies: the drive need not
        wait for the policies."""
        for key in keys:
            if not self._free and not self._copies:
                return
            if not any(key in known for known in (self._residents, self._guesses, self._staged)):
                self._submit(key)

    def begin_below(
        self, lacking: Sequence[ExpertId], rising: Collection[ExpertId], leaving: Sequence[ExpertId],
        above: Collection[ExpertId],
    ) -> frozenset[ExpertId]:  # fmt: skip
        """Begin an event (`LowerTier.begin_below`) -> which of `leaving` must be copied down: those that fall
        and have no copy here. Those of `above` are there already as guesses and are not read."""
        descent = self.lower.begin_below(lacking, rising, leaving)
        self._make_way(leaving, descent)
        if not self._in_flight:
            self._file_arrivals()
        for key in descent.missing:
            if key in above:
                self.lower.arrived(key)
            elif key not in self._in_flight and not self._was_guessed(key):
                self._submit(key)
        return self._come_down(descent.falling)

    def _make_way(self, leaving: Iterable[ExpertId], descent: Descent) -> None:
        """Drop who leaves for good. Copies of what falls are the last copies to be taken for reads."""
        for key in (*descent.victims, *(key for key in leaving if key not in descent.falling)):
            self._drop(key)
        for key in descent.falling:
            if key in self._copies:
                del self._copies[key]
                self._copies[key] = None

    def _come_down(self, falling: Sequence[ExpertId]) -> frozenset[ExpertId]:
        """What falls is no copy any more -> which of it must be copied down, having none."""
        for key in falling:
            self._copies.pop(key, None)
        return frozenset(key for key in falling if key not in self._residents)

    def arrivals(self, wait: bool = True) -> list[ExpertId]:
        """Experts of the event that have been read meanwhile; `wait` for at least one, if one is to come."""
        arrived: list[ExpertId] = []
        completion = self._arrival() if wait and self._in_flight else self._arrived_already()
        while completion is not None:
            key = self._take(completion)
            if self._chunk is None:
                self.lower.arrived(key)
            arrived.append(key)
            completion = self._arrived_already()
        return arrived

    @property
    def has_guesses(self) -> bool:
        return bool(self._guesses or self._staged)

    def give_up_guesses(self, ordinal: int) -> None:
        """Those of a layer whose event has begun."""
        if self._guesses or self._staged:
            if not self._in_flight:
                self._file_arrivals()
            self._drop_guesses(lambda key: key[0] == ordinal)

    def begin_chunk_below(
        self, ordinal: int, passing: Sequence[ExpertId], rising: Sequence[ExpertId],
        leaving: Sequence[ExpertId],
    ) -> tuple[frozenset[ExpertId], list[ExpertId]]:  # fmt: skip
        """Begin a prefill event (`LowerTier.begin_chunk_below`) -> (as `begin_below`, what must be read)."""
        self._end_event()
        self._drop_all_guesses()
        plan, descent = self.lower.begin_chunk_below(ordinal, passing, rising, leaving)
        self._chunk = plan
        self.counters.hits += len(passing) + len(rising) - len(descent.missing)
        self.counters.misses += len(descent.missing)
        for key in plan.victims:
            self._drop(key)
        self._make_way(leaving, descent)
        return self._come_down(descent.falling), descent.missing

    def read_ahead(self, pending: deque[ExpertId], reserved: int) -> None:
        """Ask for what a chunk lacks, as far as slots are free or hold copies, beyond those `reserved`."""
        while pending and len(self._free) + len(self._copies) > reserved:
            self._submit(pending.popleft())

    @property
    def is_reading(self) -> bool:
        return bool(self._in_flight)

    def copied(self, key: ExpertId) -> None:
        """An expert has been copied up: unless it is to stay here, its slot may be taken."""
        chunk = self._chunk
        stays = chunk is not None and (key in self.lower and key not in chunk.leaving or key in chunk.staying)
        if not stays and key in self._residents:
            self._copies[key] = None

    def fall(self, key: ExpertId, copy_out: Callable[[Addresses], None]) -> None:
        """Find a slot for what falls from above, and have it filled. It may have been a copy's that is being
        read: the filling must wait for all copies up."""
        if self._free:
            slot = self._free.pop()
        else:
            copy = next(iter(self._copies))
            del self._copies[copy]
            slot = self._residents.pop(copy).slot
            self._moved(copy, -1)
        buffer = self._buffers[slot]
        assert buffer is not None
        addresses = slot_addresses([buffer[begin : begin + size] for begin, size in self._plans[key].parts])
        copy_out(addresses)
        self._settle_in(key, _Resident(slot, addresses))

    def end_event(self) -> None:
        """The event is over; see `_end_event`."""
        self._end_event()

    def reconcile(self, above: Set[ExpertId]) -> None:
        """After an event that was cut short, with no copy under way: make slots and residents agree with each
        other and with who is `above`."""
        self._end_event()
        self._copies.clear()
        for key in self.lower.recover(self._residents.keys() - above):
            self._drop(key)
        for key in [key for key in self._residents if key not in self.lower]:
            if key in above:
                self._copies[key] = None
            else:
                self._drop(key)
        taken = {resident.slot for resident in (*self._residents.values(), *self._staged.values())}
        taken |= {read.slot for read in (*self._guesses.values(), *self._cancelled)}
        self._free = [slot for slot in range(self.slots - 1, -1, -1) if slot not in taken]

    def evict_all(self) -> None:
        """Empty every slot, for a cold start; the policy keeps what it learnt."""
        self._end_event()
        self._drop_all_guesses()
        for key in (*self._residency.evict_all(), *self._copies):
            self._drop(key)

    def close(self) -> None:
        """Stop reading and give the memory back."""
        self.evict_all()
        self._reads.close()
        self._buffers.clear()
        self._arena = None
        self._reader.close()

    def _read_ahead(self, pending: deque[ExpertId]) -> None:
        while pending and self._free:
            self._submit(pending.popleft())

    def _was_guessed(self, key: ExpertId) -> bool:
        """Whether a miss is in memory already, or on its way."""
        if (staged := self._staged.pop(key, None)) is not None:
            self._settle_in(key, staged)
            self._residency.arrived(key)
            self.counters.prefetch_hits += 1
        elif (read := self._guesses.pop(key, None)) is not None:
            if read.guess is None:  # a Ctrl-C came before its request was noted: its slot may be written to
                self._cancelled.add(read)
                return False
            self._in_flight[key] = read
            self._reads.promote(read.guess)
            self.counters.prefetch_late += 1
        else:
            return False
        return True

    def _drop_guesses(self, which: Callable[[ExpertId], bool]) -> None:
        for key in [key for key in self._staged if which(key)]:
            self._free.append(self._staged.pop(key).slot)
            self._reader.release(self._plans[key])
            self.counters.prefetch_wasted += 1
            self.counters.prefetch_bytes_wasted += self._plans[key].read_bytes
        for key in [key for key in self._guesses if which(key)]:
            read = self._guesses.pop(key)
            self.counters.prefetch_cancelled += 1
            if read.guess is not None and self._reads.cancel(read.guess):
                self._note_bytes(read, read.guess.read_bytes)
                self._free.append(read.slot)
            else:
                self._cancelled.add(read)

    def _drop_all_guesses(self) -> None:
        """Every spare slot is free afterwards."""
        self._file_arrivals()
        self._drop_guesses(lambda key: True)
        while self._cancelled:
            self._wait_and_file()

    def _submit(self, key: ExpertId) -> None:
        self._drop(key)  # there only if a Ctrl-C came between the decision that it goes and the deed
        if not self._free and not self._copies:
            for resident in [k for k in self._residents if k not in self._residency]:
                self._drop(resident)  # as above
        read = _Read(key, self._free_slot())
        self._in_flight[key] = read
        self._reads.submit(read, self._plans[key], self._buffers[read.slot], self._done)

    def _drop(self, key: ExpertId) -> None:
        """Give the slot back, if the expert has one."""
        resident = self._residents.get(key)
        if resident is not None:
            self._before_reuse(key)
            del self._residents[key]
            self._moved(key, -1)
            self._copies.pop(key, None)
            self._reader.release(self._plans[key])
            self._free.append(resident.slot)

    def _free_slot(self) -> int:
        if not self._free and self._copies:
            self._drop(next(iter(self._copies)))
        return self._free.pop()

    def _arrival(self) -> Completion:
        """Wait for the next read."""
        assert self._in_flight, "no slot is free for what must come"
        begin = time.perf_counter()
        completion = self._next_done()
        while not self._is_awaited(completion):
            completion = self._next_done()
        self.counters.stall_s += time.perf_counter() - begin
        return completion

    def _next_done(self) -> Completion:
        """Wait for a read; meanwhile there may be other work."""
        pause_s = 0.0
        while (work := self.in_wait) is not None:
            try:
                return self._done.get(timeout=pause_s) if pause_s else self._done.get_nowait()
            except queue.Empty:
                pause_s = 0.0 if work() else IN_WAIT_S
        return self._done.get()

    def _arrived_already(self) -> Completion | None:
        """A read of this event that has finished meanwhile, if there is one."""
        try:
            while True:
                completion = self._done.get_nowait()
                if self._is_awaited(completion):
                    return completion
        except queue.Empty:
            return None

    def _file_arrivals(self) -> None:
        """As no event waits for a read: take what guesses have brought meanwhile."""
        if self._guesses or self._cancelled:
            completion = self._arrived_already()
            assert completion is None

    def _is_awaited(self, completion: Completion) -> bool:
        """Whether a read that the event waits for has ended. What a guess brought is put in its place."""
        read: _Read = completion.tag
        if self._in_flight.get(read.key) is read:
            if read.guess is None or completion.views is not None:
                return True
            self.counters.prefetch_failed += 1  # a guess's error is nobody's: it is read again, on demand
            self._note_bytes(read, completion.read_bytes)
            del self._in_flight[read.key]
            self._free.append(read.slot)
            self._submit(read.key)
        elif self._guesses.get(read.key) is read:
            del self._guesses[read.key]
            self.counters.bytes_read += completion.read_bytes
            if completion.views is None:
                self.counters.prefetch_failed += 1
                self._free.append(read.slot)
            else:
                self._staged[read.key] = _Resident(read.slot, slot_addresses(completion.views))
        elif read in self._cancelled:
            self._cancelled.remove(read)
            self._note_bytes(read, completion.read_bytes)
            self._free.append(read.slot)
        return False

    def _note_bytes(self, read: _Read, nbytes: int) -> None:
        """Bytes that were read in vain."""
        self.counters.bytes_read += nbytes
        self.counters.prefetch_bytes_wasted += nbytes
        if nbytes:
            self._reader.release(self._plans[read.key])

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
        self._settle_in(read.key, _Resident(read.slot, slot_addresses(completion.views)))
        return read.key

    def _settle_in(self, key: ExpertId, resident: _Resident) -> None:
        self._residents[key] = resident
        self._moved(key, resident.slot)

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
                completion = self._wait_and_file()
                if completion is not None:
                    arrived.append(self._take(completion))
            except KeyboardInterrupt as error:
                interrupt = error
            except Exception:
                continue
        return interrupt

    def _wait_and_file(self) -> Completion | None:
        """One more completion, if the event waits for it. Reads that do not exist are given up."""
        try:
            completion = self._done.get(timeout=LOST_READ_S)
            return completion if self._is_awaited(completion) else None
        except queue.Empty:
            for read in [*self._in_flight.values(), *self._cancelled]:
                if not self._reads.is_pending(read):
                    self._free.append(read.slot)
                    self._cancelled.discard(read)
                    self._in_flight.pop(read.key, None)
            return None


def _no_wait(key: ExpertId) -> None:
    """Nobody but the computation reads a slot."""


def _no_watch(key: ExpertId, slot: int) -> None:
    """Nobody wants to know in which slot an expert is."""


def show_chunk(
    policy: CachePolicy,
    ordinal: int,
    routed: Sequence[Sequence[int]],
    weights: Sequence[Sequence[float]],
    scores: NDArray[np.float32] | None,
    tokens: Sequence[int] | None,
) -> None:
    """A policy observes a chunk's tokens, in order: routed and weights [T, K], scores [T, E], tokens [T]."""
    for i, (ids, w) in enumerate(zip(routed, weights, strict=True)):
        policy.step(
            ordinal, ids, w, None if scores is None else scores[i], -1 if tokens is None else tokens[i]
        )
