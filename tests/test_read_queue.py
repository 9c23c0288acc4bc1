"""The read queue: order, completions, errors that leave slots alone, counters, and closing at any time."""

import queue
import random
import threading
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.expert_reader import Extent, ReadPlan, Run, open_reader, plan_read
from storage.host import allocate_aligned
from storage.read_queue import PREFETCH_THREADS, Completion, ReadQueue, cut_into_pieces
from storage.storage_errors import ReadError

PAGE = 4096
SIZES = (64 * PAGE,)


class MemoryReader:
    """A reader of a made-up drive on which page n is full of the byte n; `before_read` may wait or raise."""

    name = "memory"
    in_place = False

    def __init__(self, before_read: Callable[[int], None] = lambda page: None) -> None:
        self.before_read = before_read
        self.pages_read: list[int] = []

    def read_run(self, run: Run, slot: memoryview | None, begin: int = 0, nbytes: int | None = None) -> int:
        assert slot is not None
        nbytes = run.nbytes - begin if nbytes is None else nbytes
        for at in range(begin, begin + nbytes, PAGE):
            page = (run.offset + at) // PAGE
            self.pages_read.append(page)
            self.before_read(page)
            slot[run.slot_offset + at : run.slot_offset + at + PAGE] = bytes([page]) * PAGE
        return nbytes

    def views(self, plan: ReadPlan, slot: memoryview | None) -> tuple[memoryview, ...]:
        assert slot is not None
        return tuple(slot[offset : offset + nbytes] for offset, nbytes in plan.parts)

    def release(self, plan: ReadPlan) -> None:
        pass

    def close(self) -> None:
        pass


def pages(first: int, count: int) -> ReadPlan:
    return plan_read([Extent(0, first * PAGE, count * PAGE)], SIZES)


def slot_for(plan: ReadPlan) -> memoryview:
    return memoryview(bytearray(plan.slot_bytes))


def test_experts_are_read_first_in_first_out_piece_by_piece() -> None:
    reader = MemoryReader()
    done: queue.SimpleQueue[Completion] = queue.SimpleQueue()
    read_queue = ReadQueue(reader, threads=1, piece_bytes=PAGE)
    for tag, plan in (("first", pages(7, 3)), ("second", pages(1, 2)), ("third", pages(30, 1))):
        read_queue.submit(tag, plan, slot_for(plan), done)
    assert [done.get().tag for _ in range(3)] == ["first", "second", "third"]
    assert reader.pages_read == [7, 8, 9, 1, 2, 30]
    read_queue.close()


def test_a_completion_carries_the_views_in_plan_order_and_the_bytes_read() -> None:
    done: queue.SimpleQueue[Completion] = queue.SimpleQueue()
    read_queue = ReadQueue(MemoryReader(), threads=3, piece_bytes=PAGE)
    plan = plan_read([Extent(0, 5 * PAGE, 2), Extent(0, 2 * PAGE + 1, 3)], SIZES)
    read_queue.submit((4, 17), plan, slot_for(plan), done)
    completion = done.get()
    assert completion.tag == (4, 17) and completion.error is None and completion.seconds >= 0
    assert completion.views is not None
    assert [bytes(view) for view in completion.views] == [b"\5\5", b"\2\2\2"]
    assert completion.read_bytes == 2 * PAGE
    read_queue.close()


def test_one_expert_is_read_by_several_threads_at_once() -> None:
    """Each read waits until the others have begun too: with fewer threads this would not end."""
    together = threading.Barrier(4, timeout=20)
    done: queue.SimpleQueue[Completion] = queue.SimpleQueue()
    read_queue = ReadQueue(MemoryReader(lambda page: together.wait() and None), threads=4, piece_bytes=PAGE)
    read_queue.submit(0, pages(0, 4), slot_for(pages(0, 4)), done)
    assert done.get(timeout=20).error is None
    read_queue.close()


def test_after_an_error_the_rest_of_that_expert_is_not_read_and_the_others_are() -> None:
    def fail_at_page_2(page: int) -> None:
        if page == 2:
            raise ReadError("page 2 is broken")

    reader = MemoryReader(fail_at_page_2)
    done: queue.SimpleQueue[Completion] = queue.SimpleQueue()
    read_queue = ReadQueue(reader, threads=1, piece_bytes=PAGE)
    for tag, plan in (("broken", pages(1, 20)), ("good", pages(40, 2))):
        read_queue.submit(tag, plan, slot_for(plan), done)
    broken, good = done.get(), done.get()
    assert (broken.tag, broken.views, broken.read_bytes) == ("broken", None, PAGE)
    assert isinstance(broken.error, ReadError) and str(broken.error) == "page 2 is broken"
    assert (good.tag, good.error) == ("good", None)
    assert reader.pages_read == [1, 2, 40, 41]
    read_queue.close()


