"""The VRAM tier over the RAM tier, against a scripted drive and copies that happen as late as they may.

`LazyEngine` has the three queues of a GPU (copies in, copies out, compute) and runs an operation only when
somebody waits for it, or at random: whatever is not ordered by the code under test goes wrong here.
"""

import ctypes
import random
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_expert_cache import EXPERT_BYTES, MATRIX_BYTES, check_bytes
from test_prefetch import PatientDrive

from cache_policies.policy import Geometry
from cache_policies.registry import POLICY_NAMES, make_policy
from cache_policies.replay import replay, serving_order
from cache_policies.routing_trace import RoutingTrace
from flashmoe.config import load_model_config
from flashmoe.copy_engine import CudaCopyEngine, HostCopyEngine, Ticket
from flashmoe.expert_cache import ExpertCache
from flashmoe.expert_placement import Placement
from flashmoe.vram_cache import ABSENT, PROMOTED_SHARE, VramCache
from flashmoe.weights import CheckpointLayout
from kernels.expert_ffn import Addresses
from kernels.expert_slots import slot_layout
from storage.checkpoint import open_checkpoint
from storage.expert_reader import ReadPlan, Run, open_reader, plan_read
from storage.read_queue import ReadQueue
from storage.storage_errors import ReadError

LAYERS, EXPERTS, TOP_K = 3, 8, 2
LAYOUT = slot_layout("f32", 4, 2)
assert LAYOUT.bytes == EXPERT_BYTES


@dataclass
class Queue:
    """Work of one stream: each piece, once whatever `awaits` names has been done."""

    work: deque[tuple[Callable[[], None], "Queue | None", int]] = field(default_factory=deque)
    asked: int = 0
    done: int = 0

    def add(self, deed: Callable[[], None], awaits: "Queue | None" = None, count: int = 0) -> None:
        self.work.append((deed, awaits, count))
        self.asked += 1

    def run(self, until: int) -> None:
        while self.done < until:
            deed, awaits, count = self.work.popleft()
            if awaits is not None:
                awaits.run(count)
            deed()
            self.done += 1


