"""The expert cache against a scripted drive: arrival order, failures and every count are under the test's
control."""

import ctypes
import queue

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_policies.policy import Geometry
from cache_policies.registry import POLICY_NAMES, make_policy
from flashmoe.expert_cache import ExpertCache, _Read
from flashmoe.weights import ExpertId
from kernels.expert_ffn import Addresses
from storage.expert_reader import ReadPlan, Run
from storage.read_queue import Completion
from storage.storage_errors import ReadError

HIDDEN, WIDTH = 4, 2
MATRIX_BYTES = HIDDEN * WIDTH * 4
EXPERT_BYTES = 3 * MATRIX_BYTES


class ScriptedDrive:
    """A reader and a read queue in one: expert (l, e) holds the number 100 l + e everywhere.

    `last_in_first_out` turns the order of arrival round; experts in `broken` fail.
    """

    name, in_place = "scripted", False

    def __init__(self, last_in_first_out: bool = False) -> None:
        self.last_in_first_out = last_in_first_out
        self.broken: set[ExpertId] = set()
        self.asked: list[ExpertId] = []
        self.released: list[ReadPlan] = []
        self.bytes_read = 0
        self.busy_s = 0.0
        self.closed = 0

    def submit(
        self, tag: _Read, plan: ReadPlan, slot: memoryview, done: "queue.SimpleQueue[Completion]"
    ) -> None:
        key = tag.key
        self.asked.append(key)
        if key in self.broken:
            result = Completion(tag, None, ReadError(f"expert {key} cannot be read"), 0, 0.0)
        else:
            number = torch.full((EXPERT_BYTES // 4,), 100.0 * key[0] + key[1])
            slot[:EXPERT_BYTES] = memoryview(number.numpy()).cast("B")
            views = tuple(slot[i * MATRIX_BYTES : (i + 1) * MATRIX_BYTES] for i in range(3))
            result = Completion(tag, views, None, EXPERT_BYTES, 0.0)
            self.bytes_read += EXPERT_BYTES
        earlier = []
        while self.last_in_first_out and not done.empty():
            earlier.append(done.get())
        for completion in (result, *earlier):
            done.put(completion)

    def is_pending(self, tag: _Read) -> bool:
        return False

    def release(self, plan: ReadPlan) -> None:
        self.released.append(plan)

    def close(self) -> None:
        self.closed += 1


def make_cache(
    slots: int, layers: int = 2, experts: int = 8, policy: str = "lru", drive: ScriptedDrive | None = None,
    spare: int = 0, top_k: int = 2,
) -> tuple[ExpertCache, ScriptedDrive]:
    drive = drive or ScriptedDrive()
    ids = [(layer, expert) for layer in range(layers) for expert in range(experts)]
    plan = ReadPlan((Run(0, 0, EXPERT_BYTES, 0),), ((0, MATRIX_BYTES),) * 3, 4096, EXPERT_BYTES, EXPERT_BYTES)
    geometry = Geometry(layers, experts, top_k, slots)
    plans = dict.fromkeys(ids, plan)
    cache = ExpertCache(plans, drive, drive, make_policy(policy, geometry), geometry, spare)  # type: ignore[arg-type]
    return cache, drive


def fetch(cache: ExpertCache, layer: int, routed: list[int]) -> list[int]:
    """Run one decode event; check that every expert came with its own bytes. Returns the order served."""
    served = []
    for batch in cache.fetch(layer, routed, [1.0] * len(routed)):
        for place, addresses in batch:
            check_bytes(layer, routed[place], addresses)
            served.append(routed[place])
    return served


def stream(cache: ExpertCache, layer: int, experts: list[int]) -> list[int]:
    """Run a prefill chunk whose tokens use one expert each, in this order."""
    served = []
    cache.observe(layer, [[expert] for expert in experts], [[1.0]] * len(experts))
    for expert, addresses in cache.stream(layer, experts):
        check_bytes(layer, expert, addresses)
        served.append(expert)
    return served


def check_bytes(layer: int, expert: int, addresses: Addresses) -> None:
    for address in addresses:
        matrix = (ctypes.c_float * (HIDDEN * WIDTH)).from_address(address)
        assert set(matrix) == {100.0 * layer + expert}


def test_hits_are_served_before_anything_that_has_to_be_read() -> None:
    cache, drive = make_cache(slots=4)
    fetch(cache, 0, [1, 2])
    assert fetch(cache, 0, [3, 2, 5, 1]) == [2, 1, 3, 5]
    assert (cache.counters.hits, cache.counters.misses) == (2, 4)
    assert drive.asked == [(0, 1), (0, 2), (0, 3), (0, 5)]


def test_late_experts_are_served_in_the_order_in_which_they_arrive() -> None:
    cache, _ = make_cache(slots=4, drive=ScriptedDrive(last_in_first_out=True))
    assert fetch(cache, 0, [1, 2, 3]) == [3, 2, 1]


def test_an_event_never_evicts_what_it_needs_itself() -> None:
    cache, _ = make_cache(slots=3)
    fetch(cache, 0, [0, 1, 2])
    fetch(cache, 0, [0, 4, 5])  # 0 is the oldest by now, and stays: the event needs it
    assert cache.resident == {(0, 0), (0, 4), (0, 5)}


def test_bytes_read_are_misses_times_the_size_of_an_expert() -> None:
    cache, drive = make_cache(slots=3)
    for routed in ([0, 1], [1, 2], [3, 0], [2, 1]):
        fetch(cache, 1, routed)
    assert cache.counters.bytes_read == cache.counters.misses * EXPERT_BYTES == drive.bytes_read


def test_a_failed_read_is_an_error_and_the_cache_goes_on() -> None:
    cache, drive = make_cache(slots=3)
    fetch(cache, 0, [0, 1, 2])
    drive.broken = {(0, 4)}
    with pytest.raises(ReadError, match="cannot be read"):
        fetch(cache, 0, [0, 4, 5])
    assert (0, 4) not in cache.resident
    drive.broken = set()
    for routed in ([4, 5, 6], [7, 3, 2], [0, 1, 4]):  # every slot is still there
        assert sorted(fetch(cache, 0, routed)) == sorted(routed)
    assert len(cache.resident) == 3


def test_a_read_that_was_noted_and_never_asked_for_does_not_hang_the_next_event(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A Ctrl-C in that instant: its slot is free again."""
    monkeypatch.setattr("flashmoe.expert_cache.LOST_READ_S", 0.01)
    cache, _ = make_cache(slots=4)
    fetch(cache, 0, [1, 2])
    cache._in_flight[0, 5] = _Read((0, 5), cache._free.pop())
    assert sorted(fetch(cache, 0, [5, 6])) == [5, 6]
    assert sorted(fetch(cache, 1, [1, 2, 3, 4])) == [1, 2, 3, 4]


def test_victims_that_a_ctrl_c_kept_in_their_slots_make_room_when_it_is_needed() -> None:
    cache, _ = make_cache(slots=3)
    fetch(cache, 0, [0, 1, 2])
    cache._residency.begin(0, [3, 4])  # decided, and not done
    assert sorted(fetch(cache, 0, [0, 5, 6])) == [0, 5, 6]
    assert sorted(fetch(cache, 1, [0, 5, 6])) == [0, 5, 6]
    assert len(cache._residents) == 3


def test_a_generator_left_over_from_an_event_given_up_does_not_end_the_next_one() -> None:
    cache, _ = make_cache(slots=4)
    given_up = cache.fetch(0, [1, 2], [1.0, 1.0])
    next(given_up)
    batches = cache.fetch(1, [3, 4], [1.0, 1.0])
    del given_up
    assert [place for batch in batches for place, _ in batch] == [0, 1]


def test_emptying_the_slots_tells_the_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    cache, _ = make_cache(slots=8, layers=1)
    fetch(cache, 0, [0, 1, 2, 3, 4, 5])
    told: list[ExpertId] = []
    choose = cache.policy.victims
    monkeypatch.setattr(cache.policy, "victims", lambda *args: told.extend(v := choose(*args)) or v)
    cache.evict_all()
    assert cache.resident == frozenset()
    assert sorted(told) == [(0, expert) for expert in range(6)]


def test_an_event_that_is_given_up_half_way_leaves_no_slot_behind() -> None:
    cache, _ = make_cache(slots=4)
    served = cache.fetch(0, [1, 2, 3, 4], [1.0] * 4)
    next(served)  # the caller is interrupted here, and the iterator stays alive as it does in a traceback
    assert sorted(fetch(cache, 1, [1, 2, 3, 4])) == [1, 2, 3, 4]
    prefill = cache.stream(0, list(range(8)))
    next(prefill)
    assert sorted(fetch(cache, 1, [5, 6, 7, 0])) == [0, 5, 6, 7]
    assert len(cache.resident) == 4


def test_a_long_prompt_leaves_each_layer_its_share_and_keeps_what_the_last_tokens_used() -> None:
    cache, _ = make_cache(slots=8, layers=4)
    for layer in range(4):
        assert sorted(stream(cache, layer, [5, 3, 0, 1, 7, 2, 6, 4])) == list(range(8))
    assert cache.resident == {(layer, expert) for layer in range(4) for expert in (6, 4)}


def test_prefill_of_a_layer_with_its_share_takes_nothing_from_other_layers() -> None:
    cache, _ = make_cache(slots=8, layers=2)
    fetch(cache, 0, [0, 1, 2, 3])
    fetch(cache, 1, [0, 1, 2, 3])
    stream(cache, 1, [4, 5, 6, 7])
    assert cache.resident == {(0, 0), (0, 1), (0, 2), (0, 3), (1, 4), (1, 5), (1, 6), (1, 7)}


def test_prefill_of_a_layer_below_its_share_takes_slots_from_the_others() -> None:
    cache, _ = make_cache(slots=8, layers=2)
    fetch(cache, 0, [0, 1, 2, 3])
    fetch(cache, 0, [4, 5, 6, 7])
    stream(cache, 1, [0, 1, 2, 3, 4])
    assert cache.resident == {(0, 4), (0, 5), (0, 6), (0, 7), (1, 1), (1, 2), (1, 3), (1, 4)}


def test_a_layer_below_its_share_may_lose_an_expert_of_its_own_and_goes_on() -> None:
    """What the policy took from all residents was asked to leave a second time, and was not there."""
    cache, _ = make_cache(slots=6, layers=2)
    fetch(cache, 0, [0])  # the oldest of all, and not in the chunk that follows
    fetch(cache, 1, [0, 1, 2, 3, 4])
    assert sorted(stream(cache, 0, [1, 2, 3, 4, 5, 6, 7])) == [1, 2, 3, 4, 5, 6, 7]
    assert {key for key in cache.resident if key[0] == 0} == {(0, 5), (0, 6), (0, 7)}


def test_with_room_for_everything_a_second_prefill_reads_nothing() -> None:
    cache, drive = make_cache(slots=16, layers=2)
    for layer in (0, 1):
        stream(cache, layer, list(range(8)))
    asked = len(drive.asked)
    for layer in (0, 1):
        stream(cache, layer, list(range(7, -1, -1)))
    assert len(drive.asked) == asked == 16


@pytest.mark.parametrize("policy", POLICY_NAMES)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_mix_of_events_serves_the_right_bytes_within_the_slots(policy: str, data: st.DataObject) -> None:
    slots = data.draw(st.integers(3, 20), label="slots")
    cache, drive = make_cache(slots, policy=policy, drive=ScriptedDrive(data.draw(st.booleans())))
    for _ in range(data.draw(st.integers(1, 12))):
        layer = data.draw(st.integers(0, 1))
        routed = data.draw(st.lists(st.integers(0, 7), min_size=1, max_size=3, unique=True))
        drive.broken = {(layer, routed[0])} if data.draw(st.integers(0, 5)) == 0 else set()
        before = cache.resident
        try:
            if data.draw(st.booleans()):
                assert sorted(fetch(cache, layer, routed)) == sorted(routed)
            else:
                chunk = data.draw(st.lists(st.integers(0, 7), min_size=1, unique=True))
                drive.broken &= {(layer, expert) for expert in chunk}
                assert sorted(stream(cache, layer, chunk)) == sorted(chunk)
        except ReadError:
            assert drive.broken and not drive.broken <= before
        assert len(cache.resident) <= slots
    drive.broken = set()
    assert sorted(fetch(cache, 0, [0, 1, 2])) == [0, 1, 2]


def test_closing_closes_queue_and_reader() -> None:
    cache, drive = make_cache(slots=2)
    fetch(cache, 0, [0])
    cache.close()
    assert drive.closed == 2 and cache.resident == frozenset()
