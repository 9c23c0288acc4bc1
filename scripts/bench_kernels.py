"""How fast the torch kernels run an expert, beside what this process can read from memory at best.

    python -m scripts.bench_kernels [--repetitions 7] [--shape 2048x768]

One token is bound by reading weights: GB/s of weight bytes, and the share of the read roof (a sum over a
buffer far larger than any cache). Many tokens are bound by arithmetic: GFLOP/s. The block sizes of
`MixedLinear` are varied beside the two ways to do without it: widening the whole matrix into new memory
(`weight.float()`), and torch's bf16 product, which rounds the activations to bf16 and so is another model.

Ways take turns, so that a busy neighbour slows all of them; figures are medians with the range. Each pass
goes through 256 MiB of experts where arithmetic allows, so that none is in a cache. Weights are random:
their values do not change the speed. The block size in use appears twice: the difference is noise.
Prints a table and, as its last line, one JSON object.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from kernels.expert_ffn import ExpertFFN, ExpertWeights
from kernels.mixed_linear import MATRIX_BLOCK, VECTOR_BLOCK, MixedLinear

SHAPES = ((2048, 768), (576, 128))  # hidden x expert width: the widened demo model, and smolmoe itself
MANY_TOKENS = (
    8,
    85,
    512,
)  # 85: what one of 48 experts gets of 512 tokens, top 8
BLOCKS = tuple(1 << bits for bits in (14, 16, 17, 18, 19, 20, 22))  # elements of scratch
WORKING_SET_BYTES = 256 << 20
MOST_FLOP_A_PASS = 20e9
GB = 1e9

Linear = Callable[[Tensor, Tensor], Tensor]
Way = Callable[[Tensor, ExpertWeights], Tensor]


class BlockedLinear(MixedLinear):
    """MixedLinear with one block size for everything."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self._elements = elements

    def _blocks(self, weight: Tensor, elements: int) -> Iterator[tuple[int, int, Tensor]]:
        return super()._blocks(weight, self._elements)


@dataclass(frozen=True, slots=True)
class Measurement:
    """One way to run an expert: median and range over the passes, per expert."""

    hidden_size: int
    expert_width: int
    threads: int
    tokens: int
    way: str
    ms: float
    ms_least: float
    ms_most: float
    gb_per_s: float  # of weight bytes as stored
    gflop_per_s: float
    share_of_read_roof: float


def main() -> None:
    options = parse_arguments()
    all_threads = torch.get_num_threads()
    threads = sorted({1, all_threads})
    roofs = {n: read_roof(n, options.repetitions) for n in threads}
    print(f"read roof: {', '.join(f'{roof:.1f} GB/s with {n} threads' for n, roof in roofs.items())}")
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()};"
          f" blocks in use: one token {VECTOR_BLOCK}, many tokens {MATRIX_BLOCK} elements")  # fmt: skip
    found: list[Measurement] = []
    for shape in options.shape or SHAPES:
        for n in threads:
            found += measure(shape, 1, n, roofs[n], options.repetitions)
        for tokens in MANY_TOKENS:
            found += measure(shape, tokens, all_threads, roofs[all_threads], options.repetitions)
    print(json.dumps({
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "vector_block": VECTOR_BLOCK,
        "matrix_block": MATRIX_BLOCK,
        "repetitions": options.repetitions,
        "read_roof_gb_per_s": roofs,
        "measurements": [asdict(m) for m in found],
    }))  # fmt: skip


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--repetitions", type=int, default=7, help="passes of each way; at least 5 (default: 7)"
    )
    parser.add_argument("--shape", type=parse_shape, action="append", help="hidden x width, as in 2048x768")
    options = parser.parse_args()
    if options.repetitions < 5:
        parser.error("fewer than 5 repetitions say nothing about the spread")
    return options


def parse_shape(text: str) -> tuple[int, int]:
    hidden, width = text.split("x")
    return int(hidden), int(width)


