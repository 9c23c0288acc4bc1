"""How should reads be handed to the drive: asyncio with aiofiles, or plain threads? How many, and how large the pieces?

    python scripts/bench_read_dispatch.py [--file BIG_FILE | --scratch-folder FOLDER] [--pairs 7]

Both ways make the same direct reads (same random experts, pieces, threads) into the same aligned slots, one right after
the other and in alternating order. Experts are asked for in groups of one (a lone miss) or four (a layer's misses), each
group awaited before the next, once more beside a thread that computes in Python and wants the GIL. Reads are cold as far
as this machine goes (O_DIRECT); what a hypervisor or the drive itself caches cannot be seen from here.
Prints tables, and one JSON object as its last line.
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

import aiofiles.os

from storage.expert_reader import ExpertReader, Extent, ReadPlan, open_reader, plan_read
from storage.host import allocate_aligned, open_file
from storage.read_queue import Completion, ReadQueue, cut_into_pieces

EXPERT_BYTES = (442_368, 9_437_184)  # smolmoe's, and Qwen3-30B-A3B's in bf16
RUN_BYTES = 128 << 20  # read in one measurement
SCRATCH_BYTES = 1 << 30
MIB = 1 << 20

Group = Sequence[ReadPlan]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--file", type=Path, help="read this file, at least 64 MB, instead of a scratch file")
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


def compare_dispatch(path: Path, pairs: int) -> list[dict[str, object]]:
    print(
        f"{'expert':>10} {'asked at once':>14} {'GIL':>6}   {'threads MB/s':>24} {'asyncio MB/s':>24} {'ratio':>18}"
    )
    rows = []
    for expert_bytes in EXPERT_BYTES:
        for at_once in (1, 4):
            for gil_wanted in (False, True):
                speeds: dict[str, list[float]] = {"threads": [], "asyncio": []}
                for pair in range(pairs):
                    groups = random_groups(path, expert_bytes, at_once)
                    ways = [("threads", read_with_threads), ("asyncio", read_with_asyncio)]
                    for name, read in ways if pair % 2 == 0 else reversed(ways):
                        speeds[name].append(measure(read, path, groups, 4, MIB, gil_wanted))
                ratios = [a / b for a, b in zip(speeds["threads"], speeds["asyncio"], strict=True)]
                print(
                    f"{expert_bytes:>10} {at_once:>14} {'wanted' if gil_wanted else 'free':>6}   "
                    f"{spread(speeds['threads']):>24} {spread(speeds['asyncio']):>24} {spread(ratios, 2):>18}"
                )
                rows.append(
                    {"expert_bytes": expert_bytes, "at_once": at_once, "gil_wanted": gil_wanted}
                    | {f"{name}_mb_per_s": summary(values) for name, values in speeds.items()}
                    | {"threads_over_asyncio": summary(ratios)}
                )
    return rows


def compare_threads_and_pieces(path: Path, rounds: int) -> list[dict[str, object]]:
    print(f"\n{'expert':>10} {'asked at once':>14} {'threads':>8} {'piece':>8}   {'threads MB/s':>24}")
    rows = []
    for expert_bytes in EXPERT_BYTES:
        piece_sizes = {"256 KiB": MIB // 4, "1 MiB": MIB, "4 MiB": 4 * MIB, "whole": 1 << 40}
        if expert_bytes < MIB:
            piece_sizes = {"128 KiB": MIB // 8, "whole": 1 << 40}
        for at_once in (1, 4):
            speeds: dict[tuple[int, str], list[float]] = {}
            for _ in range(rounds):  # every configuration once a round, so that drift hits all alike
                groups = random_groups(path, expert_bytes, at_once)
                for threads in (1, 2, 4, 8):
                    for piece, piece_bytes in piece_sizes.items():
                        speed = measure(read_with_threads, path, groups, threads, piece_bytes, False)
                        speeds.setdefault((threads, piece), []).append(speed)
            for (threads, piece), values in speeds.items():
                print(f"{expert_bytes:>10} {at_once:>14} {threads:>8} {piece:>8}   {spread(values):>24}")
                row = {"expert_bytes": expert_bytes, "at_once": at_once, "threads": threads, "piece": piece}
                rows.append(row | {"mb_per_s": summary(values)})
    return rows


def random_groups(path: Path, expert_bytes: int, at_once: int) -> list[Group]:
    """Different random experts, RUN_BYTES of them or as many as the file has."""
    file_bytes = path.stat().st_size
    count = min(file_bytes // expert_bytes, max(at_once, RUN_BYTES // expert_bytes)) // at_once * at_once
    numbers = random.sample(range(file_bytes // expert_bytes), count)
    plans = [plan_read([Extent(0, number * expert_bytes, expert_bytes)], [file_bytes]) for number in numbers]
    return [plans[begin : begin + at_once] for begin in range(0, count, at_once)]


Read = Callable[[Path, Sequence[Group], list[memoryview], int, int], float]


def measure(
    read: Read, path: Path, groups: Sequence[Group], threads: int, piece_bytes: int, gil_wanted: bool
) -> float:
    """MB/s (10**6) of reading all groups one way."""
    slot_bytes = max(plan.slot_bytes for group in groups for plan in group)
    arena = memoryview(allocate_aligned(slot_bytes * len(groups[0])))
    arena[::4096] = bytes(len(arena[::4096]))
    slots = [arena[begin : begin + slot_bytes] for begin in range(0, len(arena), slot_bytes)]
    with spinning() if gil_wanted else contextlib.nullcontext():
        seconds = read(path, groups, slots, threads, piece_bytes)
    return sum(plan.read_bytes for group in groups for plan in group) / seconds / 1e6


@contextlib.contextmanager
def spinning() -> Iterator[None]:
    """A thread that computes in Python."""
    stop = False

    def spin() -> None:
        while not stop:
            pass

    thread = threading.Thread(target=spin)
    thread.start()
    yield
    stop = True
    thread.join()


def read_with_threads(
    path: Path, groups: Sequence[Group], slots: list[memoryview], threads: int, piece_bytes: int
) -> float:
    reader: ExpertReader = open_reader("direct", [path], [path.stat().st_size])
    read_queue = ReadQueue(reader, threads, piece_bytes)
    done: queue.SimpleQueue[Completion] = queue.SimpleQueue()
    begin_s = time.perf_counter()
    for group in groups:
        for plan, slot in zip(group, slots, strict=True):
            read_queue.submit(None, plan, slot, done)
        for _ in group:
            error = done.get().error
            if error:
                raise error
    seconds = time.perf_counter() - begin_s
    read_queue.close()
    reader.close()
    return seconds


def read_with_asyncio(
    path: Path, groups: Sequence[Group], slots: list[memoryview], threads: int, piece_bytes: int
) -> float:
    preadv = aiofiles.os.wrap(os.preadv)  # the call, in an executor, awaited

    async def read_expert(fd: int, plan: ReadPlan, slot: memoryview, executor: ThreadPoolExecutor) -> None:
        (run,) = plan.runs
        pieces = list(cut_into_pieces(run.nbytes, piece_bytes))
        reads = [
            preadv(fd, [slot[begin : begin + nbytes]], run.offset + begin, executor=executor)
            for begin, nbytes in pieces
        ]
        if await asyncio.gather(*reads) != [nbytes for _, nbytes in pieces]:
            raise OSError("short read")

    async def read_all(fd: int, executor: ThreadPoolExecutor) -> float:
        begin_s = time.perf_counter()
        for group in groups:
            reads = zip(group, slots, strict=True)
            await asyncio.gather(*(read_expert(fd, plan, slot, executor) for plan, slot in reads))
        return time.perf_counter() - begin_s

    with open_file(path, direct=True) as file, ThreadPoolExecutor(threads) as executor:
        return asyncio.run(read_all(file.fileno(), executor))


def summary(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def spread(values: Sequence[float], digits: int = 0) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


if __name__ == "__main__":
    main()
