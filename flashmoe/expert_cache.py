"""The expert cache: where policy, storage and memory meet.

A fixed number of equal slots holds whole experts. An event (one layer of one step) asks for its experts;
resident ones are served at once while the others are read, and those are served as they arrive. What an event
needs is never a victim of the same event. Knows nothing about tokens, attention or the arithmetic of experts.
"""

import ctypes
import queue
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields

from cache_policies.policy import CachePolicy
from flashmoe.weights import ExpertId
from kernels.expert_ffn import Addresses
from storage.expert_reader import ExpertReader, ReadPlan
from storage.host import allocate_aligned
from storage.read_queue import Completion, ReadQueue

# Slots that a prefill layer above its share may take from other layers to keep reads under way: few, and
# never more than a sixteenth of all.
PREFILL_READS_AHEAD = 4
# After a Ctrl-C in the instant between noting a read and asking for it, or taking it: no drive takes this
# long.
LOST_READ_S = 60.0


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


@dataclass(slots=True)
class _Resident:
    slot: int
    addresses: Addresses


class ExpertCache:
    """`slots` experts in memory, the rest on the drive. Not thread-safe; one computation at a time."""

    def __init__(
        self,
        plans: Mapping[ExpertId, ReadPlan],
        reader: ExpertReader,
        reads: ReadQueue,
        policy: CachePolicy,
        slots: int,
    ) -> None:
        self.slots, self.policy, self.counters = slots, policy, CacheCounters()
        self._plans = plans
        self._reader, self._reads = reader, reads
        self._buffers = _slot_buffers(slots, max(p.slot_bytes for p in plans.values()), reader.in_place)
        self._free = list(range(slots - 1, -1, -1))
        self._evictable: dict[ExpertId, _Resident] = {}
        self._held: dict[ExpertId, _Resident] = {}  # residents that the current event needs
        self._in_flight: dict[ExpertId, int] = {}  # expert -> slot that its bytes go to
        self._layer_keys: dict[int, list[ExpertId]] = {}
        for key in plans:
            self._layer_keys.setdefault(key[0], []).append(key)
        self._layer_residents = dict.fromkeys(self._layer_keys, 0)
        self._prefill_reads_ahead = max(1, min(PREFILL_READS_AHEAD, slots // 16))
        self._done: queue.SimpleQueue[Completion] = queue.SimpleQueue()

    @property
    def resident(self) -> frozenset[ExpertId]:
        """The experts in memory."""
        return frozenset(self._evictable) | frozenset(self._held)

    def fetch(
        self, layer: int, routed: Sequence[int], weights: Sequence[float]
    ) -> Iterator[list[tuple[int, Addresses]]]:
        """One decode event: yield batches of (place in `routed`, the expert's addresses), the hits first,
        then whatever reads have finished.

        The addresses are valid until the next batch is asked for. Raises ReadError when the drive fails; the
        cache stays usable.
        """
        self._settle()
        self.policy.step(layer, routed, weights)
        hits: list[tuple[int, Addresses]] = []
        missing: dict[ExpertId, int] = {}  # -> place in `routed`
        for place, expert in enumerate(routed):
            key = (layer, expert)
            resident = self._evictable.pop(key, None)
            if resident is None:
                missing[key] = place
            else:
                self._held[key] = resident
                hits.append((place, resident.addresses))
        self.counters.hits += len(hits)
        self.counters.misses += len(missing)
        try:
            if missing:
                self._make_room(len(missing))
                for key in missing:
                    self._submit(key)
            if hits:
                yield hits
            while self._in_flight:
                arrived = [self._arrival()]
                while (completion := self._arrived_already()) is not None:
                    arrived.append(self._take(completion))
                yield [(missing[key], self._held[key].addresses) for key in arrived]
        finally:
            self._settle()

    def observe(
        self, layer: int, routed: Sequence[Sequence[int]], weights: Sequence[Sequence[float]]
    ) -> None:
        """Show the policy the tokens of a prefill chunk, in order: routed and weights are [T, K]."""
        for ids, w in zip(routed, weights, strict=True):
            self.policy.step(layer, ids, w)

    def stream(self, layer: int, experts: Sequence[int]) -> Iterator[tuple[int, Addresses]]:
        """One prefill event: yield every expert of a chunk once, with its addresses, reading ahead.

        `experts`: each once, those that the chunk's last tokens use at the end. These stay; the others pass
        through slots of this same layer, so that a long prompt does not wash out what decoding will need
        elsewhere. The layer ends with its share of the slots, or what it had before if that was more.
        """
        self._settle()
        share = max(self.slots // len(self._layer_residents), self._layer_residents[layer])
        keep = {(layer, expert) for expert in experts[max(0, len(experts) - share) :]}
        keys = [(layer, expert) for expert in experts]
        ready = deque(key for key in keys if key in self._evictable)
        pending = deque(key for key in keys if key not in self._evictable)
        for key in ready:
            self._held[key] = self._evictable.pop(key)
        self.counters.hits += len(ready)
        self.counters.misses += len(pending)
        kept: list[ExpertId] = []  # served and to stay: held until the end
        spare = {key for key in self._layer_keys[layer] if key in self._evictable}  # of this layer, may go
        try:
            while ready or pending or self._in_flight:
                while pending and self._room_for_stream(layer, share, spare, [] if ready else kept):
                    self._submit(pending.popleft())
                key = ready.popleft() if ready else self._arrival()
                yield key[1], self._held[key].addresses
                if key in keep:
                    kept.append(key)
                else:
                    self._evictable[key] = self._held.pop(key)
                    spare.add(key)
            surplus = min(self._layer_residents[layer] - share, len(spare))
            for victim in self.policy.victims(spare, surplus) if surplus > 0 else ():
                self._evict(victim)
        finally:
            self._settle()

    def evict_all(self) -> None:
        """Empty every slot, for a cold start; the policy keeps what it learnt."""
        self._settle()
        for key in self.policy.victims(self._evictable.keys(), len(self._evictable)):
            self._evict(key)

    def close(self) -> None:
        """Stop reading and give the memory back."""
        self.evict_all()
        self._reads.close()
        self._buffers.clear()
        self._reader.close()

    def _room_for_stream(self, layer: int, share: int, spare: set[ExpertId], kept: list[ExpertId]) -> bool:
        """See that a slot is free for the next read of a prefill layer; False: not before another expert is
        served.

        A layer below its share takes slots from anywhere. Above, it reuses its own `spare` ones, and takes a
        few more from others only to keep reads under way. `kept` is given up when there is no other way on.
        """
        if self._free:
            return True
        below_share = self._layer_residents[layer] + len(self._in_flight) < share
        if spare and not below_share:
            victim = self.policy.victims(spare, 1)[0]
            spare.discard(victim)
            self._evict(victim)
        elif self._evictable and (below_share or len(self._in_flight) < self._prefill_reads_ahead):
            self._make_room(1)
            spare.intersection_update(self._evictable)
        elif kept and not self._in_flight:  # a budget of a few slots
            key = kept.pop(0)
            self._evictable[key] = self._held.pop(key)
            self._evict(*self.policy.victims([key], 1))
        return bool(self._free)

    def _make_room(self, slots: int) -> None:
        """Evict until `slots` are free. What the current event needs is held, so it cannot be chosen."""
        lacking = slots - len(self._free)
        if lacking > 0:
            for victim in self.policy.victims(self._evictable.keys(), lacking):
                self._evict(victim)

    def _evict(self, key: ExpertId) -> None:
        slot = self._evictable.pop(key).slot
        self._layer_residents[key[0]] -= 1
        self._reader.release(self._plans[key])
        self._free.append(slot)

    def _submit(self, key: ExpertId) -> None:
        slot = self._free.pop()
        self._in_flight[key] = slot
        self._reads.submit(key, self._plans[key], self._buffers[slot], self._done)

    def _arrival(self) -> ExpertId:
        """Wait for the next read; its expert becomes resident and held."""
        begin = time.perf_counter()
        completion = self._done.get()
        while completion.tag not in self._in_flight:  # a read that `_settle` had given up
            completion = self._done.get()
        self.counters.stall_s += time.perf_counter() - begin
        return self._take(completion)

    def _arrived_already(self) -> Completion | None:
        """A read of this event that has finished meanwhile, if there is one."""
        try:
            while True:
                completion = self._done.get_nowait()
                if completion.tag in self._in_flight:
                    return completion
        except queue.Empty:
            return None

    def _take(self, completion: Completion) -> ExpertId:
        key: ExpertId = completion.tag
        slot = self._in_flight.pop(key)
        self.counters.bytes_read += completion.read_bytes
        self.counters.read_s = self._reads.busy_s
        if completion.views is None:
            self._free.append(slot)
            assert completion.error is not None
            raise completion.error
        self._held[key] = _Resident(slot, _addresses(completion.views))
        self._layer_residents[key[0]] += 1
        self.policy.inserted(key)
        return key

    def _settle(self) -> None:
        """End an event, also one that an error or Ctrl-C cut short: no read in flight, nothing held."""
        interrupt: KeyboardInterrupt | None = None
        while self._in_flight:  # a slot must not be reused while a read still writes to it
            try:
                completion = self._done.get(timeout=LOST_READ_S)
                if completion.tag in self._in_flight:
                    self._take(completion)
            except queue.Empty:
                self._in_flight.clear()  # their slots are lost, which is better than to wait for ever
            except KeyboardInterrupt as error:
                interrupt = error
            except Exception:
                continue  # the event's first error is on its way up; this expert is just not resident
        self._evictable.update(self._held)
        self._held.clear()
        if interrupt is not None:
            raise interrupt


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
