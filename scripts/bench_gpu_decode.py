"""The decode kernels on a GPU: correct against float64, then timed by replaying CUDA graphs.

    python scripts/bench_gpu_decode.py [--tune] [--no-check] [--formats LIST]

Every graph holds several calls, each on other experts or other weights, together larger than the L2 cache.
Weights are random matrices in each format; of a layer's experts one is drawn and copied into all slots.
Fractions are of the rate at which this GPU copies (bytes read and written), counted on the weights' bytes.
--tune times launch shapes and writes the best to kernels/tuning/decode_sm90.json. Ends with one JSON object.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from kernels import expert_slots  # noqa: E402
from kernels.reference import moe_reference  # noqa: E402
from kernels.triton_decode import (  # noqa: E402
    ExpertDecode,
    GpuMatrix,
    Shape,
    linear,
    tuned_shapes,
)
from kernels.triton_rope import rope_and_store  # noqa: E402
from kernels.triton_router import route  # noqa: E402

DEVICE = "cuda"
FORMATS = ("bf16", "int8", "int4", "fp8", "mxfp4")
BYTES = {"bf16": 2.0, "fp8": 1.0, "mxfp4": 0.5}  # of a weight
ROTATE_BYTES = 400 << 20  # eight times the L2 cache of an H100
PROCESSES = 14  # that compile


class Model(NamedTuple):
    """The shape of a MoE layer, and of the dense matrices around it (rows, columns)."""

    name: str
    experts: int
    top_k: int
    hidden: int
    width: int
    dense: tuple[tuple[int, int], ...]


QWEN3 = Model("Qwen3", 128, 8, 2048, 768, ((5120, 2048), (2048, 4096), (151936, 2048)))
MIXTRAL = Model("Mixtral", 8, 2, 4096, 14336, ())
MODELS = (QWEN3, MIXTRAL)


def replay_s(calls: list[Callable[[], None]], repeats: int = 7) -> float:
    """Median seconds of a call, when a graph of all of them is replayed."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        calls[0]()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e-3 / len(calls))
    return statistics.median(times)


def copy_rate() -> float:
    """Bytes read and written a second."""
    a, b = (torch.empty(1 << 28, dtype=torch.float32, device=DEVICE) for _ in range(2))
    return 2 * a.nbytes / replay_s([lambda: b.copy_(a)] * 4)


# ---- correctness -------------------------------------------------------------------------------------------


