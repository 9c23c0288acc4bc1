"""One MoE layer on a GPU, from the activations to the sum: our kernels beside torch's and transformers' ways.

    python -m scripts.bench_gpu_moe [--shapes qwen3,mixtral] [--formats bf16,int4] [--tokens 1,...,4096]
    python -m scripts.bench_gpu_moe --tune     # measures tile shapes, writes kernels/tuning/sm<family>.json

Times are of CUDA graphs, medians, several routings in turn. Bounds are measured in the same run: `hbm` is the
time of the active experts' bytes at the rate of a large copy (bytes read and written), `peak` the floating
point operations over those of a large bf16 matrix product. Weights and activations are random, outputs
poisoned before each check; the check compares some tokens' results with float64 on the same decoded weights.
Peers work on the bf16 weights that the bf16 format has:

    grouped   transformers' grouped_mm: sort, two torch._grouped_mm, products in bf16 put back in order, sum
    batched   transformers' batched_mm: the chosen experts' weights gathered, two bmm (up to 8 tokens)
    eager     transformers' loop over experts; its host reads which experts are hit, so it is timed without a
    graph

Up to 4 tokens ours are the decode kernels (kernels/triton_decode.py). Prints a table and, as its last line,
one JSON object.
"""

import argparse
import itertools
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kernels.expert_slots import FLOATS, FORMATS, pack_expert, slot_bytes, unpack_expert
from kernels.triton_decode import MOST_TOKENS, ExpertDecode
from kernels.triton_moe import TUNING, ExpertPrefill

Product = dict[str, int]  # the tile shape of up or down

DEVICE = "cuda"
ROUTINGS = 4  # in turn, so that an expert's weights are rarely still in the L2
CHECKED_TOKENS = 6
MOST_BATCHED = 8  # tokens; beyond, gathered weights are many times what is computed with


@dataclass(frozen=True)
class Shape:
    """A MoE layer."""

    hidden: int
    width: int
    experts: int
    top_k: int


SHAPES = {"qwen3": Shape(2048, 768, 128, 8), "mixtral": Shape(4096, 14336, 8, 2)}
TOKENS = (1, 2, 4, 8, 33, 64, 512, 4096)
TUNED_TOKENS = (8, 33, 64, 128, 512, 1024, 2048, 4096)

# Tile rows: (swap, columns, depth, warps, stages, programs a multiprocessor) of up; down has twice the
# columns.
ROWS_SMALL = (
    (1, 64, 128, 4, 4, 1), (1, 64, 128, 4, 3, 2), (1, 32, 128, 4, 4, 2), (1, 32, 128, 4, 3, 3),
    (0, 32, 128, 4, 4, 2), (0, 64, 128, 4, 3, 2), (1, 64, 64, 4, 5, 2),
)  # fmt: skip
ROWS = {
    16: ROWS_SMALL,
    32: ROWS_SMALL,
    64: (
        (1, 128, 64, 8, 4, 1), (0, 128, 64, 4, 4, 1), (0, 64, 64, 4, 4, 2), (0, 128, 64, 8, 4, 1),
        (1, 64, 64, 4, 3, 3), (0, 64, 64, 4, 3, 3), (1, 64, 64, 4, 4, 2),
    ),
    128: (
        (0, 128, 64, 8, 4, 1), (0, 128, 64, 8, 3, 1), (0, 64, 64, 8, 3, 2), (1, 64, 64, 8, 3, 2),
        (1, 128, 64, 8, 4, 1),
    ),
    256: ((0, 64, 64, 8, 4, 1), (0, 64, 64, 8, 3, 1), (1, 64, 64, 8, 4, 1)),
}  # fmt: skip
# Packed: swap 0 is two products (gate and up, or two halves of down), 1 and 2 one, in two turns or in one.
PACKED_SMALL = (
    (0, 64, 128, 4, 4, 3), (0, 64, 128, 4, 3, 4), (0, 64, 128, 4, 5, 2), (2, 64, 128, 8, 4, 2),
    (2, 64, 256, 8, 3, 2), (1, 64, 128, 8, 2, 3), (2, 32, 128, 4, 4, 4), (2, 32, 256, 4, 3, 4),
    (1, 32, 128, 4, 2, 5),
)  # fmt: skip
PACKED = {
    16: PACKED_SMALL,
    32: PACKED_SMALL,
    64: (
        (0, 64, 128, 4, 3, 2), (0, 128, 128, 8, 3, 1), (2, 64, 128, 8, 3, 2), (1, 64, 128, 8, 2, 2),
        (2, 64, 128, 8, 4, 2),
    ),
    128: (
        (0, 128, 128, 8, 3, 1), (2, 64, 128, 8, 2, 2), (1, 64, 64, 8, 2, 2), (1, 64, 64, 8, 3, 1),
        (2, 64, 64, 8, 4, 2),
    ),
    256: ((1, 64, 64, 8, 3, 1), (1, 64, 64, 8, 2, 1), (2, 64, 128, 8, 2, 1), (2, 64, 64, 8, 3, 1)),
}  # fmt: skip


