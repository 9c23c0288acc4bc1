"""Hand reads to the drive by asyncio with aiofiles or by plain threads? How many, in how large pieces?

    python -m scripts.bench_read_dispatch [--file BIG_FILE | --scratch-folder FOLDER] [--pairs 7]

Both ways make the same direct reads (same random experts, pieces and threads) into the same aligned slots,
one right after the other and in alternating order. Experts are asked for one at a time (a lone miss) or four
at once (a layer's misses), each group awaited before the next. "GIL wanted" is the same beside a thread that
computes in pure Python, the worst neighbour a reader can have. Reads are cold as far as this machine goes
(O_DIRECT); what a hypervisor or the drive itself has cached cannot be seen from here.
Prints two tables (median and range) and one JSON object as its last line.
"""

import argparse
import asyncio
import contextlib
import json
import os
import platform
import queue
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import aiofiles.os

from storage.expert_reader import Extent, ReadPlan, open_reader, plan_read
from storage.host import allocate_aligned, open_file
from storage.read_queue import PIECE_BYTES, THREADS, Completion, ReadQueue, cut_into_pieces

EXPERT_BYTES = (442_368, 9_437_184)  # of smolmoe, and of Qwen3-30B-A3B in bf16
RUN_BYTES = 64 << 20  # read in one measurement,
RUN_EXPERTS = 64  # or this many experts
SCRATCH_BYTES = 1 << 30
MIB = 1 << 20
WHOLE = 1 << 40

Group = Sequence[ReadPlan]


class Timing(NamedTuple):
    """One measurement."""

    mb_per_s: float  # 10**6 bytes a second
    first_ms: float  # from asking for a group to its first expert, median


class Load(NamedTuple):
    """What is read in one measurement, and how."""

    path: Path
    groups: Sequence[Group]
    slots: Sequence[memoryview]
    threads: int
    piece_bytes: int


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--file", type=Path, help="read this file, at least 64 MiB, instead of a scratch file"
    )
    parser.add_argument("--scratch-folder", type=Path, default=Path("."), help="where the scratch file goes")
    parser.add_argument("--pairs", type=int, default=7, help="measurements of each kind")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        path = options.file or stack.enter_context(scratch_file(options.scratch_folder))
        results = {
            "machine": f"{platform.system()} {platform.release()}, {os.cpu_count()} cores",
            "dispatch": compare_dispatch(path, options.pairs),
            "threads_and_pieces": compare_threads_and_pieces(path, options.pairs),
        }
    print(json.dumps(results))