def test_a_failed_expert_completes_only_when_nothing_writes_to_its_slot_any_more() -> None:
    """One piece fails while another is still being read: the completion has to wait for that one."""
    slow_has_begun, failed, let_go = threading.Event(), threading.Event(), threading.Event()

    def before_read(page: int) -> None:
        if page == 0:
            slow_has_begun.set()
            assert let_go.wait(20)
        if page == 1:
            assert slow_has_begun.wait(20)
            raise ReadError("page 1 is broken")
        if page == 9:
            failed.set()

    done: queue.SimpleQueue[Completion] = queue.SimpleQueue()
    read_queue = ReadQueue(MemoryReader(before_read), threads=2, piece_bytes=PAGE)
    slot = slot_for(pages(0, 2))
    read_queue.submit("broken", pages(0, 2), slot, done)
    read_queue.submit("after", pages(9, 1), slot_for(pages(9, 1)), done)
    assert failed.wait(20)  # the same thread has gone on to the next expert, so the error is known
    assert done.get(timeout=20).tag == "after"
    assert done.empty()
    let_go.set()
    broken = done.get(timeout=20)
    assert broken.tag == "broken" and broken.error is not None
    assert bytes(slot[:PAGE]) == bytes(PAGE)
    read_queue.close()


def test_an_error_that_nobody_foresaw_reaches_the_one_who_waits() -> None:
    def bug(page: int) -> None:
        raise ZeroDivisionError

    done: queue.SimpleQueue[Completion] = queue.SimpleQueue()
    read_queue = ReadQueue(MemoryReader(bug), threads=1)
    for _ in range(2):  # the thread lives on
        read_queue.submit(0, pages(0, 1), slot_for(pages(0, 1)), done)
        assert isinstance(done.get(timeout=20).error, ZeroDivisionError)
    read_queue.close()


def test_closing_finishes_the_read_in_flight_and_gives_up_the_others() -> None:
    begun, let_go = threading.Event(), threading.Event()

    def before_read(page: int) -> None:
        begun.set()
        assert let_go.wait(20)

    reader = MemoryReader(before_read)
    done: queue.SimpleQueue[Completion] = queue.SimpleQueue()
    read_queue = ReadQueue(reader, threads=1, piece_bytes=PAGE)
    for tag, plan in (("single", pages(0, 1)), ("waiting", pages(1, 3))):
        read_queue.submit(tag, plan, slot_for(plan), done)
    assert begun.wait(20)
    closing = threading.Thread(target=read_queue.close)
    closing.start()
    while not read_queue._closed:
        pass
    let_go.set()
    closing.join(20)
    assert (done.get().error, reader.pages_read) == (None, [0])
    waiting = done.get()
    assert waiting.tag == "waiting" and "read queue was closed" in str(waiting.error)
    read_queue.close()
    with pytest.raises(AssertionError, match="closed"):
        read_queue.submit(0, pages(0, 1), slot_for(pages(0, 1)), done)


def test_a_slot_that_is_too_small_is_refused() -> None:
    read_queue = ReadQueue(MemoryReader(), threads=1)
    with pytest.raises(AssertionError, match="smaller than the plan"):
        read_queue.submit(0, pages(0, 2), memoryview(bytearray(PAGE)), queue.SimpleQueue())
    with pytest.raises(AssertionError, match="needs a slot"):
        read_queue.submit(0, pages(0, 2), None, queue.SimpleQueue())
    read_queue.close()


