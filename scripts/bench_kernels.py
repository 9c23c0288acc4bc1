"""How fast the CPU kernels run, beside what the same threads can read from memory at best.

    python -m scripts.bench_kernels [--isa avx2] [--only decode|batch|prefill|linear] [--repetitions 9]

One token is bound by reading weights: GB/s of weight bytes, as a share of the read roof. Every slice of
kernel work (some tens of MB) stands between two slices of plain reading; all walk through one buffer that is
far larger than the last cache, so each reads memory. The roof is plain reading with software prefetch
(read_roof.c) or torch.sum, whichever is faster here. Many tokens are bound by arithmetic: GFLOP/s a core.

One thread: CPU time of the thread, so that a neighbour on the machine costs little. More: wall clock, which
says something on an idle machine only. Medians, with the least and the most in brackets. Weights are random.
Prints a table and, as its last line, one JSON object. Needs a C compiler.
"""

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from kernels.native import (
    Activation,
    Context,
    Experts,
    Format,
    Matrix,
    expert_bytes,
    make_context,
    matrix_bytes,
    pack_expert,
    pack_matrix,
)
from storage.host import allocate_aligned

Read = Callable[[int, int, int], int]  # address, bytes, threads

GB = 1e9
SLICE_BYTES = 64 << 20
DIFFERENT_EXPERTS = 4  # packed from random weights, then copied through the arena
DTYPES = {Format.BF16: torch.bfloat16, Format.F16: torch.float16, Format.F32: torch.float32}


@dataclass(frozen=True, slots=True)
class Case:
    """Experts of one size, `experts` of them a call, each with all `tokens`; width 0: a linear layer."""

    group: str
    hidden: int
    width: int
    experts: int
    format: Format
    exact: bool = False
    tokens: int = 1
    rows: int = 0  # of a linear layer

    @property
    def name(self) -> str:
        shape = f"{self.hidden}x{self.width}" if self.width else f"linear {self.rows}x{self.hidden}"
        return f"{shape} {self.format.name.lower()}{' exact' if self.exact else ''}"

    @property
    def unit_bytes(self) -> int:
        """Of one expert, or of the linear layer."""
        if self.width:
            return expert_bytes(self.format, self.hidden, self.width)
        if self.format.is_packed:
            return matrix_bytes(self.format, self.rows, self.hidden)
        return self.rows * self.hidden * DTYPES[self.format].itemsize


QWEN3 = Case("decode", 2048, 768, 8, Format.INT4)
MIXTRAL = Case("decode", 4096, 14336, 2, Format.INT4)
LM_HEAD = Case("linear", 2048, 0, 1, Format.INT8, rows=49152)
WEIGHTS = (  # format, exact
    (Format.INT4, False), (Format.INT8, False), (Format.BF16, False),
    (Format.INT4, True), (Format.INT8, True),
)  # fmt: skip
BATCHES = (2, 4, 8)
PREFILL_TOKENS, PREFILL_EXPERTS, PREFILL_TOP_K = 512, 48, 8


@dataclass(frozen=True, slots=True)
class Reading:
    """One case with one number of threads: the median, the least and the most."""

    case: str
    tokens: int
    threads: int
    gb_per_s: float
    share: tuple[float, float, float]
    gflop_per_s_core: tuple[float, float, float]


def main() -> None:
    options = parse_arguments()
    contexts = {n: make_context(n, options.isa) for n in sorted({1, options.threads})}
    memory = allocate_aligned(options.arena_gib << 30)  # as the expert slots are: in huge pages
    arena = torch.frombuffer(memory, dtype=torch.uint8).random_()
    read = plain_reader()
    clocks = {n: Clock(n, arena, read) for n in contexts}
    for n, clock in clocks.items():
        print(f"{n} threads: reads {clock.plain:.2f} GB/s, torch.sum {clock.torch_sum:.2f} GB/s")
    print(f"isa {contexts[1].isa}; medians of {options.repetitions}, [least - most]")
    found = []
    for case in cases(options.only):
        units = fill(arena, case, contexts[max(contexts)])
        for n, context in contexts.items():
            found.append(measure(case, units, context, clocks[n], options.repetitions))
            print_row(found[-1])
    print(json.dumps({
        "isa": contexts[1].isa,
        "torch": torch.__version__,
        "arena_bytes": arena.numel(),
        "repetitions": options.repetitions,
        "read_roof_gb_per_s": {n: {"plain": c.plain, "torch_sum": c.torch_sum} for n, c in clocks.items()},
        "readings": [asdict(reading) for reading in found],
    }))  # fmt: skip


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--isa", help="instruction set (default: the best one)")
    parser.add_argument("--only", action="append", choices=("decode", "batch", "prefill", "linear"))
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="beside one (default: all)")
    parser.add_argument("--repetitions", type=int, default=9, help="at least 7 (default: 9)")
    parser.add_argument("--arena-gib", type=int, default=2, help="far more than the caches (default: 2)")
    options = parser.parse_args()
    if options.repetitions < 7:
        parser.error("fewer than 7 repetitions say nothing about the spread")
    return options