@contextlib.contextmanager
def scratch_file(folder: Path) -> Iterator[Path]:
    """A gigabyte that no drive can compress, on the drive; removed afterwards."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix="bench_read_dispatch.") as file:
        block = os.urandom(16 * MIB)
        for _ in range(SCRATCH_BYTES // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        yield Path(file.name)


def compare_dispatch(path: Path, pairs: int) -> list[dict[str, Any]]:
    """Threads against asyncio, pair by pair."""
    print(f"{'expert':>8} {'at once':>7} {'GIL':>6} {'threads MB/s':>20} {'asyncio MB/s':>20} {'ratio':>18}")
    rows = []
    for expert_bytes in EXPERT_BYTES:
        for at_once in (1, 4):
            for gil_wanted in (False, True):
                threads_: list[float] = []
                asyncio_: list[float] = []
                for pair in range(pairs):
                    load = make_load(path, expert_bytes, at_once, THREADS, PIECE_BYTES)
                    ways = [(threads_, read_with_threads), (asyncio_, read_with_asyncio)]
                    for timings, read in ways if pair % 2 == 0 else reversed(ways):
                        timings.append(measure(read, load, gil_wanted).mb_per_s)
                ratios = [first / second for first, second in zip(threads_, asyncio_, strict=True)]
                gil = "wanted" if gil_wanted else "free"
                print(
                    f"{expert_bytes:>8} {at_once:>7} {gil:>6} "
                    f"{spread(threads_):>20} {spread(asyncio_):>20} {spread(ratios, 2):>18}"
                )
                row = {"expert_bytes": expert_bytes, "at_once": at_once, "gil": gil}
                speeds = {"threads_mb_per_s": summary(threads_), "asyncio_mb_per_s": summary(asyncio_)}
                rows.append(row | speeds | {"threads_over_asyncio": summary(ratios)})
    return rows


def compare_threads_and_pieces(path: Path, rounds: int) -> list[dict[str, Any]]:
    """The read queue with more or fewer threads and pieces; every configuration once a round."""
    print(f"\n{'expert':>8} {'at once':>7} {'threads':>7} {'piece':>6} ", end="")
    print(f"{'GIL free MB/s':>20} {'first after ms':>16} {'GIL wanted MB/s':>18}")
    rows = []
    for expert_bytes in EXPERT_BYTES:
        pieces = {"1 MiB": MIB, "2 MiB": 2 * MIB, "4 MiB": 4 * MIB, "whole": WHOLE}
        if expert_bytes < MIB:
            pieces = {"whole": WHOLE}
        for at_once in (1, 4):
            configurations = [(threads, piece) for threads in (1, 2, 4) for piece in pieces]
            free: dict[tuple[int, str], list[Timing]] = {key: [] for key in configurations}
            wanted: dict[tuple[int, str], list[Timing]] = {key: [] for key in configurations}
            for _ in range(rounds):
                for threads, piece in random.sample(configurations, len(configurations)):
                    load = make_load(path, expert_bytes, at_once, threads, pieces[piece])
                    free[threads, piece].append(measure(read_with_threads, load, gil_wanted=False))
                    wanted[threads, piece].append(measure(read_with_threads, load, gil_wanted=True))
            for threads, piece in configurations:
                speeds = [timing.mb_per_s for timing in free[threads, piece]]
                firsts = [timing.first_ms for timing in free[threads, piece]]
                speeds_wanted = [timing.mb_per_s for timing in wanted[threads, piece]]
                print(
                    f"{expert_bytes:>8} {at_once:>7} {threads:>7} {piece:>6} "
                    f"{spread(speeds):>20} {spread(firsts, 1):>16} {spread(speeds_wanted):>18}"
                )
                row = {"expert_bytes": expert_bytes, "at_once": at_once, "threads": threads, "piece": piece}
                figures = {"mb_per_s": summary(speeds), "first_ms": summary(firsts)}
                rows.append(row | figures | {"gil_wanted_mb_per_s": summary(speeds_wanted)})
    return rows


def make_load(path: Path, expert_bytes: int, at_once: int, threads: int, piece_bytes: int) -> Load:
    """Random experts, all different, and slots for one group, touched so that no read pays for that."""
    file_bytes = path.stat().st_size
    count = min(file_bytes // expert_bytes, RUN_BYTES // expert_bytes, RUN_EXPERTS) // at_once * at_once
    numbers = random.sample(range(file_bytes // expert_bytes), count)
    plans = [plan_read([Extent(0, number * expert_bytes, expert_bytes)], [file_bytes]) for number in numbers]
    slots = [memoryview(allocate_aligned(plans[0].slot_bytes)) for _ in range(at_once)]
    for slot in slots:
        slot[::4096] = bytes(len(slot[::4096]))
    groups = [plans[begin : begin + at_once] for begin in range(0, count, at_once)]
    return Load(path, groups, slots, threads, piece_bytes)


Read = Callable[[Load], tuple[float, list[float]]]  # seconds in all, seconds to each group's first expert


def measure(read: Read, load: Load, gil_wanted: bool) -> Timing:
    with spinning() if gil_wanted else contextlib.nullcontext():
        seconds, firsts = read(load)
    nbytes = sum(plan.read_bytes for group in load.groups for plan in group)
    return Timing(nbytes / seconds / 1e6, statistics.median(firsts) * 1e3)


@contextlib.contextmanager
def spinning() -> Iterator[None]:
    """Keep a thread computing in Python."""
    stop = False

    def spin() -> None:
        while not stop:
            pass

    thread = threading.Thread(target=spin)
    thread.start()
    yield
    stop = True
    thread.join()


def read_with_threads(load: Load) -> tuple[float, list[float]]:
    reader = open_reader("direct", [load.path], [load.path.stat().st_size])
    read_queue = ReadQueue(reader, load.threads, load.piece_bytes)
    done: queue.SimpleQueue[Completion] = queue.SimpleQueue()
    firsts = []
    begin_s = time.perf_counter()
    for group in load.groups:
        group_s = time.perf_counter()
        for plan, slot in zip(group, load.slots, strict=True):
            read_queue.submit(None, plan, slot, done)
        completions = [done.get()]
        firsts.append(time.perf_counter() - group_s)
        completions += [done.get() for _ in group[1:]]
        for completion in completions:
            if completion.error:
                raise completion.error
    seconds = time.perf_counter() - begin_s
    read_queue.close()
    reader.close()
    return seconds, firsts


def read_with_asyncio(load: Load) -> tuple[float, list[float]]:
    preadv = aiofiles.os.wrap(os.preadv)  # the call, in an executor, awaited

    async def read_expert(fd: int, plan: ReadPlan, slot: memoryview, executor: ThreadPoolExecutor) -> float:
        (run,) = plan.runs
        pieces = list(cut_into_pieces(run.nbytes, load.piece_bytes))
        reads = [
            preadv(fd, [slot[begin : begin + nbytes]], run.offset + begin, executor=executor)
            for begin, nbytes in pieces
        ]
        if await asyncio.gather(*reads) != [nbytes for _, nbytes in pieces]:
            raise OSError("short read")
        return time.perf_counter()

    async def read_all(fd: int, executor: ThreadPoolExecutor) -> tuple[float, list[float]]:
        firsts = []
        begin_s = time.perf_counter()
        for group in load.groups:
            group_s = time.perf_counter()
            reads = zip(group, load.slots, strict=True)
            ends = await asyncio.gather(*(read_expert(fd, plan, slot, executor) for plan, slot in reads))
            firsts.append(min(ends) - group_s)
        return time.perf_counter() - begin_s, firsts

    with open_file(load.path, direct=True) as file, ThreadPoolExecutor(load.threads) as executor:
        return asyncio.run(read_all(file.fileno(), executor))


def summary(values: Sequence[float]) -> dict[str, float]:
    median, low, high = (round(value, 3) for value in (statistics.median(values), min(values), max(values)))
    return {"median": median, "min": low, "max": high, "n": len(values)}


def spread(values: Sequence[float], digits: int = 0) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


if __name__ == "__main__":
    main()
