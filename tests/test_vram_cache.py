"""The VRAM tier over the RAM tier, against a scripted drive and copies that happen as late as they may.

`LazyEngine` has the three queues of a GPU (copies in, copies out, compute) and runs an operation only when
somebody waits for it, or at random: whatever is not ordered by the code under test goes wrong here.
"""

import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_expert_cache import EXPERT_BYTES, MATRIX_BYTES, check_bytes
from test_prefetch import PatientDrive

from cache_policies.policy import Geometry
from cache_policies.registry import POLICY_NAMES, make_policy
from flashmoe.copy_engine import HostCopyEngine, Ticket
from flashmoe.expert_cache import ExpertCache
from flashmoe.expert_placement import Placement
from flashmoe.vram_cache import ABSENT, VramCache
from kernels.expert_ffn import Addresses
from kernels.expert_slots import slot_layout
from storage.expert_reader import ReadPlan, Run
from storage.storage_errors import ReadError

LAYERS, EXPERTS, TOP_K = 3, 8, 2
LAYOUT = slot_layout("f32", 4, 2)
assert LAYOUT.bytes == EXPERT_BYTES


class TwoWayDrive(PatientDrive):
    """Demand reads arrive at once; says where in a slot what falls from VRAM goes."""

    def views(self, plan: ReadPlan, slot: memoryview) -> tuple[memoryview, ...]:
        return tuple(slot[i * MATRIX_BYTES : (i + 1) * MATRIX_BYTES] for i in range(3))


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
        self.copied_out = 0

    def copy_in(self, slot: int, addresses: Addresses) -> None:
        self.ins.add(lambda: HostCopyEngine.copy_in(self, slot, addresses))
        self._dawdle()

    def copy_out(self, slot: int, addresses: Addresses) -> None:
        self.copied_out += 1
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

    def slot_holds(self, slot: int) -> set[float]:
        return set(self._arena[slot, :EXPERT_BYTES].view(torch.float32).tolist())

    def _queue(self, ticket: Ticket) -> Queue:
        return self.ins if ticket >= 0 else self.outs

    def _dawdle(self) -> None:
        for queue in (self.ins, self.outs, self.compute):
            if self.random.random() < 0.3:
                queue.run(self.random.randint(queue.done, queue.asked))


def _nothing() -> None:
    pass


@dataclass
class Tiers:
    """A VRAM cache, what is below it, and how to run events as a decoder does."""

    cache: VramCache
    drive: TwoWayDrive
    engine: LazyEngine
    table: np.ndarray

    def decode(self, layer: int, routed: Sequence[int], token: int = -1) -> list[int]:
        """One token's event; the bytes of every expert are checked when the GPU computes it. Returns those
        that the CPU computed."""
        self.engine.compute.run(self.engine.compute.asked)  # what the cache may rely on
        weights = [1.0] * len(routed)
        if self.cache.all_resident(layer, routed):
            self._compute(layer, [(e, int(self.table[layer, e])) for e in routed])
            self.cache.hit_event(layer, routed, weights, None, token)
            return []
        found = [int(self.table[layer, e]) for e in routed]
        event = self.cache.fetch(layer, routed, weights, None, token)
        self._compute(layer, [(e, s) for e, s in zip(routed, found, strict=True) if s != ABSENT])
        for place, addresses in event.cpu:
            check_bytes(layer, routed[place], addresses)
        late = event.late()
        self._compute(layer, [(routed[place], slot) for place, slot in late])
        on_cpu = {place for place, _ in event.cpu}
        assert sorted([*on_cpu, *(p for p, _ in late), *(p for p, s in enumerate(found) if s >= 0)]) == list(
            range(len(routed))
        )
        assert all(self.table[layer, e] >= 0 for p, e in enumerate(routed) if p not in on_cpu)
        event.settle()
        return [routed[place] for place in sorted(on_cpu)]

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
            self.engine.compute.add(lambda e=expert, s=slot: self._check(layer, e, s))  # type: ignore[misc]
        self.engine._dawdle()

    def _check(self, layer: int, expert: int, slot: int) -> None:
        assert self.engine.slot_holds(slot) == {100.0 * layer + expert}

    def check(self) -> None:
        """Between events: ids, slots and table agree, in both tiers."""
        vram, ram = self.cache, self.cache.ram
        assert vram.resident == vram._slots.keys()
        listed = {key: slot for key, slot in vram._slots.items() if key not in vram._unlisted}
        assert {tuple(key): self.table[tuple(key)] for key in np.argwhere(self.table >= 0)} == listed
        assert all(vram._ready[layer] == {e for la, e in listed if la == layer} for layer in range(LAYERS))
        used = [*vram._slots.values(), *(slot for slot, _ in vram._staged.values()), *vram._free]
        assert sorted(used) == list(range(vram.slots))
        assert not ram._in_flight and not vram._falling
        own = ram.lower.residents
        assert not own & vram.resident and len(own) <= ram.slots - ram.lower.spare
        assert own | ram._copies.keys() == ram._residents.keys() and ram._copies.keys() <= vram.resident
        others = (*ram._guesses.values(), *ram._staged.values(), *ram._cancelled)
        used = [*(r.slot for r in (*ram._residents.values(), *others)), *ram._free]
        assert sorted(used) == list(range(ram.slots))
        for queue in (self.engine.compute, self.engine.ins, self.engine.outs):
            queue.run(queue.asked)
        for (layer, expert), slot in vram._slots.items():
            self._check(layer, expert, slot)
        for (layer, expert), resident in ram._residents.items():
            check_bytes(layer, expert, resident.addresses)


def make_tiers(
    vram: int, ram: int, policy: str = "lru", below: str | None = None, spare: int = 3, ram_spare: int = 0,
    placement: Placement | None = None, seed: int = 0, per_layer: bool = False,
) -> Tiers:  # fmt: skip
    """`vram`, `ram`: capacities, in all or with `per_layer` of each layer."""
    drive = TwoWayDrive()
    ids = [(layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS)]
    plan = ReadPlan((Run(0, 0, EXPERT_BYTES, 0),), ((0, MATRIX_BYTES),) * 3, 4096, EXPERT_BYTES, EXPERT_BYTES)
    geometry = Geometry(LAYERS, EXPERTS, TOP_K, ram, per_layer)
    lower = ExpertCache(
        dict.fromkeys(ids, plan), drive, drive, make_policy(below or policy, geometry), geometry, ram_spare  # type: ignore[arg-type]
    )
    geometry = Geometry(LAYERS, EXPERTS, TOP_K, vram, per_layer)
    slots = vram * (LAYERS if per_layer else 1) + spare
    engine, table = LazyEngine(slots, seed), np.zeros((LAYERS, EXPERTS), dtype=np.int32)
    cache = VramCache(lower, make_policy(policy, geometry), geometry, engine, table, placement, spare)
    return Tiers(cache, drive, engine, table)


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
    assert tiers.engine.pinned == []