def cases(only: list[str] | None) -> Iterator[Case]:
    found = []
    for shape in (QWEN3, MIXTRAL):
        found += [replace(shape, format=f, exact=exact) for f, exact in WEIGHTS]
    found += [replace(QWEN3, group="batch", format=f, tokens=m) for f, x in WEIGHTS if not x for m in BATCHES]
    prefill = replace(QWEN3, group="prefill", tokens=PREFILL_TOKENS, experts=PREFILL_EXPERTS)
    found += [replace(prefill, format=f, exact=exact) for f, exact in WEIGHTS]
    found += [LM_HEAD, replace(LM_HEAD, format=Format.BF16)]
    return (case for case in found if only is None or case.group in only)


def plain_reader() -> Read:
    """read_roof.c, compiled for this machine."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "read_roof.so")
        subprocess.run(
            [os.environ.get("CC", "cc"), "-O3", "-march=native", "-pthread", "-shared", "-fPIC",
             Path(__file__).with_name("read_roof.c"), "-o", library], check=True,
        )  # fmt: skip
        read = ctypes.CDLL(str(library)).read_plain
    read.argtypes, read.restype = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int], ctypes.c_uint64
    return read


class Clock:
    """Times slices of reading and of work for a number of threads, all of them walking through one arena."""

    def __init__(self, threads: int, arena: Tensor, read: Read) -> None:
        self.threads = threads
        self._arena, self._read = arena, read
        self._now = time.thread_time if threads == 1 else time.perf_counter
        self.position = 0  # of the next slice to be read, in the arena
        torch.set_num_threads(threads)
        slices = arena.numel() // SLICE_BYTES
        self.plain = max(self.read_slice() for _ in range(slices))
        self.torch_sum = max(self._sum_slice() for _ in range(slices))

    @property
    def advantage(self) -> float:
        """By how much torch reads faster than we do, if at all."""
        return max(1, self.torch_sum / self.plain)

    def seconds(self, work: Callable[[], object]) -> float:
        begin = self._now()
        work()
        return self._now() - begin

    def take(self, nbytes: int) -> int:
        """The offset of the next `nbytes` that nobody has touched for long."""
        if self.position + nbytes > self._arena.numel():
            self.position = 0
        self.position += nbytes
        return self.position - nbytes

    def read_slice(self) -> float:
        """GB/s of plain reading."""
        begin = self._arena.data_ptr() + self.take(SLICE_BYTES)
        return SLICE_BYTES / GB / self.seconds(lambda: self._read(begin, SLICE_BYTES, self.threads))

    def _sum_slice(self) -> float:
        begin = self.take(SLICE_BYTES)
        values = self._arena[begin : begin + SLICE_BYTES].view(torch.int32)
        return SLICE_BYTES / GB / self.seconds(values.view(torch.float32).sum)


def fill(arena: Tensor, case: Case, context: Context) -> Tensor:
    """The arena as units [n, unit_bytes] of random weights."""
    n = arena.numel() // case.unit_bytes
    units = arena[: n * case.unit_bytes].view(n, case.unit_bytes)
    different = min(n, DIFFERENT_EXPERTS) if case.unit_bytes < SLICE_BYTES else 1
    for unit in units[:different]:
        pack_random(unit, case, context)
    for i in range(different, n):
        units[i] = units[i % different]
    return units


def pack_random(unit: Tensor, case: Case, context: Context) -> None:
    if not case.format.is_packed:
        values = unit.view(DTYPES[case.format])
        values.copy_(torch.randn(values.shape) / case.hidden**0.5)
    elif case.width:
        gate, up = (torch.randn(case.width, case.hidden) / case.hidden**0.5 for _ in range(2))
        down = torch.randn(case.hidden, case.width) / case.width**0.5
        pack_expert(context, gate, up, down, case.format, unit)
    else:
        pack_matrix(context, torch.randn(case.rows, case.hidden) / case.hidden**0.5, case.format, unit)


def measure(case: Case, units: Tensor, context: Context, clock: Clock, repetitions: int) -> Reading:
    call = linear_call(case, context) if case.rows else expert_call(case, context)
    nbytes, last = case.unit_bytes * case.experts, len(units) - case.experts
    calls = 1 if case.group == "prefill" else max(1, SLICE_BYTES // nbytes)
    call.run(units, 0)  # the workspace grows here
    shares, rates, speeds = [], [], []
    for _ in range(repetitions):
        before = clock.read_slice()
        offsets = [min(last, clock.take(nbytes) // case.unit_bytes) for _ in range(calls)]
        seconds = clock.seconds(partial(run_all, call, units, offsets)) / calls
        roof = (before + clock.read_slice()) / 2 * clock.advantage
        rates.append(nbytes / seconds / GB)
        shares.append(rates[-1] / roof)
        speeds.append(call.flop / seconds / GB / clock.threads)
    return Reading(
        case.name, case.tokens, clock.threads, statistics.median(rates), summary(shares), summary(speeds)
    )


@dataclass(frozen=True, slots=True)
class Call:
    """run(units, first) computes with `experts` units from the first on."""

    run: Callable[[Tensor, int], None]
    flop: float


def run_all(call: Call, units: Tensor, offsets: list[int]) -> None:
    for offset in offsets:
        call.run(units, offset)


def expert_call(case: Case, context: Context) -> Call:
    """One token or a few: all go to each expert. Prefill: each token to top-k of them, by chance."""
    generator = torch.Generator().manual_seed(0)
    prefill = case.group == "prefill"
    top_k = PREFILL_TOP_K if prefill else case.experts
    ids = torch.stack([torch.randperm(case.experts, generator=generator)[:top_k] for _ in range(case.tokens)])
    rows = ids.flatten().argsort(stable=True).int()
    counts = torch.bincount(ids.flatten(), minlength=case.experts)
    begin = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).int()
    x, y = torch.randn(case.tokens, case.hidden), torch.zeros(case.tokens, case.hidden)
    weights = torch.full((case.tokens, top_k), 1 / top_k)
    products = torch.empty(case.tokens * top_k, case.hidden)
    experts = Experts(case.hidden, case.width, case.format, Activation.SILU, case.exact)
    parts = torch.arange(3) * (0 if case.format.is_packed else case.unit_bytes // 3)
    table = torch.arange(case.experts)[:, None] * case.unit_bytes + parts  # [n, 3]
    address = torch.empty_like(table)

    def run(units: Tensor, first: int) -> None:
        torch.add(table, units.data_ptr() + first * case.unit_bytes, out=address)
        context.moe(
            experts, x.data_ptr(), case.tokens, top_k, address.data_ptr(), case.experts, begin.data_ptr(),
            rows.data_ptr(), products.data_ptr(), weights.data_ptr(), y.data_ptr(),
        )  # fmt: skip

    return Call(run, 6.0 * case.hidden * case.width * ids.numel())


def linear_call(case: Case, context: Context) -> Call:
    x, y = torch.randn(case.tokens, case.hidden), torch.empty(case.tokens, case.rows)

    def run(units: Tensor, first: int) -> None:
        matrix = Matrix(units.data_ptr() + first * case.unit_bytes, case.format, case.rows, case.hidden)
        context.linear(matrix, 0, x.data_ptr(), case.tokens, case.exact, y.data_ptr(), case.rows)

    return Call(run, 2.0 * case.hidden * case.rows * case.tokens)


def summary(values: list[float]) -> tuple[float, float, float]:
    return statistics.median(values), min(values), max(values)


def print_row(r: Reading) -> None:
    share, speed = r.share, r.gflop_per_s_core
    print(f"  {r.case:<28} {r.tokens:4} tokens {r.threads:3} threads {r.gb_per_s:7.2f} GB/s"
          f"  {share[0]:5.2f} of roof [{share[1]:.2f} - {share[2]:.2f}]"
          f"  {speed[0]:6.1f} GFLOP/s a core [{speed[1]:.1f} - {speed[2]:.1f}]", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