def test_the_counters_count_bytes_reads_and_the_time_in_which_something_was_in_flight(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now_s = 100.0
    monkeypatch.setattr("storage.read_queue.time.perf_counter", lambda: now_s)

    def takes_a_second(page: int) -> None:
        nonlocal now_s
        now_s += 1.0
        seen_while_busy.append(read_queue.busy_s)

    seen_while_busy: list[float] = []
    done: queue.SimpleQueue[Completion] = queue.SimpleQueue()
    read_queue = ReadQueue(MemoryReader(takes_a_second), threads=1, piece_bytes=PAGE)
    read_queue.submit(0, pages(0, 3), slot_for(pages(0, 3)), done)
    assert done.get(timeout=20).seconds == 3.0
    now_s = 200.0  # idle: does not count
    assert (read_queue.bytes_read, read_queue.reads, read_queue.busy_s) == (3 * PAGE, 3, 3.0)
    assert seen_while_busy == [1.0, 2.0, 3.0]
    read_queue.close()


class Gate:
    """Holds every read until it is let through, and tells when one has begun."""

    def __init__(self) -> None:
        self.begun: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.let_go = threading.Semaphore(0)

    def __call__(self, page: int) -> None:
        self.begun.put(page)
        assert self.let_go.acquire(timeout=20)


def gated_queue(threads: int = 1) -> tuple[ReadQueue, Gate, MemoryReader, "queue.SimpleQueue[Completion]"]:
    gate = Gate()
    reader = MemoryReader(gate)
    reads = ReadQueue(reader, threads, piece_bytes=PAGE, prefetch_piece_bytes=PAGE)
    return reads, gate, reader, queue.SimpleQueue()


def test_prefetch_pieces_start_only_when_no_demand_piece_waits() -> None:
    reads, gate, reader, done = gated_queue()
    for tag, first, is_prefetch in (("guess", 20, True), ("first", 1, False), ("second", 5, False)):
        reads.submit(tag, pages(first, 2), slot_for(pages(first, 2)), done, is_prefetch)
        if is_prefetch:
            assert gate.begun.get(timeout=20) == 20  # nobody else was there
    gate.let_go.release(6)
    assert [done.get(timeout=20).tag for _ in range(3)] == ["first", "second", "guess"]
    assert reader.pages_read == [20, 1, 2, 5, 6, 21]
    reads.close()


def test_prefetch_never_takes_all_threads() -> None:
    """A demand read that comes meanwhile finds the drive's own queue short."""
    reads, gate, _, done = gated_queue(threads=4)
    reads.submit("guess", pages(20, 8), slot_for(pages(20, 8)), done, prefetch=True)
    assert sorted(gate.begun.get(timeout=20) for _ in range(PREFETCH_THREADS)) == [20, 21]
    reads.submit("wanted", pages(1, 2), slot_for(pages(1, 2)), done)
    assert sorted(gate.begun.get(timeout=20) for _ in range(2)) == [1, 2]
    gate.let_go.release(10)
    assert {done.get(timeout=20).tag for _ in range(2)} == {"wanted", "guess"}
    reads.close()


def test_a_prefetch_read_that_has_not_begun_is_withdrawn_and_another_stops_between_pieces() -> None:
    reads, gate, reader, done = gated_queue()
    begun = reads.submit("begun", pages(10, 5), slot_for(pages(10, 5)), done, prefetch=True)
    waits = reads.submit("waits", pages(20, 5), slot_for(pages(20, 5)), done, prefetch=True)
    assert gate.begun.get(timeout=20) == 10
    assert reads.cancel(waits) and not reads.is_pending("waits")
    assert not reads.cancel(begun) and reads.is_pending("begun")
    gate.let_go.release()
    completion = done.get(timeout=20)
    assert (completion.tag, completion.views, completion.read_bytes) == ("begun", None, PAGE)
    assert "cancelled" in str(completion.error)
    gate.let_go.release(3)
    reads.submit("later", pages(30, 2), slot_for(pages(30, 2)), done)
    assert done.get(timeout=20).tag == "later" and done.empty()
    assert reader.pages_read == [10, 30, 31]
    reads.close()


def test_a_read_that_is_over_lets_go_of_its_slot() -> None:
    """A tag may know its request. Such a pair kept a closed cache's memory until a collector came by: 12 GB
    in `compare`, which makes a new cache for every round."""
    reads, gate, _, done = gated_queue()
    first = reads.submit("first", pages(0, 1), slot_for(pages(0, 1)), done)
    assert gate.begun.get(timeout=20) == 0
    waits = reads.submit("waits", pages(1, 1), slot_for(pages(1, 1)), done, prefetch=True)
    assert reads.cancel(waits) and waits.slot is None
    gate.let_go.release()
    assert done.get(timeout=20).tag == "first" and first.slot is None
    reads.close()


def test_what_has_arrived_or_is_wanted_is_not_cancelled() -> None:
    reads, gate, _, done = gated_queue()
    gate.let_go.release(9)
    guess = reads.submit("guess", pages(1, 1), slot_for(pages(1, 1)), done, prefetch=True)
    assert done.get(timeout=20).error is None
    wanted = reads.submit("wanted", pages(2, 1), slot_for(pages(2, 1)), done)
    assert not reads.cancel(guess) and not reads.cancel(wanted)
    assert done.get(timeout=20).error is None
    reads.promote(guess)  # too late, and no harm
    reads.close()


def test_a_promoted_prefetch_read_goes_before_the_other_guesses_and_behind_the_demand_reads() -> None:
    reads, gate, _, done = gated_queue()
    order = (("first", 1, False), ("guess", 10, True), ("wanted", 20, True), ("second", 30, False))
    requests = {
        tag: reads.submit(tag, pages(at, 1), slot_for(pages(at, 1)), done, is_prefetch)
        for tag, at, is_prefetch in order
    }
    assert gate.begun.get(timeout=20) == 1
    reads.promote(requests["wanted"])
    gate.let_go.release(4)
    assert [done.get(timeout=20).tag for _ in range(4)] == ["first", "second", "wanted", "guess"]
    reads.close()


def test_the_time_that_demand_reads_take_is_what_guesses_leave_them(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 0.0
    monkeypatch.setattr("storage.read_queue.time.perf_counter", lambda: now_s)

    def takes_a_second(page: int) -> None:
        nonlocal now_s
        now_s += 1.0

    done: queue.SimpleQueue[Completion] = queue.SimpleQueue()
    reads = ReadQueue(MemoryReader(takes_a_second), 1, piece_bytes=PAGE, prefetch_piece_bytes=PAGE)
    for count, is_prefetch in ((3, True), (2, False)):
        reads.submit(0, pages(0, count), slot_for(pages(0, count)), done, is_prefetch)
        done.get(timeout=20)
    assert (reads.busy_s, reads.demand_busy_s) == (5.0, 2.0)
    reads.close()


@given(nbytes=st.integers(1, 1 << 20), piece_pages=st.integers(1, 64))
def test_pieces_are_whole_pages_cover_the_run_once_and_are_about_equal(nbytes: int, piece_pages: int) -> None:
    pieces = list(cut_into_pieces(nbytes, piece_pages * PAGE))
    ends = list(accumulate(size for _, size in pieces))
    assert [begin for begin, _ in pieces] == [0, *ends[:-1]] and ends[-1] == nbytes
    assert all(begin % PAGE == 0 and 0 < size <= 1.5 * piece_pages * PAGE + PAGE for begin, size in pieces)


def test_an_expert_that_straddles_a_page_has_no_tiny_last_piece() -> None:
    """Real experts begin anywhere: 9 MiB of weights are 9 MiB and a page of file."""
    sizes = [size for _, size in cut_into_pieces((9 << 20) + PAGE, 1 << 20)]
    assert len(sizes) == 9 and min(sizes) > 1_000_000


@pytest.mark.parametrize("name", ["buffered", "mmap"])
@pytest.mark.parametrize("threads", [1, 4])
def test_many_experts_at_once_from_a_real_file(tmp_path: Path, name: str, threads: int) -> None:
    data = random.Random(1).randbytes(1_000_000)
    path = tmp_path / "shard.bin"
    path.write_bytes(data)
    sizes = (len(data),)
    rng = random.Random(2)
    extents = [Extent(0, rng.randrange(900_000), rng.randrange(1, 100_000)) for _ in range(60)]
    plans = [plan_read([extent], sizes) for extent in extents]
    reader = open_reader(name, (path,), sizes)
    read_queue = ReadQueue(reader, threads, piece_bytes=4 * PAGE)
    done: queue.SimpleQueue[Completion] = queue.SimpleQueue()
    for tag, plan in enumerate(plans):
        slot = None if reader.in_place else memoryview(allocate_aligned(plan.slot_bytes))
        read_queue.submit(tag, plan, slot, done)
    for _ in plans:
        completion = done.get(timeout=20)
        assert completion.error is None and completion.views is not None
        _, offset, nbytes = extents[completion.tag]
        assert completion.views[0] == data[offset : offset + nbytes]
    assert read_queue.bytes_read == sum(plan.read_bytes for plan in plans)
    read_queue.close()
    reader.close()


def test_a_reader_that_refuses_what_it_read_makes_an_error_and_the_thread_lives_on() -> None:
    """A checksum is compared when the views are handed out, after the last read."""

    class Refusing(MemoryReader):
        def views(self, plan: ReadPlan, slot: memoryview | None) -> tuple[memoryview, ...]:
            if plan.runs[0].offset == PAGE:
                raise ReadError("page 1 is damaged")
            return super().views(plan, slot)

    done: queue.SimpleQueue[Completion] = queue.SimpleQueue()
    read_queue = ReadQueue(Refusing(), threads=1, piece_bytes=PAGE)
    for tag, plan in (("bad", pages(1, 1)), ("good", pages(2, 1))):
        read_queue.submit(tag, plan, slot_for(plan), done)
    bad, good = done.get(timeout=10), done.get(timeout=10)
    assert bad.views is None and str(bad.error) == "page 1 is damaged"
    assert good.error is None and good.views is not None
    read_queue.close()
