"""Copies of whole experts: into a slot and back, tickets in order, and on a GPU with the driver itself."""

import ctypes
import ctypes.util

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flashmoe.copy_engine import EVENTS, CopyEngine, CudaCopyEngine, HostCopyEngine, Lane, pieces
from flashmoe.errors import GpuError
from kernels.expert_ffn import Addresses
from kernels.expert_slots import slot_layout
from storage.host import allocate_aligned, populate, rss_bytes

LAYOUT = slot_layout("bf16", 64, 32)  # three matrices of 4096 bytes
PART = LAYOUT.bytes // 3


def test_parts_one_behind_the_other_are_one_copy_and_so_is_a_packed_expert() -> None:
    assert pieces((1000, 1100, 1200), 300) == [(1000, 0, 300)]
    assert pieces((1000, 0, 0), 300) == [(1000, 0, 300)]
    assert pieces((1000, 1200, 1100), 300) == [(1000, 0, 100), (1200, 100, 100), (1100, 200, 100)]


def check_both_ways(engine: CopyEngine, arena: torch.Tensor) -> None:
    """gate, up, down scattered in RAM -> a slot -> elsewhere in RAM."""
    ram = allocate_aligned(8 * PART)
    base = ctypes.addressof(ctypes.c_char.from_buffer(ram))
    there: Addresses = (base + 2 * PART, base, base + PART)
    back: Addresses = (base + 5 * PART, base + 7 * PART, base + 6 * PART)
    expert = torch.randint(0, 256, (3, PART), dtype=torch.uint8)
    for part, address in zip(expert, there, strict=True):
        ctypes.memmove(address, part.data_ptr(), PART)
    engine.pin(base, 8 * PART)
    engine.copy_in(1, there)
    came = engine.mark()
    engine.compute_waits(came)
    assert arena[1, : LAYOUT.bytes].cpu().tolist() == expert.flatten().tolist()
    engine.copies_out_wait(came)
    engine.copy_out(1, back)
    engine.wait(engine.mark_out())
    for part, address in zip(expert, back, strict=True):
        assert ctypes.string_at(address, PART) == part.numpy().tobytes()
    engine.unpin(base)
    engine.close()


def test_an_expert_goes_to_ordinary_memory_and_back() -> None:
    arena = torch.zeros(3, LAYOUT.bytes + 64, dtype=torch.uint8)
    check_both_ways(HostCopyEngine(arena, LAYOUT), arena)


def test_memory_gets_its_pages_at_once_and_is_zero() -> None:
    memory = allocate_aligned(3 << 20)
    before = rss_bytes()
    if populate(ctypes.addressof(ctypes.c_char.from_buffer(memory)), 3 << 20):
        assert rss_bytes() - before >= 2 << 20
    assert not any(memory[:: 1 << 16])


class Clockwork:
    """Streams whose work is done when told; events are [ticket at the record, count]."""

    def __init__(self) -> None:
        self.recorded: dict[int, int] = {}
        self.records = self.done = self.events = 0

    def new_event(self) -> int:
        self.events += 1
        return self.events

    def destroy_event(self, event: int) -> None:
        self.events -= 1

    def record(self, event: int, stream: int) -> None:
        self.records += 1
        self.recorded[event] = self.records

    def has_happened(self, event: int) -> bool:
        return self.recorded[event] <= self.done

    def synchronize(self, event: int) -> None:
        self.done = max(self.done, self.recorded[event])


@given(st.lists(st.tuples(st.integers(1, EVENTS), st.floats(0, 1)), max_size=12))
def test_a_ticket_is_done_when_its_work_is_however_many_follow(steps: list[tuple[int, float]]) -> None:
    driver = Clockwork()
    lane = Lane(driver, 0)
    for marks, progress in steps:
        for _ in range(marks):
            newest = lane.mark()
        assert newest - driver.done <= EVENTS
        driver.done += int(progress * (newest - driver.done))
        for ticket in (newest, driver.done, driver.done + 1, max(0, newest - EVENTS)):
            if ticket <= newest:
                assert lane.is_done(ticket) == (ticket <= driver.done)
    newest = lane.mark()
    lane.wait(newest)
    assert driver.done == newest and lane.is_done(newest)
    lane.close()
    assert driver.events == 0


@pytest.mark.skipif(bool(ctypes.util.find_library("cuda")), reason="this machine has the driver")
def test_without_a_driver_the_error_says_what_is_missing() -> None:
    with pytest.raises(GpuError, match="NVIDIA driver's library cannot be loaded"):
        CudaCopyEngine(torch.zeros(3, LAYOUT.bytes, dtype=torch.uint8), LAYOUT)


@pytest.mark.gpu
def test_an_expert_goes_to_the_gpu_and_back() -> None:
    arena = torch.zeros(3, LAYOUT.bytes + 64, dtype=torch.uint8, device="cuda")
    check_both_ways(CudaCopyEngine(arena, LAYOUT), arena)


@pytest.mark.gpu
def test_more_copies_than_events_keep_their_order() -> None:
    arena = torch.zeros(2, LAYOUT.bytes, dtype=torch.uint8, device="cuda")
    engine = CudaCopyEngine(arena, LAYOUT)
    experts = torch.arange(3 * EVENTS, dtype=torch.int16)[:, None].repeat(1, LAYOUT.bytes // 2).pin_memory()
    for expert in experts:
        engine.copy_in(0, (expert.data_ptr(), 0, 0))
        newest = engine.mark()
    engine.compute_waits(newest)
    assert arena[0].view(torch.int16).unique().tolist() == [3 * EVENTS - 1]
    assert engine.is_done(newest) and engine.is_done(1)
    engine.close()


@pytest.mark.gpu
def test_memory_that_cannot_be_pinned_is_an_error_with_the_figure() -> None:
    engine = CudaCopyEngine(torch.zeros(2, LAYOUT.bytes, dtype=torch.uint8, device="cuda"), LAYOUT)
    with pytest.raises(GpuError, match=r"1\.0 GiB of expert slots.*--ram-budget"):
        engine.pin(4096, 1 << 30)
    engine.close()