def random_expert(model: Model, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    def make(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, device=DEVICE, generator=generator) / columns**0.5

    shape = (model.width, model.hidden)
    return make(*shape), make(*shape), make(model.hidden, model.width)


def check_experts(model: Model, format: str, exact: bool) -> dict[str, float]:
    """Relative errors by the number of tokens, against float64 on the format's own values."""
    generator = torch.Generator(DEVICE).manual_seed(1)
    count = min(model.experts, 12)
    stride = -(-expert_slots.slot_bytes(format, model.hidden, model.width) // 4096) * 4096
    arena = torch.full((count + 1, stride), 0x77, dtype=torch.uint8, device=DEVICE)
    values, slot_of = [], torch.randperm(count + 1)[:count].int()
    for e in range(count):
        blob = expert_slots.pack_expert(format, *random_expert(model, generator))
        arena[slot_of[e], : len(blob)] = blob
        three = expert_slots.unpack_expert(format, blob, model.hidden, model.width)
        values.append((three[0].double(), three[1].double(), three[2].double()))
    errors = {}
    for tokens in (1, 2, 4):
        ids = torch.stack([torch.randperm(count)[: model.top_k] for _ in range(tokens)])
        x = torch.randn(tokens, model.hidden, device=DEVICE, generator=generator)
        weights = torch.rand(tokens, model.top_k, device=DEVICE, generator=generator)
        experts = ExpertDecode(
            model.hidden, model.width, format, "silu", model.top_k, tokens, DEVICE, exact
        )
        slots = slot_of[ids].flatten()
        early = torch.rand(len(slots)) < 0.5
        results = []
        for parts in ([slots], [slots.where(early, -1), slots.where(~early, -1)]):
            experts.products.fill_(float("nan"))
            y = torch.zeros_like(x)
            for part in parts:
                experts.run(x, part.to(DEVICE, torch.int32), arena)
            experts.combine(weights, y)
            results.append(y)
        assert torch.equal(*results), f"{model.name} {format} T={tokens}: late experts change the bits"
        expected = moe_reference(x.double(), ids, weights.double(), values, "silu")
        errors[f"T={tokens}"] = float((results[0].double() - expected).norm() / expected.norm())
    return errors


def check_linear(format: str, exact: bool, rows: int = 1000, columns: int = 2880) -> dict[str, float]:
    """Likewise of a dense product with a norm before it."""
    generator = torch.Generator(DEVICE).manual_seed(2)
    data = expert_slots.pack_matrix(
        format, torch.randn(rows, columns, device=DEVICE, generator=generator)
    )
    values = expert_slots.unpack_matrix(format, data, rows, columns).double()
    norm = torch.rand(columns, device=DEVICE, generator=generator) + 0.5
    errors = {}
    for tokens in (1, 2, 4):
        x = 3 * torch.randn(tokens, columns, device=DEVICE, generator=generator)
        out = torch.full((tokens, rows), float("nan"), device=DEVICE)
        linear(x, GpuMatrix(data, format, rows, columns), out, norm=norm, eps=1e-6, exact=exact)
        wide = x.double()
        expected = (wide / (wide.square().mean(1, keepdim=True) + 1e-6).sqrt() * norm) @ values.T
        errors[f"T={tokens}"] = float((out - expected).norm() / expected.norm())
    return errors


# ---- what is timed -----------------------------------------------------------------------------------------


class Layer:
    """Slots of experts, all with the same bytes, and calls of the decoder on ever different ones."""

    def __init__(self, model: Model, format: str, slots: int) -> None:
        self.model, self.format = model, format
        self.bytes = expert_slots.slot_bytes(format, model.hidden, model.width)
        self.arena = torch.zeros(slots, -(-self.bytes // 4096) * 4096, dtype=torch.uint8, device=DEVICE)
        if slots > 1:
            generator = torch.Generator(DEVICE).manual_seed(3)
            self.arena[:, : self.bytes] = expert_slots.pack_expert(format, *random_expert(model, generator))

    def decoder(self, tokens: int) -> ExpertDecode:
        model = self.model
        return ExpertDecode(model.hidden, model.width, self.format, "silu", model.top_k, tokens, DEVICE)

    def time(self, tokens: int, decoder: ExpertDecode, parts: str = "up down combine") -> tuple[float, float]:
        """Seconds of a call, bytes of its distinct experts."""
        model = self.model
        x, weights = (torch.randn(tokens, n, device=DEVICE) for n in (model.hidden, model.top_k))
        generator = torch.Generator().manual_seed(4)
        calls: list[Callable[[], None]] = []
        distinct = []
        for _ in range(max(4, min(48, ROTATE_BYTES // (self.bytes * model.top_k)))):
            ids = torch.stack(
                [torch.randperm(len(self.arena), generator=generator)[: model.top_k] for _ in range(tokens)]
            )
            distinct.append(len(ids.unique()))
            slots = ids.flatten().to(DEVICE, torch.int32)

            def call(slots: Tensor = slots) -> None:
                if "up" in parts:
                    decoder.up(x, slots, self.arena)
                if "down" in parts:
                    decoder.down(slots, self.arena)
                if "combine" in parts:
                    decoder.combine(weights, x)

            calls.append(call)
        return replay_s(calls), statistics.mean(distinct) * self.bytes


def dense_matrices(format: str, rows: int, columns: int) -> list[GpuMatrix]:
    """Copies of one random matrix, more bytes than L2 holds."""
    weight = torch.randn(min(rows, 8192), columns, device=DEVICE) / columns**0.5
    data = expert_slots.pack_matrix(format, weight)
    data = data.repeat(-(-rows // len(weight)))[: expert_slots.matrix_bytes(format, rows, columns)]
    copies = max(2, min(16, ROTATE_BYTES // len(data)))
    return [GpuMatrix(data.clone(), format, rows, columns) for _ in range(copies)]


def time_dense(matrices: list[GpuMatrix], tokens: int, shape: Shape | None = None) -> float:
    """Seconds of a product with a norm before it."""
    _, _, rows, columns = matrices[0]
    x, norm = torch.randn(tokens, columns, device=DEVICE), torch.rand(columns, device=DEVICE)
    out = torch.empty(tokens, rows, device=DEVICE)
    return replay_s([lambda m=m: linear(x, m, out, norm=norm, eps=1e-6, shape=shape) for m in matrices])  # type: ignore[misc]


def router_calls(tokens: int, model: Model, layers: int) -> list[Callable[[], None]]:
    """Of different routers."""
    x, norm = torch.randn(tokens, model.hidden, device=DEVICE), torch.rand(model.hidden, device=DEVICE)
    table = torch.arange(model.experts, device=DEVICE, dtype=torch.int32)
    h, probabilities = torch.empty_like(x), torch.empty(tokens, model.experts, device=DEVICE)
    weights = torch.empty(tokens, model.top_k, device=DEVICE)
    ids, slots, missed = weights.int(), weights.int(), torch.full((1,), 99, device=DEVICE, dtype=torch.int32)
    results = (table, h, probabilities, ids, weights, slots, missed, 0)
    routers = [torch.randn(model.experts, model.hidden, device=DEVICE) for _ in range(layers)]
    return [lambda router=router: route(x, norm, 1e-6, router, True, *results) for router in routers]  # type: ignore[misc]


def rope_call(tokens: int, heads: int = 32, kv_heads: int = 4, head_dim: int = 128) -> Callable[[], None]:
    """Of Qwen3-30B-A3B's heads."""
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim, device=DEVICE)
    cos, sin = (torch.randn(4096, head_dim, device=DEVICE) for _ in range(2))
    keys, values = (torch.zeros(tokens, 4096, kv_heads, head_dim, device=DEVICE).half() for _ in range(2))
    q = torch.empty(tokens, heads, head_dim, device=DEVICE, dtype=torch.float16)
    sequences = torch.arange(tokens, device=DEVICE, dtype=torch.int32)
    positions, norm = torch.full_like(sequences, 77), torch.rand(head_dim, device=DEVICE)

    def call() -> None:
        rope_and_store(
            qkv, cos, sin, sequences[:, None], positions, keys, values, q,
            heads=heads, kv_heads=kv_heads, head_dim=head_dim,
            qk_norm="head", q_norm=norm, k_norm=norm, eps=1e-6,
        )  # fmt: skip

    return call


def layer_calls(format: str, layers: int) -> list[Callable[[], None]]:
    """Whole Qwen3 layers for one token but for attention itself, each with weights of its own."""
    model = QWEN3
    blocks = [Layer(model, format, 24) for _ in range(layers)]
    decoder = blocks[0].decoder(1)
    qkv, o = (
        [dense_matrices(format, *shape)[0] for _ in range(layers)] for shape in model.dense[:2]
    )
    x, norm = torch.randn(1, model.hidden, device=DEVICE), torch.rand(model.hidden, device=DEVICE)
    qkv_out, y = torch.empty(1, model.dense[0][0], device=DEVICE), torch.randn(1, 4096, device=DEVICE)
    slots = [torch.randperm(24)[: model.top_k].to(DEVICE, torch.int32) for _ in range(layers)]
    weights = torch.rand(1, model.top_k, device=DEVICE)
    rope, routers = rope_call(1), router_calls(1, model, layers)

    def call(i: int) -> None:
        linear(x, qkv[i], qkv_out, norm=norm, eps=1e-6)
        rope()
        linear(y, o[i], x, residual=True)
        routers[i]()
        decoder.run(x, slots[i], blocks[i].arena)
        decoder.combine(weights, x)

    return [lambda i=i: call(i) for i in range(layers)]  # type: ignore[misc]


# ---- tuning ------------------------------------------------------------------------------------------------


class Job(NamedTuple):
    """A kernel in one launch shape."""

    model: Model
    kernel: str
    format: str
    columns: int
    shape: Shape


def shapes_to_try(kernel: str, format: str, columns: int) -> list[Shape]:
    """Those whose weights, the chunk in use and the next, fit the registers."""
    padded = 1 << (columns - 1).bit_length()
    if format in expert_slots.BITS:
        bits = expert_slots.BITS[format]
        tiles = {2: 4} if kernel == "up" else {r: r for r in (1, 2, 4)}
        most = 64 if kernel == "up" else 32
        return [
            Shape(r, w, n, run)
            for r, count in tiles.items()
            for w in (1, 2, 4, 8)
            for n in sorted({n for n in (512, 1024, 2048, 4096) if n < columns} | {padded})
            for run in (4, 8)
            if 16 <= count * n * bits / (64 * w) <= (2 * most if n >= columns else most)
        ]
    matrices = 2 if kernel == "up" else 1
    return [
        Shape(r, w, n)
        for r in (1, 2, 4, 8, 16)
        for w in (1, 2, 4, 8)
        for n in sorted({n for n in (1024, 2048, 4096) if n < columns} | {padded})
        if 16 <= matrices * r * n * BYTES[format] / (128 * w) <= (64 if n >= columns else 32)
        and 8 <= n / (32 * w) <= 32
    ]


def jobs(models: tuple[Model, ...], formats: tuple[str, ...]) -> list[Job]:
    """Each (kernel, format, columns) once."""
    found = {}
    for model in models:
        for format in formats:
            kernels = [("up", model.hidden), ("down", model.width)]
            if format in ("bf16", *expert_slots.BITS):
                kernels += [("linear", columns) for columns in sorted({c for _, c in model.dense})]
            for kernel, columns in kernels:
                for shape in shapes_to_try(kernel, format, columns):
                    found[kernel, format, columns, shape] = Job(model, kernel, format, columns, shape)
    return list(found.values())


def compile_job(job: Job) -> str:
    """In a process of its own: leaves the kernel in Triton's cache. Returns what went wrong."""
    model, kernel, format, columns, shape = job
    try:
        if kernel == "linear":
            size = expert_slots.matrix_bytes(format, 64, columns)
            data = torch.zeros(size, dtype=torch.uint8, device=DEVICE)
            x, out = torch.zeros(1, columns, device=DEVICE), torch.empty(1, 64, device=DEVICE)
            linear(x, GpuMatrix(data, format, 64, columns), out, norm=x[0], eps=1e-6, shape=shape)
        else:
            layer = Layer(model, format, 1)
            decoder = layer.decoder(1)
            slots = torch.zeros(model.top_k, dtype=torch.int32, device=DEVICE)
            decoder.up_shape = decoder.down_shape = shape
            if kernel == "up":
                decoder.up(torch.zeros(1, model.hidden, device=DEVICE), slots, layer.arena)
            else:
                decoder.down(slots, layer.arena)
        torch.cuda.synchronize()
    except Exception as error:  # one shape too large must not end the others
        return f"{job[1:]}: {str(error)[:200]}"
    return ""


def in_processes(work: Callable[[Any], Any], items: list[Any]) -> list[Any]:
    with multiprocessing.get_context("spawn").Pool(PROCESSES) as pool:
        return pool.map(work, items, chunksize=2)


def tune(models: tuple[Model, ...], formats: tuple[str, ...]) -> tuple[dict[str, Shape], dict[str, Any]]:
    """The best shape by kernel, format and padded columns; and all times in us."""
    todo, begin = jobs(models, formats), time.perf_counter()
    failures = [text for text in in_processes(compile_job, todo) if text]
    print(f"compiled {len(todo)} kernels in {time.perf_counter() - begin:.0f} s", flush=True)
    print(*failures, sep="\n", flush=True)
    best: dict[str, Shape] = {}
    times: dict[str, Any] = {}
    for model in models:
        for format in formats:
            layer = Layer(model, format, slots_of(model))
            decoder = layer.decoder(1)
            of_kernel = {(job.kernel, job.columns) for job in todo if job[0] == model and job[2] == format}
            for kernel, columns in sorted(of_kernel):
                if kernel == "linear":
                    rows = max(rows for rows, n in model.dense if n == columns and rows < 10000)
                    matrices = dense_matrices(format, rows, columns)
                took: dict[Shape, float] = {}
                for shape in (job.shape for job in todo if job[1:4] == (kernel, format, columns)):
                    try:
                        if kernel == "linear":
                            took[shape] = 1e6 * time_dense(matrices, 1, shape)
                        else:
                            setattr(decoder, f"{kernel}_shape", shape)
                            took[shape] = 1e6 * layer.time(1, decoder, kernel)[0]
                    except Exception as error:
                        print(f"{model.name} {format} {kernel} {shape}: {str(error)[:100]}", flush=True)
                order = sorted(took, key=lambda shape: took[shape])
                best[f"{kernel} {format} {1 << (columns - 1).bit_length()}"] = order[0]
                times[f"{kernel} {format} {columns}"] = [(*shape, round(took[shape], 2)) for shape in order]
                text = ", ".join(f"{'x'.join(map(str, s))} {took[s]:.1f}" for s in order[:4])
                print(f"{kernel:7s}{format:6s}{columns:6d}  {text} ... {took[order[-1]]:.1f} us", flush=True)
            del layer, decoder
            torch.cuda.empty_cache()
    return best, times


def slots_of(model: Model) -> int:
    return min(model.experts, 64)


# ---- the program -------------------------------------------------------------------------------------------


def check_all(job: tuple[str, Any, str, bool]) -> tuple[str, dict[str, float]]:
    kind, model, format, exact = job
    errors = check_experts(model, format, exact) if kind == "experts" else check_linear(format, exact)
    return f"{kind} {model.name if model else ''} {format}{' exact' if exact else ''}", errors


def checks() -> list[tuple[str, Any, str, bool]]:
    found: list[tuple[str, Any, str, bool]] = []
    for format in expert_slots.FORMATS:
        for exact in (False, True) if format in expert_slots.BITS else (False,):
            found += [("experts", model, format, exact) for model in (QWEN3,)]
            if format in (*expert_slots.FLOATS, *expert_slots.BITS):
                found.append(("linear", None, format, exact))
    return found


def report(rate: float, models: tuple[Model, ...], formats: tuple[str, ...]) -> dict[str, Any]:
    """Prints times and fractions of the copy rate."""
    found: dict[str, Any] = {}

    def line(name: str, seconds: float, size: float = 0.0) -> None:
        found[name] = {"us": seconds * 1e6, "bytes": size}
        fraction = f"{size / seconds / rate:5.2f} of the copy rate" if size else ""
        print(f"{name:34s}{seconds * 1e6:9.2f} us  {fraction}", flush=True)

    for model in models:
        for format in formats:
            layer = Layer(model, format, slots_of(model))
            for tokens in (1, 2, 4):
                line(f"{model.name} {format} T={tokens}", *layer.time(tokens, layer.decoder(tokens)))
            del layer
            torch.cuda.empty_cache()
        for rows, columns in model.dense:
            for format in (f for f in formats if f in ("bf16", *expert_slots.BITS)):
                matrices = dense_matrices(format, rows, columns)
                line(f"dense {rows}x{columns} {format} T=1", time_dense(matrices, 1), len(matrices[0].data))
                del matrices
                torch.cuda.empty_cache()
    line("router T=1", replay_s(router_calls(1, QWEN3, 48)))
    line("rotary embedding T=1", replay_s([rope_call(1)] * 48))
    for format in (f for f in formats if f in ("bf16", "int8", "int4")):
        line(f"Qwen3 layer without attention {format}", replay_s(layer_calls(format, 12)))
        torch.cuda.empty_cache()
    return found


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--tune", action="store_true", help="write kernels/tuning/decode_sm90.json")
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--no-check", action="store_true")
    options = parser.parse_args()
    formats = tuple(options.formats.split(","))
    result: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    result["copy_bytes_per_s"] = rate = copy_rate()
    print(f"{result['device']}, copy {rate / 1e12:.2f} TB/s", flush=True)
    if options.tune:
        best, result["tuning"] = tune(MODELS, formats)
        file = ROOT / "kernels" / "tuning" / "decode_sm90.json"
        old = json.loads(file.read_text("utf-8"))["shapes"] if file.exists() else {}
        shapes = {name: list(shape) for name, shape in sorted((old | best).items())}
        text = ",\n".join(f'    "{name}": {shape}' for name, shape in shapes.items())
        file.parent.mkdir(exist_ok=True)
        file.write_text(f'{{\n  "device": "{result["device"]}",\n  "shapes": {{\n{text}\n  }}\n}}\n', "utf-8")
        tuned_shapes.cache_clear()
    if not options.no_check:
        result["errors"] = dict(in_processes(check_all, checks()))
        for name, errors in result["errors"].items():
            print(f"{name:34s}", *(f"{tokens} {error:.1e}" for tokens, error in errors.items()), flush=True)
    result["times"] = report(rate, MODELS, formats)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