class LazyEngine(HostCopyEngine):
    """Copies when they are waited for, or at random."""

    def __init__(self, slots: int, seed: int = 0) -> None:
        super().__init__(torch.zeros(slots, 128, dtype=torch.uint8), LAYOUT)
        self.ins, self.outs, self.compute = Queue(), Queue(), Queue()
        self.random = random.Random(seed)
        self.pinned: list[int] = []

    def copy_in(self, slot: int, addresses: Addresses) -> None:
        self.ins.add(lambda: HostCopyEngine.copy_in(self, slot, addresses))
        self._dawdle()

    def copy_out(self, slot: int, addresses: Addresses) -> None:
        self.outs.add(lambda: HostCopyEngine.copy_out(self, slot, addresses))
        self._dawdle()

    def mark(self) -> Ticket:
        return self.ins.asked

    def mark_out(self) -> Ticket:
        return -self.outs.asked

    def is_done(self, ticket: Ticket) -> bool:
        return self.ins.done >= ticket and self.outs.done >= -ticket

    def wait(self, ticket: Ticket) -> None:
        self._queue(ticket).run(abs(ticket))

    def compute_waits(self, ticket: Ticket) -> None:
        self.compute.add(_nothing, self._queue(ticket), abs(ticket))

    def copies_wait_for_compute(self) -> None:
        self.ins.add(_nothing, self.compute, self.compute.asked)

    def copies_in_wait(self, ticket: Ticket) -> None:
        assert ticket <= 0
        self.ins.add(_nothing, self.outs, -ticket)

    def copies_out_wait(self, ticket: Ticket) -> None:
        assert ticket >= 0
        self.outs.add(_nothing, self.ins, ticket)

    def pin(self, address: int, nbytes: int) -> None:
        self.pinned.append(address)

    def unpin(self, address: int) -> None:
        self.pinned.remove(address)

    def check(self, slot: int, number: float) -> None:
        below = slot - self.slots
        at = self._arena[slot].data_ptr() if below < 0 else self.pinned[0] + 4096 * below
        assert set((ctypes.c_float * (EXPERT_BYTES // 4)).from_address(at)) == {number}

    def compute_with(self, slot: int, number: float) -> None:
        """Check the slot's bytes when the GPU gets there."""
        self.compute.add(lambda: self.check(slot, number))
        self._dawdle()

    def finish_computing(self) -> None:
        self.compute.run(self.compute.asked)

    def _queue(self, ticket: Ticket) -> Queue:
        return self.ins if ticket >= 0 else self.outs

    def _dawdle(self) -> None:
        for queue in (self.ins, self.outs, self.compute):
            if self.random.random() < 0.3:
                queue.run(self.random.randint(queue.done, queue.asked))


def _nothing() -> None:
    pass


class RealEngine(CudaCopyEngine):
    """A GPU's own timing."""

    def __init__(self, slots: int) -> None:
        super().__init__(torch.zeros(slots, 128, dtype=torch.uint8, device="cuda"), LAYOUT)
        self.wrong = torch.zeros(1, dtype=torch.int64, device="cuda")

    def compute_with(self, slot: int, number: float) -> None:
        self.wrong += (self._arena[slot, :EXPERT_BYTES].view(torch.float32) != number).sum()

    def finish_computing(self) -> None:
        assert self.wrong.item() == 0


@dataclass
class Tiers:
    """A VRAM cache, what is below it, and how to run events as a decoder does."""

    cache: VramCache
    drive: PatientDrive
    engine: LazyEngine | RealEngine
    table: np.ndarray
    after_error: bool = False  # an event was cut short, and none has begun since
    unbooked: list[tuple[Sequence[int], Sequence[float]]] | None = None  # of the last whole token

    def decode(self, layer: int, routed: Sequence[int], token: int = -1) -> list[int]:
        """One token's event; the bytes of every expert are checked when the GPU computes it. Returns those
        that the CPU computed."""
        self.engine.finish_computing()  # what the cache may rely on
        weights = [1.0] * len(routed)
        if self.cache.all_resident(layer, routed):
            self._compute(layer, [(e, int(self.table[layer, e])) for e in routed])
            self.cache.hit_event(layer, routed, weights, None, token)
            return []
        found = [int(self.table[layer, e]) for e in routed]
        if self.after_error:
            found, self.after_error = [ABSENT] * len(routed), False  # `late` then has them all
        event = self.cache.fetch(layer, routed, weights, None, token)
        self._compute(layer, [(e, s) for e, s in zip(routed, found, strict=True) if s != ABSENT])
        for place, addresses in event.cpu:
            check_bytes(layer, routed[place], addresses)
        late = event.late()
        self._compute(layer, [(routed[place], slot) for place, slot in late])
        on_cpu = {place for place, _ in event.cpu}
        served = [*on_cpu, *(place for place, _ in late), *(p for p, slot in enumerate(found) if slot >= 0)]
        assert sorted(served) == list(range(len(routed)))
        assert all(self.table[layer, e] >= 0 for p, e in enumerate(routed) if p not in on_cpu)
        event.settle()
        return [routed[place] for place in sorted(on_cpu)]

    def token(self, routes: Sequence[Sequence[int]], number: int = 0) -> None:
        """One token of all layers, launched whole: the GPU looks up the table as it is now, and goes on layer
        by layer from where an expert was missing. What ran before is booked meanwhile, and promoted."""
        cache, ones = self.cache, [[1.0] * len(routed) for routed in routes]
        seen, first = self.table.copy(), 0
        while first < LAYERS and all(seen[first, e] >= 0 for e in routes[first]) and not self.after_error:
            self._compute(first, [(e, int(seen[first, e])) for e in routes[first]])
            first += 1
        if self.unbooked is not None:
            cache.hit_events(number, range(len(self.unbooked)), *([*zip(*self.unbooked, strict=True)]))
        cache.promote()
        self.engine.finish_computing()
        self.unbooked = [*zip(routes, ones, strict=True)][:first]
        if first < LAYERS:
            cache.hit_events(number, range(first), routes[:first], ones[:first])
            self.unbooked = None
            for layer in range(first, LAYERS):
                self.decode(layer, routes[layer], number)
        self.engine.finish_computing()
        cache.commit()

    def tokens(self, routes: Sequence[Sequence[Sequence[int]]]) -> None:
        """A token of each of several sequences, layer by layer: routes [layers][tokens][K]."""
        cache = self.cache
        if self.unbooked is not None:
            cache.hit_events(0, range(len(self.unbooked)), *([*zip(*self.unbooked, strict=True)]))
            self.unbooked = None
        cache.promote()
        for layer, of_tokens in enumerate(routes):
            self.engine.finish_computing()
            self._together(layer, of_tokens, sorted({e for routed in of_tokens for e in routed}))
        self.engine.finish_computing()
        cache.commit()

    def _together(self, layer: int, routes: Sequence[Sequence[int]], experts: list[int]) -> None:
        cache = self.cache
        if cache.all_resident(layer, experts) and not self.after_error:
            self._compute(layer, [(e, int(self.table[layer, e])) for e in experts])
            for routed in routes:
                cache.hit_event(layer, routed, [1.0] * len(routed))
        elif cache.can_fetch_together(len(experts)):
            self.after_error = False
            seen = [(routed, [1.0] * len(routed), None, -1) for routed in routes]
            event = cache.fetch_together(layer, experts, seen)
            event.late()
            self._compute(layer, [(e, int(self.table[layer, e])) for e in experts])
            event.settle()
        else:
            self.prefill(layer, experts)

    def prefill(self, layer: int, experts: Sequence[int]) -> list[int]:
        """A chunk whose tokens use one expert each, in this order."""
        self.cache.observe(layer, [[e] for e in experts], [[1.0]] * len(experts))
        served = []
        for group in self.cache.stream(layer, experts):
            assert len({slot for _, slot in group}) == len(group)
            self._compute(layer, group)
            served += [expert for expert, _ in group]
        return served

    def _compute(self, layer: int, experts: Sequence[tuple[int, int]]) -> None:
        for expert, slot in experts:
            self.engine.compute_with(slot, 100.0 * layer + expert)

    def check(self) -> None:
        """Between events: ids, slots and table agree, in both tiers."""
        vram, ram = self.cache, self.cache.ram
        vram.commit()
        vram._end_event()
        assert vram.resident == vram._slots.keys()
        listed = {key: slot for key, slot in vram._slots.items() if key not in vram._unlisted}
        if vram.in_place:
            listed = {key: vram._first + ram.slot(key) for key in ram._residents} | listed
        assert {tuple(key): self.table[tuple(key)] for key in np.argwhere(self.table >= 0)} == listed
        assert all(vram._ready[layer] == {e for la, e in listed if la == layer} for layer in range(LAYERS))
        used = [*vram._slots.values(), *(slot for slot, _ in vram._staged.values()), *vram._copies.free]
        assert sorted(used) == list(range(vram.slots))
        assert not ram._in_flight and not vram._copies.falling
        own = ram.lower.residents
        assert not own & vram.resident and len(own) <= ram.slots - ram.lower.spare
        assert own | ram._copies.keys() == ram._residents.keys() and ram._copies.keys() <= vram.resident
        others = (*ram._guesses.values(), *ram._staged.values(), *ram._cancelled)
        used = [*(r.slot for r in (*ram._residents.values(), *others)), *ram._free]
        assert sorted(used) == list(range(ram.slots))
        self.engine.finish_computing()
        self.engine.wait(self.engine.mark())
        self.engine.wait(self.engine.mark_out())
        for (layer, expert), slot in vram._slots.items():
            self.engine.compute_with(slot, 100.0 * layer + expert)
        self.engine.finish_computing()
        for (layer, expert), resident in ram._residents.items():
            check_bytes(layer, expert, resident.addresses)


def make_tiers(
    vram: int, ram: int, policy: str = "lru", below: str | None = None, spare: int = 3, ram_spare: int = 0,
    placement: Placement | None = None, seed: int = 0, per_layer: bool = False, real: bool = False,
    in_place: bool = False,
) -> Tiers:  # fmt: skip
    """`vram`, `ram`: capacities, in all or with `per_layer` of each layer."""
    drive = PatientDrive()
    ids = [(layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS)]
    parts = tuple((i * MATRIX_BYTES, MATRIX_BYTES) for i in range(3))
    plan = ReadPlan((Run(0, 0, EXPERT_BYTES, 0),), parts, 4096, EXPERT_BYTES, EXPERT_BYTES)
    geometry = Geometry(LAYERS, EXPERTS, TOP_K, ram, per_layer)
    lower = ExpertCache(
        dict.fromkeys(ids, plan), drive, drive, make_policy(below or policy, geometry), geometry, ram_spare  # type: ignore[arg-type]
    )
    geometry = Geometry(LAYERS, EXPERTS, TOP_K, vram, per_layer)
    slots = vram * (LAYERS if per_layer else 1) + spare
    engine = RealEngine(slots) if real else LazyEngine(slots, seed)
    table = np.zeros((LAYERS, EXPERTS), dtype=np.int32)
    upper = make_policy(policy, geometry)
    cache = VramCache(lower, upper, geometry, engine, table, placement, spare, in_place)
    return Tiers(cache, drive, engine, table)


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("policy", POLICY_NAMES)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_experts_computed_in_place_are_the_right_ones_too(
    policy: str, per_layer: bool, data: st.DataObject
) -> None:
    of = 8 if per_layer else 24
    tiers = make_tiers(
        data.draw(st.integers(3, of), label="vram"), data.draw(st.integers(3, of), label="ram"), policy,
        data.draw(st.sampled_from(("lru", "lfu", "sieve"))), data.draw(st.integers(1, 4)),
        data.draw(st.integers(0, 3)), seed=data.draw(st.integers(0, 9)), per_layer=per_layer, in_place=True,
    )  # fmt: skip
    draw = data.draw(st.randoms(use_true_random=False))
    for _ in range(data.draw(st.integers(1, 12))):
        layer = draw.randrange(LAYERS)
        few = draw.sample(range(EXPERTS), 4)
        tiers.drive.broken = {(layer, few[0])} if draw.random() < 0.2 else set()
        try:
            if draw.random() < 0.2:
                chunk = draw.sample(range(EXPERTS), draw.randint(1, EXPERTS))
                assert sorted(tiers.prefill(layer, chunk)) == sorted(chunk)
            else:
                tiers.cache.prefetch([(layer, expert) for expert in few], 2)
                tiers.drive.arrive()
                if draw.random() < 0.5:
                    tiers.token([draw.sample(few, draw.randint(1, 3)) for _ in range(LAYERS)])
                else:
                    few = draw.sample(range(EXPERTS), 6)
                    tiers.tokens([[draw.sample(few, 2) for _ in range(3)] for _ in range(LAYERS)])
        except ReadError:
            assert tiers.drive.broken
            tiers.unbooked = None
        tiers.check()
    tiers.cache.close()


def test_a_miss_comes_through_ram_and_a_hit_needs_nobody() -> None:
    tiers = make_tiers(4, 24)
    tiers.decode(0, [1, 2])
    tiers.decode(0, [2, 1])
    c = tiers.cache.counters
    assert (c.hits, c.misses, c.ram_hits, c.bytes_in, c.bytes_out) == (2, 2, 0, 2 * EXPERT_BYTES, 0)
    assert tiers.drive.asked == [(0, 1), (0, 2)] and c.bytes_read == 2 * EXPERT_BYTES
    tiers.check()


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("policy", POLICY_NAMES)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_mix_of_events_computes_with_the_right_bytes_within_the_slots(
    policy: str, per_layer: bool, data: st.DataObject
) -> None:
    of = 8 if per_layer else 24
    tiers = make_tiers(
        data.draw(st.integers(3, of), label="vram"), data.draw(st.integers(3, of), label="ram"), policy,
        data.draw(st.sampled_from(("lru", "lfu", "sieve"))), data.draw(st.integers(1, 4)),
        data.draw(st.integers(0, 3)), seed=data.draw(st.integers(0, 9)), per_layer=per_layer,
        placement=data.draw(st.sampled_from((None, Placement("always", 1, 1), Placement("auto", 1, 1, 0.5)))),
    )  # fmt: skip
    for _ in range(data.draw(st.integers(1, 14))):
        layer = data.draw(st.integers(0, 2))
        routed = data.draw(st.lists(st.integers(0, 7), min_size=1, max_size=3, unique=True))
        tiers.drive.broken = {(layer, routed[0])} if data.draw(st.integers(0, 6)) == 0 else set()
        try:
            match data.draw(st.integers(0, 3)):
                case 0:
                    chunk = data.draw(st.lists(st.integers(0, 7), min_size=1, unique=True))
                    assert sorted(tiers.prefill(layer, chunk)) == sorted(chunk)
                case 1:
                    tiers.cache.prefetch([(layer, e) for e in routed], 2)
                    tiers.drive.arrive()
                case _:
                    tiers.decode(layer, routed)
        except ReadError:
            assert tiers.drive.broken
            tiers.drive.broken = set()
            tiers.decode(layer, routed)
        tiers.check()
    tiers.cache.close()
    assert isinstance(tiers.engine, LazyEngine) and tiers.engine.pinned == []


def serve(tiers: Tiers, seed: int, events: int = 60) -> None:
    """A trace in which a few experts of each layer are used often, and now and then a prompt."""
    draw = random.Random(seed)
    for event in range(events):
        layer = event % LAYERS
        weights = [1 / (1 + (expert - layer) % EXPERTS) for expert in range(EXPERTS)]
        routed = list(dict.fromkeys(draw.choices(range(EXPERTS), weights, k=2)))
        if event % 17 == 16:
            tiers.prefill(layer, draw.sample(range(EXPERTS), 5))
        else:
            tiers.decode(layer, routed)


def who_is_where(tiers: Tiers) -> tuple[frozenset[tuple[int, int]], frozenset[tuple[int, int]], int, int]:
    c = tiers.cache.counters
    return tiers.cache.resident, tiers.cache.ram.lower.residents, c.hits, c.misses


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_who_is_where_does_not_depend_on_when_copies_and_reads_end(policy: str) -> None:
    found = set()
    for seed in range(4):
        tiers = make_tiers(7, 9, policy, ram_spare=2, seed=seed)
        tiers.drive.last_in_first_out = seed % 2 == 1
        serve(tiers, 1)
        found.add(who_is_where(tiers))
    assert len(found) == 1


@pytest.mark.parametrize("policy", ["lru", "lfu-aged", "sieve"])
def test_guesses_change_nothing_but_the_time(policy: str) -> None:
    plain, guessing = (make_tiers(7, 9, policy, ram_spare=2, seed=seed) for seed in range(2))
    serve(plain, 3)
    draw = random.Random(5)
    decode = guessing.decode

    def with_guesses(layer: int, routed: Sequence[int], token: int = -1) -> list[int]:
        guesses = [(layer, draw.choice(routed)), (layer, draw.randrange(EXPERTS)), ((layer + 1) % LAYERS, 0)]
        guessing.cache.prefetch(guesses, draw.randrange(4))
        guessing.drive.begun = draw.random() < 0.5
        if draw.random() < 0.5:
            guessing.drive.arrive()
        return decode(layer, routed, token)

    guessing.decode = with_guesses  # type: ignore[method-assign]
    serve(guessing, 3)
    assert who_is_where(guessing) == who_is_where(plain)
    c = guessing.cache.counters
    assert c.prefetch_hits + c.prefetch_late > 3 and c.prefetch_wasted > 0
    assert guessing.cache.ram.counters.prefetch_issued > 3
    guessing.check()


@pytest.mark.parametrize("policy", POLICY_NAMES)
@pytest.mark.parametrize(("vram", "ram", "spare"), [(2, 24, 1), (5, 9, 3), (12, 12, 2), (24, 3, 0)])
def test_hits_are_those_of_a_replay(policy: str, vram: int, ram: int, spare: int) -> None:
    rows = np.random.default_rng(0).permuted(np.tile(np.arange(EXPERTS), (60, LAYERS, 1)), axis=2)[:, :, :2]
    forwards = np.array([0, 20, *range(21, 61)])
    trace = RoutingTrace("random", EXPERTS, rows, np.array([0, 60]), forwards, ("random",))
    geometry = Geometry(LAYERS, EXPERTS, TOP_K, vram)
    counts = replay(trace, make_policy(policy, geometry), geometry, spare)
    tiers = make_tiers(vram, ram, policy, "lru", spare)
    for begin, end, is_chunk in trace.spans():
        for layer in range(LAYERS):
            if is_chunk:
                routed = rows[begin:end, layer]
                tiers.cache.observe(layer, routed.tolist(), [[1.0] * 2] * (end - begin))
                for group in tiers.cache.stream(layer, serving_order(routed)):
                    tiers._compute(layer, group)
        for token in range(begin, end if not is_chunk else begin):
            for layer in range(LAYERS):
                tiers.decode(layer, rows[token, layer].tolist())
    c = tiers.cache.counters
    assert (c.hits, c.misses) == (counts.hits, counts.misses)
    tiers.check()


@pytest.mark.parametrize("spare", [1, 3])
def test_two_tiers_that_hold_all_experts_together_read_each_of_them_once(spare: int) -> None:
    tiers = make_tiers(10, 14, spare=spare)
    for layer in range(LAYERS):
        for expert in range(0, EXPERTS, 2):
            tiers.decode(layer, [expert, expert + 1])
    asked = len(tiers.drive.asked)
    serve(tiers, 4)
    assert len(tiers.drive.asked) == asked == 24
    assert tiers.cache.counters.bytes_out > 0
    tiers.check()


def test_nothing_is_copied_out_while_ram_has_everything() -> None:
    tiers = make_tiers(6, 24)
    serve(tiers, 5)
    assert tiers.cache.counters.bytes_out == 0 and len(tiers.drive.asked) == len(set(tiers.drive.asked)) <= 24
    assert tiers.cache.ram._residents.keys() == tiers.cache.resident | tiers.cache.ram.lower.residents


def test_what_falls_keeps_its_bytes_and_is_not_read_again() -> None:
    tiers = make_tiers(2, 2)
    tiers.decode(0, [0, 1])
    tiers.decode(0, [2, 3])  # read into the only two slots, where 0 and 1 had their copies
    assert tiers.cache.counters.bytes_out == 2 * EXPERT_BYTES
    tiers.decode(0, [0, 1])
    assert len(tiers.drive.asked) == 4
    tiers.check()


def test_ram_keeps_what_its_policy_wants_and_not_all_that_falls() -> None:
    """LFU below LRU: experts used once push nobody out of RAM who is used often."""
    tiers = make_tiers(2, 17, "lru", "lfu")
    often = [(layer, expert) for layer in (0, 1) for expert in range(EXPERTS)]
    for key in often * 3:
        tiers.decode(key[0], [key[1]])
    for expert in range(EXPERTS):
        tiers.decode(2, [expert])
        tiers.check()
    assert set(often) <= tiers.cache.ram.lower.residents


def test_a_right_guess_needs_no_copy_when_its_layer_asks_and_a_wrong_one_is_dropped() -> None:
    tiers = make_tiers(4, 24)
    tiers.prefill(1, range(EXPERTS))
    resident = tiers.cache.resident
    absent = [expert for expert in range(EXPERTS) if (1, expert) not in resident]
    tiers.cache.prefetch([(1, absent[0]), (1, absent[1]), (0, 5)], 3)
    assert tiers.cache.resident == resident and not tiers.cache.all_resident(1, [absent[0]])
    assert list(tiers.drive.waiting) == []  # no slot of RAM is for guesses
    copied = tiers.cache.counters.bytes_in
    tiers.decode(1, [absent[0]])
    c = tiers.cache.counters
    assert c.bytes_in == copied and (c.prefetch_issued, c.prefetch_wasted) == (2, 1)
    assert c.prefetch_hits + c.prefetch_late == 1 and (1, absent[0]) in tiers.cache.resident
    tiers.check()


def test_guesses_of_an_event_that_goes_on_wait_for_its_end() -> None:
    tiers = make_tiers(4, 24)
    tiers.prefill(0, range(EXPERTS))
    event = tiers.cache.fetch(1, [1, 2], [1.0, 1.0])
    tiers.cache.prefetch([(0, expert) for expert in range(EXPERTS)], 2)
    assert not tiers.cache._staged
    event.late()
    event.settle()
    assert len(tiers.cache._staged) == 2


def test_the_cpu_computes_what_the_cost_model_says_and_vram_gets_it_when_pcie_has_been_idle() -> None:
    tiers = make_tiers(4, 24, placement=Placement("always", copy_s=2.0, cpu_s=1.0, round_trip_s=0.0))
    tiers.prefill(0, range(EXPERTS))
    absent = [expert for expert in range(EXPERTS) if (0, expert) not in tiers.cache.resident]
    assert tiers.decode(0, absent[:1]) == absent[:1]
    assert (0, absent[0]) not in tiers.cache.resident  # one second idle, a copy takes two
    assert tiers.decode(0, absent[:1]) == absent[:1]
    assert (0, absent[0]) in tiers.cache.resident
    assert tiers.decode(0, absent[:1]) == []  # not in the table yet, so the event brings it there
    assert tiers.cache.all_resident(0, absent[:1])
    c = tiers.cache.counters
    assert (c.cpu_experts, c.hits) == (2, 1)
    tiers.check()


@pytest.mark.parametrize("policy", POLICY_NAMES)
@pytest.mark.parametrize("guilty", [0, 1])
def test_a_drive_error_leaves_both_tiers_in_order(policy: str, guilty: int) -> None:
    tiers = make_tiers(4, 5, policy, ram_spare=1)
    serve(tiers, 6, 40)
    known = tiers.cache.resident | tiers.cache.ram.lower.residents
    lacking = [expert for expert in range(EXPERTS) if (2, expert) not in known]
    tiers.drive.broken = {(2, lacking[guilty])}
    with pytest.raises(ReadError):
        tiers.decode(2, lacking[:2])
    tiers.check()
    with pytest.raises(ReadError):
        tiers.prefill(2, range(EXPERTS))
    tiers.check()
    tiers.drive.broken = set()
    serve(tiers, 7)
    tiers.check()


@pytest.mark.parametrize("where", ["fetch", "late", "group"])
def test_an_event_given_up_half_way_is_put_in_order_by_the_next(where: str) -> None:
    tiers = make_tiers(4, 5)
    serve(tiers, 8, 30)
    absent = [expert for expert in range(EXPERTS) if (1, expert) not in tiers.cache.resident]
    if where == "group":
        groups = tiers.cache.stream(1, range(EXPERTS))
        next(groups)
        next(groups)
    else:
        event = tiers.cache.fetch(1, absent[:2], [1.0, 1.0])
        if where == "late":
            event.late()
    assert not tiers.cache.all_resident(0, [])
    event = tiers.cache.fetch(1, absent[:2], [1.0, 1.0])
    assert sorted(place for place, _ in event.late()) == [0, 1]  # also what the table has by now
    event.settle()
    tiers.check()


def serve_tokens(tiers: Tiers, seed: int, tokens: int = 25) -> None:
    """Whole tokens, and now and then a prompt's layer."""
    draw = random.Random(seed)
    for token in range(tokens):
        tiers.token([draw.sample(range(EXPERTS), 2) for _ in range(LAYERS)], token)
        if token % 9 == 8:
            tiers.prefill(token % LAYERS, draw.sample(range(EXPERTS), 5))


@pytest.mark.parametrize("policy", POLICY_NAMES)
@pytest.mark.parametrize("ram", [9, 24])
def test_promotions_do_not_depend_on_when_copies_and_reads_end(policy: str, ram: int) -> None:
    found = set()
    for seed in range(4):
        tiers = make_tiers(7, ram, policy, ram_spare=2, seed=seed, in_place=True)
        tiers.drive.last_in_first_out = seed % 2 == 1
        serve_tokens(tiers, 1)
        tiers.check()
        found.add((*who_is_where(tiers), tiers.cache.counters.promoted))
    assert len(found) == 1 and tiers.cache.counters.promoted > 0


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_what_several_sequences_bring_does_not_depend_on_when_copies_and_reads_end(policy: str) -> None:
    found = set()
    for seed in range(4):
        tiers = make_tiers(7, 9, policy, ram_spare=2, seed=seed, in_place=True)
        tiers.drive.last_in_first_out = seed % 2 == 1
        draw = random.Random(1)
        for _ in range(20):
            tiers.tokens([[draw.sample(range(EXPERTS), 2) for _ in range(3)] for _ in range(LAYERS)])
            tiers.check()
        found.add((*who_is_where(tiers), tiers.cache.counters.promoted))
    assert len(found) == 1 and tiers.cache.counters.promoted > 0


def test_what_several_tokens_need_is_read_once_and_seen_by_the_policy_token_by_token() -> None:
    tiers = make_tiers(3, 24, in_place=True)
    steps = []
    step = tiers.cache.policy.step
    tiers.cache.policy.step = lambda *seen: (steps.append(seen[:2]), step(*seen))[1]  # type: ignore[method-assign]
    tiers.tokens([[[0, 1], [1, 2]], [[3]], [[4], [4]]])
    assert tiers.drive.asked == [(0, 0), (0, 1), (0, 2), (1, 3), (2, 4)]
    assert steps == [(0, [0, 1]), (0, [1, 2]), (1, [3]), (2, [4]), (2, [4])]
    c = tiers.cache.counters
    assert (c.misses, c.in_place, c.hits) == (5, 5, 0)
    tiers.check()


def test_a_free_vram_is_filled_at_once_and_a_full_one_bit_by_bit() -> None:
    tiers = make_tiers(6, 24, spare=4, in_place=True)
    routes = [[0, 1], [0, 1], [0, 1]]
    tiers.token(routes)  # read from the drive
    tiers.token(routes)
    assert tiers.cache.resident == {(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)}
    for token in range(20):
        tiers.token([[token % EXPERTS, (token + 1) % EXPERTS]] * LAYERS)
    tiers.check()
    c = tiers.cache.counters
    assert 0.2 * c.in_place < c.promoted - 6 <= PROMOTED_SHARE * c.in_place


def test_what_is_promoted_is_seen_when_it_is_committed_and_not_before() -> None:
    tiers = make_tiers(3, 24, in_place=True)
    tiers.token([[0, 1], [0, 1], [0, 1]])
    before = tiers.table.copy()
    tiers.cache.promote()
    assert (tiers.table == before).all() and (before >= tiers.cache._first).sum() == 6
    tiers.cache.commit()
    assert ((tiers.table >= 0) & (tiers.table < tiers.cache._first)).sum() == 3
    c = tiers.cache.counters
    assert (c.misses, c.in_place) == (6, 6)
    assert c.bytes_in == (6 + 3) * EXPERT_BYTES
    tiers.check()


@pytest.mark.parametrize(("vram", "ram"), [(3, 4), (6, 7), (5, 24)])
def test_a_checkpoints_own_bytes_come_through_real_reads(tiny_model: Path, vram: int, ram: int) -> None:
    config = load_model_config(tiny_model)
    layout = CheckpointLayout(open_checkpoint(tiny_model), config)
    shards, shard_bytes = layout.checkpoint.shards, layout.checkpoint.shard_bytes
    plans = {key: plan_read(expert.extents, shard_bytes) for key, expert in layout.experts.items()}
    reader = open_reader("buffered", shards, shard_bytes)
    geometry = Geometry(LAYERS, EXPERTS, TOP_K, ram)
    below = ExpertCache(plans, reader, ReadQueue(reader), make_policy("lru", geometry), geometry, 2)
    slot = slot_layout("bf16", config.hidden_size, config.moe_intermediate_size)
    arena = torch.zeros(vram + 2, slot.bytes, dtype=torch.uint8)
    geometry, table = Geometry(LAYERS, EXPERTS, TOP_K, vram), np.zeros((LAYERS, EXPERTS), dtype=np.int32)
    engine = HostCopyEngine(arena, slot)
    cache = VramCache(below, make_policy("lru", geometry), geometry, engine, table, None, 2)
    weights = load_file(tiny_model / "model.safetensors")
    draw = random.Random(0)
    for event in range(60):
        layer, routed = event % LAYERS, draw.sample(range(EXPERTS), 2)
        if not cache.all_resident(layer, routed):
            miss = cache.fetch(layer, routed, [0.5, 0.5])
            cache.prefetch([((layer + 1) % LAYERS, draw.randrange(EXPERTS))], 1)
            miss.late()
            miss.settle()
        for expert in routed:
            name = f"model.layers.{layer}.block_sparse_moe.experts.{expert}."
            parts = [weights[f"{name}{part}.weight"].flatten() for part in ("w1", "w3", "w2")]
            assert torch.equal(arena[table[layer, expert]], torch.cat(parts).view(torch.uint8))
    cache.close()


@pytest.mark.gpu
@pytest.mark.parametrize(("vram", "ram"), [(4, 5), (7, 9), (10, 14), (4, 24)])
def test_a_gpu_computes_with_the_right_bytes(vram: int, ram: int) -> None:
    tiers = make_tiers(vram, ram, "lfu-aged", placement=Placement("auto", 1.0, 1.0, 0.0), real=True)
    for seed in range(5):
        serve(tiers, seed)
        tiers.check()
    tiers.cache.close()


LINES = ("flashmoe/vram_cache.py", "flashmoe/expert_cache.py", "cache_policies/residency.py",
         "cache_policies/lower_tier.py")  # fmt: skip


class Interrupter:
    """A Ctrl-C before the `nth` line of our own that runs."""

    def __init__(self, nth: int) -> None:
        self.left = nth

    def __enter__(self) -> None:
        self._before = sys.gettrace()
        sys.settrace(self._call)

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)

    def _call(self, frame: FrameType, event: str, argument: object) -> Callable[..., object] | None:
        return self._line if frame.f_code.co_filename.endswith(LINES) else None

    def _line(self, frame: FrameType, event: str, argument: object) -> Callable[..., object] | None:
        if event == "line":
            self.left -= 1
            if self.left == 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self._line


@pytest.mark.parametrize("what", ["decode", "prefill", "in place"])
def test_a_ctrl_c_before_any_line_leaves_both_tiers_usable(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flashmoe.expert_cache.LOST_READ_S", 0.001)
    for nth in range(1, 3000, 11):
        placement, in_place = Placement("auto", 1.0, 1.0, 0.0), what == "in place"
        ram = 24 if nth % 2 and in_place else 5
        tiers = make_tiers(4, ram, ram_spare=2, placement=placement, in_place=in_place)
        serve(tiers, 9, 9)
        interrupter = Interrupter(nth)
        try:
            with interrupter:
                if what == "decode":
                    tiers.cache.prefetch([(1, 7), (1, 6)], 2)
                    tiers.decode(0, [5, 2, 7])
                    tiers.decode(1, [6, 2])
                elif what == "prefill":
                    tiers.prefill(0, [3, 1, 6, 7, 4])
                else:
                    tiers.token([[5, 2, 7], [6, 2], [1, 3]])
                    tiers.token([[5, 2, 7], [6, 2], [1, 3]])
        except KeyboardInterrupt:
            pass
        else:
            break
        tiers.after_error = tiers.cache._open
        assert isinstance(tiers.engine, LazyEngine)
        tiers.engine.compute.work.clear()
        tiers.engine.compute.done = tiers.engine.compute.asked
        serve(tiers, 10, 9)
        tiers.check()
    assert interrupter.left > 0 and nth > 300