class Layer:
    """Random experts of one format in an arena, in permuted slots with a gap, and routings."""

    def __init__(self, shape: Shape, format: str) -> None:
        self.shape, self.format = shape, format
        generator = torch.Generator(DEVICE).manual_seed(1)
        stride = -(-slot_bytes(format, shape.hidden, shape.width) // 4096) * 4096
        self.arena = torch.empty(shape.experts + 1, stride, dtype=torch.uint8, device=DEVICE)
        self.table = torch.randperm(shape.experts + 1, device=DEVICE, generator=generator)
        self.table = self.table[: shape.experts].int()
        for slot in self.table.tolist():
            weights = [
                torch.randn(rows, columns, device=DEVICE, generator=generator) / math.sqrt(columns)
                for rows, columns in self._matrices()
            ]
            blob = pack_expert(format, *weights)
            self.arena[slot, : len(blob)] = blob

    def _matrices(self) -> tuple[tuple[int, int], ...]:
        hidden, width = self.shape.hidden, self.shape.width
        return (width, hidden), (width, hidden), (hidden, width)

    def dense(self, expert: int) -> tuple[Tensor, ...]:
        """gate, up, down in fp32."""
        hidden, width = self.shape.hidden, self.shape.width
        blob = self.arena[int(self.table[expert]), : slot_bytes(self.format, hidden, width)]
        return unpack_expert(self.format, blob, hidden, width)

    def events(self, tokens: int) -> list["Event"]:
        return [Event(self.shape, tokens, seed) for seed in range(ROUTINGS)]

    def active_bytes(self, events: list["Event"]) -> float:
        active = statistics.mean(len(event.ids.unique()) for event in events)
        return active * slot_bytes(self.format, self.shape.hidden, self.shape.width)

    def flops(self, tokens: int) -> float:
        return 6.0 * tokens * self.shape.top_k * self.shape.hidden * self.shape.width


class Event:
    """The tokens of one call: activations, experts chosen uniformly, weights that sum to 1."""

    def __init__(self, shape: Shape, tokens: int, seed: int) -> None:
        generator = torch.Generator(DEVICE).manual_seed(seed)
        self.h = torch.randn(tokens, shape.hidden, device=DEVICE, generator=generator)
        scores = torch.rand(tokens, shape.experts, device=DEVICE, generator=generator)
        top = scores.topk(shape.top_k, 1)
        self.ids = top.indices.int()
        self.weights = (top.values / top.values.sum(1, keepdim=True)).contiguous()
        self.x = torch.randn(tokens, shape.hidden, device=DEVICE, generator=generator)


def microseconds(calls: list[Callable[[], Any]], graph: bool = True, least_s: float = 0.02) -> float:
    """The median time of one call, all of them in turn."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    replay: Callable[[], Any]
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            for call in calls:
                call()
        replay = captured.replay
    else:

        def replay() -> None:
            for call in calls:
                call()

    def timed(count: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(count):
            replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e3 / count / len(calls)

    once = timed(1)
    count = max(1, min(50, int(least_s / 5 * 1e6 / (once * len(calls)))))
    return statistics.median(timed(count) for _ in range(5))


def copy_rate() -> float:
    """Bytes read and written a second by a copy of 2 GiB: the driver's or a kernel's, whichever is faster."""
    source = torch.empty(2 << 30, dtype=torch.uint8, device=DEVICE).random_().view(torch.int32)
    target = torch.empty_like(source)
    ways = (lambda: target.copy_(source), lambda: torch.neg(source, out=target))
    return 2 * source.numel() * 4 / min(microseconds([way], least_s=0.1) for way in ways) * 1e6


def matmul_rate() -> float:
    """Floating point operations a second of a bf16 product of 8192 x 8192 matrices."""
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / microseconds([lambda: a @ b], least_s=0.2) * 1e6


# ---- ours --------------------------------------------------------------------------------------------------


def ours(layer: Layer, tokens: int) -> Callable[[Event], None]:
    """The layer's event into event.x."""
    shape = layer.shape
    common = (shape.hidden, shape.width, layer.format, "silu", shape.top_k)
    if tokens <= MOST_TOKENS:
        decode = ExpertDecode(*common, tokens, DEVICE)
        decode.products.fill_(math.nan)

        def run_decode(event: Event) -> None:
            decode.run(event.h, layer.table[event.ids.flatten()], layer.arena)
            decode.combine(event.weights, event.x)

        return run_decode
    prefill = ExpertPrefill(*common, shape.experts, tokens, DEVICE)
    poison(prefill)

    def run(event: Event) -> None:
        prefill.run(event.h, event.ids, layer.table, layer.arena)
        prefill.combine(event.weights, event.x)

    return run


def poison(prefill: ExpertPrefill) -> None:
    for buffer in (prefill.products, prefill._x, prefill._h):
        buffer.fill_(math.nan)


def error(layer: Layer, event: Event, run: Callable[[Event], None]) -> float:
    """The relative error of some tokens against float64."""
    before = event.x.clone()
    run(event)
    got = (event.x - before).double()
    event.x.copy_(before)
    tokens = torch.linspace(0, len(got) - 1, min(CHECKED_TOKENS, len(got))).long().tolist()
    want = torch.zeros(len(tokens), layer.shape.hidden, dtype=torch.float64, device=DEVICE)
    for row, token in enumerate(tokens):
        for k, expert in enumerate(event.ids[token].tolist()):
            gate, up, down = layer.dense(expert)
            h = event.h[token].double()
            hidden = functional.silu(gate.double() @ h) * (up.double() @ h)
            want[row] += event.weights[token, k].double() * (down.double() @ hidden)
    # The residual stream's own rounding, fp32, is far below what bf16 leaves.
    return float((got[tokens] - want).norm() / want.norm())


# ---- peers -------------------------------------------------------------------------------------------------


class Peers:
    """What transformers 5 does with stacked bf16 weights (integrations/moe.py), written out."""

    def __init__(self, layer: Layer) -> None:
        self.shape = layer.shape
        hidden, width, experts = layer.shape.hidden, layer.shape.width, layer.shape.experts
        self.gate_up = torch.empty(experts, 2 * width, hidden, dtype=torch.bfloat16, device=DEVICE)
        self.down = torch.empty(experts, hidden, width, dtype=torch.bfloat16, device=DEVICE)
        for expert in range(experts):
            gate, up, down = layer.dense(expert)
            self.gate_up[expert] = torch.cat([gate, up])
            self.down[expert] = down

    def grouped(self, h: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        experts, perm = torch.sort(ids.reshape(-1))
        x = h[perm // self.shape.top_k]
        counts = torch.histc(experts.int(), bins=self.shape.experts, min=0, max=self.shape.experts - 1)
        offsets = torch.cumsum(counts, 0, dtype=torch.int32)
        gate, up = torch._grouped_mm(x, self.gate_up.transpose(-2, -1), offs=offsets).chunk(2, -1)
        out = torch._grouped_mm(functional.silu(gate) * up, self.down.transpose(-2, -1), offs=offsets)
        out = out * weights.reshape(-1)[perm].unsqueeze(-1)
        inverse = torch.empty_like(perm)
        inverse[perm] = torch.arange(len(perm), device=DEVICE)
        return out[inverse].view(len(h), self.shape.top_k, -1).sum(1).to(h.dtype)

    def batched(self, h: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        x, flat = h.repeat_interleave(self.shape.top_k, 0), ids.reshape(-1)
        gate, up = torch.bmm(self.gate_up[flat], x.unsqueeze(-1)).squeeze(-1).chunk(2, -1)
        out = torch.bmm(self.down[flat], (functional.silu(gate) * up).unsqueeze(-1)).squeeze(-1)
        out = out * weights.reshape(-1, 1)
        return out.view(len(h), self.shape.top_k, -1).sum(1).to(h.dtype)

    def eager(self, h: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        y = torch.zeros_like(h)
        mask = functional.one_hot(ids, self.shape.experts).permute(2, 1, 0)
        for (expert,) in torch.greater(mask.sum((-1, -2)), 0).nonzero():
            place, token = torch.where(mask[expert])
            gate, up = functional.linear(h[token], self.gate_up[expert]).chunk(2, -1)
            out = functional.linear(functional.silu(gate) * up, self.down[expert])
            y.index_add_(0, token, (out * weights[token, place, None]).to(y.dtype))
        return y

    def times(self, events: list[Event]) -> dict[str, float]:
        tokens = len(events[0].h)
        inputs = [(e.h.bfloat16(), e.ids.long(), e.weights.bfloat16()) for e in events]

        def time_of(way: Callable[..., Tensor], graph: bool = True) -> float:
            return microseconds([lambda i=i: way(*i) for i in inputs], graph)

        found = {"grouped": time_of(self.grouped)}
        if tokens <= MOST_BATCHED:
            found["batched"] = time_of(self.batched)
        return found | {"eager": time_of(self.eager, graph=False)}


# ---- tuning ------------------------------------------------------------------------------------------------


def candidates(shape: Shape, format: str, tokens: int) -> Iterator[tuple[int, Product, Product]]:
    """Tile rows and the shapes of up and down, to be chosen apart."""
    pairs = tokens * shape.top_k
    rows = pairs / min(shape.experts, pairs)
    for tile_rows, options in (ROWS if format in FLOATS else PACKED).items():
        if min(rows / 4, 128) <= tile_rows <= max(16, 2 * rows):
            for option in options:
                names = ("swap", "columns", "depth", "warps", "stages", "per_sm")
                up = dict(zip(names, option, strict=True))
                if FLOATS.get(format) == torch.float32:
                    up["depth"] //= 2
                yield tile_rows, up, up | {"columns": 2 * up["columns"]}


def config_of(tile_rows: int, up: Product, down: Product, tma: bool = True) -> dict[str, Any]:
    return {"tile_rows": tile_rows, "tma": tma, "up": up, "down": down}


def entry_of(shape: Shape, format: str, rows: float, config: dict[str, Any]) -> dict[str, Any]:
    size = {"format": format, "hidden": shape.hidden, "width": shape.width, "rows": round(rows, 2)}
    return size | {"config": config}


def compile_one(job: tuple[Shape, str, int, Product, Product]) -> str | None:
    """In a process of its own: the kernels into Triton's cache, by running them for no expert at all."""
    shape, format, tile_rows, up, down = job
    stride = -(-slot_bytes(format, shape.hidden, shape.width) // 4096) * 4096
    entry = entry_of(shape, format, 1, config_of(tile_rows, up, down))
    try:
        prefill = ExpertPrefill(
            shape.hidden, shape.width, format, "silu", shape.top_k, shape.experts, 16, DEVICE, tuning=[entry]
        )
        h = torch.zeros(16, shape.hidden, device=DEVICE)
        ids = torch.zeros(16, shape.top_k, dtype=torch.int32, device=DEVICE)
        nobody = torch.full((shape.experts,), -1, dtype=torch.int32, device=DEVICE)
        prefill.run(h, ids, nobody, torch.zeros(1, stride, dtype=torch.uint8, device=DEVICE))
        torch.cuda.synchronize()
    except Exception as problem:  # of one candidate: the others go on
        return f"{format} {tile_rows} {up}: {str(problem).splitlines()[0][:100]}"
    return None


def shipped_jobs(shape: str, format: str, tokens: int) -> list[Any]:
    """What compile_one needs for the tile shapes that this call will take."""
    if tokens <= MOST_TOKENS:
        return []
    size = SHAPES[shape]
    prefill = ExpertPrefill(size.hidden, size.width, format, "silu", size.top_k, size.experts, 1, DEVICE)
    config = prefill.config(tokens)
    return [(size, format, config["tile_rows"], config["up"], config["down"])]


def compile_all(jobs: list[Any]) -> None:
    jobs = list({repr(job): job for job in jobs}.values())
    if not jobs:
        return
    begin = time.perf_counter()
    workers = min(len(jobs), os.cpu_count() or 1)
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        problems = [p for p in pool.imap_unordered(compile_one, jobs) if p]
    say(f"{len(jobs)} pairs of kernels compiled in {time.perf_counter() - begin:.0f} s")
    for problem in problems:
        say("  cannot: " + problem)


def tune(shapes: list[Shape], formats: list[str], tokens: list[int]) -> list[dict[str, Any]]:
    """The fastest tile shapes of each (shape, format, tokens): up and down each alone, then together."""
    cases = itertools.product(shapes, formats, tokens)
    jobs = [(shape, format, *c) for shape, format, count in cases for c in candidates(shape, format, count)]
    compile_all(jobs)
    entries = []
    for shape, format in itertools.product(shapes, formats):
        layer = Layer(shape, format)
        for count in tokens:
            entries.append(tune_one(layer, count))
        del layer
        torch.cuda.empty_cache()
    return entries


def tune_one(layer: Layer, tokens: int) -> dict[str, Any]:
    shape, event = layer.shape, Event(layer.shape, tokens, 0)
    best: dict[int, dict[str, tuple[float, Product]]] = {}
    lines: list[Any] = []
    wanted: Tensor | None = None
    for tile_rows, up, down in candidates(shape, layer.format, tokens):
        entry = entry_of(shape, layer.format, 1, config_of(tile_rows, up, down))
        prefill = ExpertPrefill(
            shape.hidden, shape.width, layer.format, "silu", shape.top_k, shape.experts, tokens, DEVICE,
            tuning=[entry],
        )  # fmt: skip
        try:
            poison(prefill)
            prefill.run(event.h, event.ids, layer.table, layer.arena)
            if wanted is None:
                wanted = prefill.products.float()
            off = float((prefill.products - wanted).norm() / wanted.norm())
            assert off < 0.02, f"differs from the first candidate by {off:.1e}"  # both rounded to bf16
            x, config = prefill._x[:tokens], prefill.config(tokens)
            for name, product, call in (
                ("up", up, lambda p=prefill, c=config, x=x: p.launch_up(x, layer.arena, c)),
                ("down", down, lambda p=prefill, c=config: p.launch_down(layer.arena, c)),
            ):
                took = microseconds([call], least_s=0.01)
                lines.append((name, took, tile_rows, tuple(product.values())))
                of_rows = best.setdefault(tile_rows, {})
                if name not in of_rows or took < of_rows[name][0]:
                    of_rows[name] = (took, product)
        except Exception as problem:  # of one candidate: the others go on
            say(f"  {layer.format} T={tokens} {tile_rows} {up}: {str(problem).splitlines()[0][:90]}")
    tile_rows = min(best, key=lambda rows: best[rows]["up"][0] + best[rows]["down"][0])
    chosen = best[tile_rows]
    pairs = tokens * shape.top_k
    rows = pairs / min(shape.experts, pairs)
    for name in ("up", "down"):
        shown = sorted(line for line in lines if line[0] == name)[:4]
        say(
            f"{shape.hidden}x{shape.width} {layer.format} T={tokens} {name}: "
            + "; ".join(f"{took:.0f} us {rows} {option}" for _, took, rows, option in shown)
        )
    entry = entry_of(shape, layer.format, rows, config_of(tile_rows, chosen["up"][1], chosen["down"][1]))
    return entry | {"us": {name: round(chosen[name][0], 1) for name in chosen}}


# ---- the table ---------------------------------------------------------------------------------------------


def bench(shapes: list[str], formats: list[str], tokens: list[int], peers: bool) -> dict[str, Any]:
    compile_all([job for case in itertools.product(shapes, formats, tokens) for job in shipped_jobs(*case)])
    hbm, peak = copy_rate(), matmul_rate()
    name = torch.cuda.get_device_name()
    say(f"{name}: copy {hbm / 1e12:.2f} TB/s, bf16 matrix product {peak / 1e12:.0f} TFLOP/s")
    say(
        f"{'shape':8} {'T':>5} {'format':6} {'us':>8} {'hbm':>5} {'peak':>5} {'error':>8}"
        f" {'grouped':>8} {'batched':>8} {'eager':>8}"
    )
    rows = []
    for shape_name in shapes:
        of_peers: dict[int, dict[str, float]] = {}
        for format in formats:
            layer = Layer(SHAPES[shape_name], format)
            if peers and not of_peers and format == "bf16":
                stacked = Peers(layer)
                of_peers = {count: stacked.times(layer.events(count)) for count in tokens}
                del stacked
                torch.cuda.empty_cache()
            for count in tokens:
                rows.append(row := {"shape": shape_name, "tokens": count, "format": format})
                try:
                    measure(layer, count, hbm, peak, row)
                except Exception as problem:  # of one row: the others go on
                    row["problem"] = str(problem).splitlines()[0]
                row |= of_peers.get(count, {})
                say(shown(row))
            del layer
            torch.cuda.empty_cache()
    return {"device": name, "copy_bytes_per_s": hbm, "matmul_flops_per_s": peak, "rows": rows}


def measure(layer: Layer, tokens: int, hbm: float, peak: float, row: dict[str, Any]) -> None:
    events, run = layer.events(tokens), ours(layer, tokens)
    row["error"] = max(error(layer, event, run) for event in events[:2])
    took = microseconds([lambda e=event: run(e) for event in events])
    row["us"] = took
    row["hbm"] = layer.active_bytes(events) / hbm / took * 1e6
    row["peak"] = layer.flops(tokens) / peak / took * 1e6


def shown(row: dict[str, Any]) -> str:
    begin = f"{row['shape']:8} {row['tokens']:5} {row['format']:6}"
    if "us" not in row:
        return f"{begin} {row['problem'][:90]}"
    peers = "".join(f" {row[p]:8.0f}" if p in row else " " * 9 for p in ("grouped", "batched", "eager"))
    return f"{begin} {row['us']:8.1f} {row['hbm']:5.2f} {row['peak']:5.2f} {row['error']:8.1e}{peers}"


def say(line: str) -> None:
    print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--formats", default="bf16,int4", help=f"of {', '.join(FORMATS)}")
    parser.add_argument("--tokens", default="")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--no-peers", action="store_true")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("torch sees no NVIDIA GPU")
    shapes, formats = arguments.shapes.split(","), arguments.formats.split(",")
    default = TUNED_TOKENS if arguments.tune else TOKENS
    tokens = [int(count) for count in arguments.tokens.split(",") if count] or list(default)
    if arguments.tune:
        major, minor = torch.cuda.get_device_capability()
        entries = tune([SHAPES[shape] for shape in shapes], formats, tokens)
        TUNING.mkdir(exist_ok=True)
        path = TUNING / f"sm{major}{minor}.json"
        kept = {} if not path.exists() else {key(e): e for e in json.loads(path.read_text())["entries"]}
        kept |= {key(entry): entry for entry in entries}
        lines = ",\n".join(json.dumps(kept[k]) for k in sorted(kept))
        device = json.dumps(torch.cuda.get_device_name())
        path.write_text(f'{{"device": {device}, "entries": [\n{lines}\n]}}\n')
        say(f"wrote {path}")
    else:
        print(json.dumps(bench(shapes, formats, tokens, not arguments.no_peers)))


def key(entry: dict[str, Any]) -> tuple[str, int, int, float]:
    return entry["format"], entry["hidden"], entry["width"], entry["rows"]


if __name__ == "__main__":
    main()
