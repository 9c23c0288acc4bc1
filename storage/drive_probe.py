"""Which reader is fastest on this drive, and how fast: found out with real reads of real experts at start.

Each reader gets a share of 0.4 s to read random experts through a real ReadQueue, the page cache dropped
before. Asking beats knowing: a file system may accept direct reads when opening and refuse the first one,
drives differ by 50x, and the printed bound on decode speed needs the drive's. Numbers are MB/s (10**6), as
drive makers count.
"""

import queue
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

from storage import host
from storage.expert_reader import ExpertReader, ReadPlan, Run, open_reader
from storage.read_queue import Completion, ReadQueue
from storage.shard_file import open_shard
from storage.storage_errors import StorageError

READERS = ("direct", "buffered", "mmap")
PROBE_S = 0.36  # for all readers; opening files and closing the queues take the rest of 0.4 s
IN_FLIGHT = 4  # experts asked for at once: enough for small ones too, which are one read each
EXPERT_BYTES = 16 << 20  # read of an expert at most: drives are saturated long before
# Linux keeps a freshly written file in folios of up to 2 MiB and drops only whole ones: dropping just an
# expert's range left 60 % of a 0.4 MB expert in memory, and the probe measured 4.3 GB/s on a drive of 2.
FOLIO_BYTES = 2 << 20
DIRECT_SHARE = 0.9  # direct reads leave the page cache, and so the budget, alone: preferred if nearly as fast


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """What the drive can do, and who gets it out of the drive best."""

    read_mb_per_s: float  # of the chosen reader, at an expert's size
    reader: str
    measurements: Mapping[str, float]  # MB/s of each reader that worked
    notes: tuple[str, ...]  # why a reader has no measurement


def probe(
    paths: Sequence[Path],
    shard_bytes: Sequence[int],
    plans: Sequence[ReadPlan],
    readers: Sequence[str] = READERS,
) -> ProbeResult:
    """Measure `readers` on the experts that `plans` describe (at least one) and choose one.

    On a drive so slow that the time is up before every reader had its turn, the rest is not measured. Raises
    the last reader's StorageError if none of them works.
    """
    assert plans and readers
    begin_s = time.perf_counter()
    samples = [_shorten(plan) for plan in random.sample(plans, min(len(plans), 1024))]
    measurements: dict[str, float] = {}
    notes: list[str] = []
    for number, name in enumerate(readers):
        left_s = begin_s + PROBE_S - time.perf_counter()
        if measurements and left_s <= 0:
            notes.append(f"{name}: not measured, the drive took all the time before")
            continue
        try:
            measurements[name] = _measure(name, paths, shard_bytes, samples, left_s / (len(readers) - number))
        except StorageError as error:
            notes.append(f"{name}: not usable here: {error}")
            if number == len(readers) - 1 and not measurements:
                raise
    reader = choose_reader(measurements)
    return ProbeResult(measurements[reader], reader, measurements, tuple(notes))


def choose_reader(measurements: Mapping[str, float]) -> str:
    """The fastest reader, or `direct` if that is within 10 % of it."""
    fastest = max(measurements, key=lambda name: measurements[name])
    direct_will_do = measurements.get("direct", 0.0) >= DIRECT_SHARE * measurements[fastest]
    return "direct" if direct_will_do else fastest


def _measure(
    name: str, paths: Sequence[Path], shard_bytes: Sequence[int], plans: Sequence[ReadPlan], seconds: float
) -> float:
    """MB/s of one reader over about `seconds`, and over one expert at least."""
    with ExitStack() as stack:
        files = [stack.enter_context(open_shard(path)) for path in paths]
        reader = open_reader(name, paths, shard_bytes)
        stack.callback(reader.close)
        read_queue = ReadQueue(reader)
        stack.callback(read_queue.close)
        return _read_for(seconds, reader, read_queue, _cold(files, plans), _slots(reader, plans))


def _read_for(
    seconds: float,
    reader: ExpertReader,
    read_queue: ReadQueue,
    plans: Iterator[ReadPlan],
    slots: Sequence[memoryview | None],
) -> float:
    """Read one expert alone, then keep IN_FLIGHT of them under way as long as they will be done in time."""
    deadline_s = time.perf_counter() + seconds
    done: queue.SimpleQueue[Completion] = queue.SimpleQueue()
    reading: dict[int, ReadPlan] = {}  # slot number -> the plan that is being read into it

    def submit(slot: int) -> None:
        reading[slot] = next(plans)
        read_queue.submit(slot, reading[slot], slots[slot], done)

    def collect() -> tuple[int, float]:
        completion = done.get()
        if completion.error is not None:
            raise completion.error
        reader.release(reading.pop(completion.tag))
        return completion.read_bytes, completion.seconds

    submit(0)
    nbytes, expert_s = collect()
    alone_mb_per_s = nbytes / expert_s / 1e6
    begin_s, total_bytes = time.perf_counter(), 0
    while True:
        for slot in range(len(slots)):
            if slot not in reading and time.perf_counter() + (len(reading) + 1) * expert_s < deadline_s:
                submit(slot)
        if not reading:
            break
        total_bytes += collect()[0]
    together_mb_per_s = total_bytes / (time.perf_counter() - begin_s) / 1e6
    return together_mb_per_s if total_bytes else alone_mb_per_s


def _cold(files: Sequence[host.ReadFile], plans: Sequence[ReadPlan]) -> Iterator[ReadPlan]:
    """The plans again and again, each dropped from the page cache first, where the system can do that."""
    for plan in cycle(plans):
        for run in plan.runs:
            begin = run.offset // FOLIO_BYTES * FOLIO_BYTES
            files[run.shard].drop_cache(begin, run.offset + run.nbytes - begin + FOLIO_BYTES)
        yield plan


def _slots(reader: ExpertReader, plans: Sequence[ReadPlan]) -> list[memoryview | None]:
    if reader.in_place:
        return [None] * IN_FLIGHT
    slot_bytes = max(plan.slot_bytes for plan in plans)
    arena = memoryview(host.allocate_aligned(IN_FLIGHT * slot_bytes))
    arena[::4096] = bytes(len(arena[::4096]))  # touched once, so that no read pays for it
    return [arena[begin : begin + slot_bytes] for begin in range(0, len(arena), slot_bytes)]


def _shorten(plan: ReadPlan) -> ReadPlan:
    """The plan's first EXPERT_BYTES, without views."""
    runs: list[Run] = []
    room = EXPERT_BYTES
    for run in plan.runs:
        if room > 0:
            runs.append(run._replace(nbytes=min(run.nbytes, room)))
            room -= runs[-1].nbytes
    read_bytes = sum(run.nbytes for run in runs)
    slot_bytes = runs[-1].slot_offset + -(-runs[-1].nbytes // 4096) * 4096
    return ReadPlan(tuple(runs), (), slot_bytes, read_bytes, read_bytes)