def read_roof(threads: int, repetitions: int) -> float:
    """GB/s of a plain sum over a buffer that no cache holds: the best of the passes, since it is a roof."""
    torch.set_num_threads(threads)
    buffer = torch.ones(WORKING_SET_BYTES // 4)
    buffer.sum()
    return WORKING_SET_BYTES / min(seconds(buffer.sum) for _ in range(repetitions)) / GB


def measure(
    shape: tuple[int, int], tokens: int, threads: int, roof: float, repetitions: int
) -> list[Measurement]:
    """Time every way in turn, pass by pass; print a row for each."""
    torch.set_num_threads(threads)
    hidden, width = shape
    nbytes, flop = 2 * 3 * hidden * width, 2 * tokens * 3 * hidden * width
    experts = [random_expert(hidden, width) for _ in range(expert_count(nbytes, flop))]
    x = torch.randn(tokens, hidden)
    ways = ways_to_run(x)
    for way in ways.values():
        way(x, experts[0])
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repetitions):
        for name, way in ways.items():
            times[name].append(seconds(partial(run_all, way, x, experts)) / len(experts))
    print(f"\n{hidden} x {width}, {tokens} tokens, {threads} threads; {len(experts)} experts a pass")
    found = []
    for name, values in times.items():
        median = statistics.median(values)
        share = nbytes / median / GB / roof
        found.append(Measurement(
            hidden, width, threads, tokens, name, 1e3 * median, 1e3 * min(values), 1e3 * max(values),
            nbytes / median / GB, flop / median / GB, share,
        ))  # fmt: skip
        print_row(found[-1])
    return found


def expert_count(nbytes: int, flop: float) -> int:
    """Experts a pass: more than any cache holds, fewer where arithmetic would take seconds."""
    return max(2, min(-(-WORKING_SET_BYTES // nbytes), int(MOST_FLOP_A_PASS / flop)))


def random_expert(hidden: int, width: int) -> ExpertWeights:
    shapes = ((width, hidden), (width, hidden), (hidden, width))
    return ExpertWeights(*(torch.randn(shape).bfloat16() for shape in shapes))


def ways_to_run(x: Tensor) -> dict[str, Way]:
    """Every way to run one expert, by name; the block sizes in use are marked."""
    used = VECTOR_BLOCK if len(x) == 1 else MATRIX_BLOCK
    ways: dict[str, Way] = {"MixedLinear as it is": ExpertFFN("silu", MixedLinear()).feed_forward}
    for elements in BLOCKS:
        name = f"blocks of {elements * 4 >> 10} KiB fp32{' (in use)' if elements == used else ''}"
        ways[name] = ExpertFFN("silu", BlockedLinear(elements)).feed_forward
    ways["weight.float()"] = partial(plain_ffn, lambda x, weight: functional.linear(x, weight.float()))
    rounded = x.bfloat16()
    ways["bf16 F.linear (rounds x)"] = lambda x, expert: plain_ffn(functional.linear, rounded, expert)
    return ways


def plain_ffn(linear: Linear, x: Tensor, expert: ExpertWeights) -> Tensor:
    return linear(functional.silu(linear(x, expert.gate)) * linear(x, expert.up), expert.down)


def run_all(way: Way, x: Tensor, experts: Sequence[ExpertWeights]) -> None:
    with torch.inference_mode():
        for expert in experts:
            way(x, expert)


def seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def print_row(m: Measurement) -> None:
    spread = f"[{m.ms_least:.3f} - {m.ms_most:.3f}]"
    speed = f"{m.gb_per_s:6.2f} GB/s {m.share_of_read_roof:4.0%} of roof" if m.tokens == 1 else ""
    print(f"  {m.way:<34}{m.ms:9.3f} ms {spread:<22}{m.gflop_per_s:8.1f} GFLOP/s  {speed}")


if __name__ == "__main__":
    main()
