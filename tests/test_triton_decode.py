"""The decode kernels on tiny shapes: against the CPU library on the same bytes, and against torch.

Outputs are filled with NaN first, where they are not added to. Without a GPU the kernels run in Triton's
interpreter; what only a compiler shows is in tests/test_triton_decode_compiled.py.
"""

import math

import pytest
import torch
from torch import Tensor

from kernels import expert_slots, native
from kernels.native import Experts, Format
from kernels.reference import moe_reference
from kernels.triton_decode import ACTIVATIONS, ExpertDecode, GpuMatrix, Shape, linear
from kernels.triton_rope import rope_and_store
from kernels.triton_router import route

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDING = 2e-6  # between two orders of the same fp32 sums
NATIVE = {"int4": Format.INT4, "int8": Format.INT8, "bf16": Format.BF16, "f16": Format.F16, "f32": Format.F32}
FP32_FORMATS = ("bf16", "f16", "f32")


def random(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, -(2**31) if dtype == torch.int32 else math.nan, dtype=dtype, device=DEVICE)


def distance(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|"""
    return float((a.cpu().double() - b.double()).norm() / b.double().norm())


def matrix(format: str, rows: int, columns: int) -> tuple[GpuMatrix, native.Matrix, Tensor]:
    """A random weight for the GPU, for the CPU library, and the memory of the latter."""
    weight = random(rows + columns, rows, columns, scale=columns**-0.5)
    data = expert_slots.pack_matrix(format, weight)
    return (
        GpuMatrix(data.to(DEVICE), format, rows, columns),
        native.Matrix(data.data_ptr(), NATIVE[format], rows, columns),
        data,
    )


def cpu_linear(weight: native.Matrix, rows: int, x: Tensor, bias: Tensor | None, exact: bool) -> Tensor:
    y = torch.empty(len(x), rows)
    address = 0 if bias is None else bias.data_ptr()
    native.make_context(1).linear(weight, address, x.data_ptr(), len(x), exact, y.data_ptr(), rows)
    return y


def on_device(*tensors: Tensor) -> list[Tensor]:
    return [tensor.to(DEVICE) for tensor in tensors]


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("rows, columns, tokens", [(40, 128, 1), (24, 576, 3), (70, 96, 4)])
@pytest.mark.parametrize("format", ["int4", "int8", "bf16", "f16", "f32"])
def test_linear_is_that_of_the_cpu_library(
    format: str, rows: int, columns: int, tokens: int, exact: bool
) -> None:
    if exact and format in FP32_FORMATS:
        pytest.skip("always exact")
    on_gpu, on_cpu, _memory = matrix(format, rows, columns)
    x, bias = random(1, tokens, columns), random(2, rows)
    expected = cpu_linear(on_cpu, rows, x, bias, exact)
    out = poisoned(tokens, rows)
    linear(x.to(DEVICE), on_gpu, out, bias=bias.to(DEVICE), exact=exact)
    assert distance(out, expected) < ROUNDING


@pytest.mark.parametrize("format", ["int4", "int8", "bf16"])
def test_linear_takes_a_norm_before_and_adds_to_what_is_there(format: str) -> None:
    on_gpu, on_cpu, _memory = matrix(format, 33, 192)
    x, norm, before = random(1, 2, 192, scale=3.0), random(2, 192), random(3, 2, 33)
    normed = torch.empty_like(x)
    native.make_context(1).rms_norm(x.data_ptr(), norm.data_ptr(), 2, 192, 1e-5, normed.data_ptr())
    out = before.clone().to(DEVICE)
    linear(x.to(DEVICE), on_gpu, out, norm=norm.to(DEVICE), eps=1e-5, residual=True)
    assert (
        distance(out, before + cpu_linear(on_cpu, 33, normed, None, False)) < 1e-4
    )  # a code may be rounded up


@pytest.mark.parametrize("format", ["int4", "int8", "bf16"])
def test_columns_in_chunks_and_rows_in_blocks_give_the_same(format: str) -> None:
    on_gpu, on_cpu, _memory = matrix(format, 70, 200)
    x = random(1, 3, 200)
    out = poisoned(3, 70)
    linear(x.to(DEVICE), on_gpu, out, shape=Shape(2, 1, 64))
    assert distance(out, cpu_linear(on_cpu, 70, x, None, False)) < ROUNDING


@pytest.mark.parametrize("format", ["int4", "int8"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_no_number_reaches_the_result(format: str, bad: float) -> None:
    on_gpu, _, _memory = matrix(format, 16, 64)
    x = random(1, 1, 64)
    x[0, 40] = bad
    out = torch.zeros(1, 16, device=DEVICE)
    linear(x.to(DEVICE), on_gpu, out)
    assert out.isnan().all()


def test_activations_of_zero_give_zero() -> None:
    on_gpu, _, _memory = matrix("int4", 16, 64)
    out = poisoned(1, 16)
    linear(torch.zeros(1, 64, device=DEVICE), on_gpu, out)
    assert not out.any()


def reference_heads(
    x: Tensor, weight: Tensor | None, mode: str, clip: float, cos: Tensor, sin: Tensor, eps: float
) -> Tensor:
    """x [T, heads, d], in the order of kernels/cpu/attention.cpp."""

    def norm(v: Tensor) -> Tensor:
        return v / (v.square().mean(-1, keepdim=True) + eps).sqrt()

    if mode == "full":
        assert weight is not None
        x = (norm(x.flatten(1)) * weight).view(x.shape)
    if clip:
        x = x.clamp(-clip, clip)
    if mode == "head":
        assert weight is not None
        x = norm(x) * weight
    left, right = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat([-right, left], -1) * sin[:, None]


@pytest.mark.parametrize("clip", [0.0, 0.7])
@pytest.mark.parametrize("mode", ["none", "head", "full"])
def test_queries_and_keys_are_normed_clipped_and_rotated_into_the_cache(mode: str, clip: float) -> None:
    heads, kv_heads, d, tokens, context, page = 6, 2, 24, 3, 9, 3
    pages = torch.tensor([[1, 5, 3], [4, 0, 2], [1, 5, 3]], dtype=torch.int32)  # of each token's sequence
    positions = torch.tensor([4, 8, 0], dtype=torch.int32)
    qkv = random(1, tokens, (heads + 2 * kv_heads) * d)
    angle = random(2, context, d // 2).repeat(1, 2)
    cos, sin = angle.cos(), angle.sin()
    q_weight = random(3, heads * d if mode == "full" else d) if mode != "none" else None
    k_weight = random(4, kv_heads * d if mode == "full" else d) if mode != "none" else None
    keys, values = (poisoned(6, page, kv_heads, d, dtype=torch.float16) for _ in range(2))
    q_out = poisoned(tokens, heads, d, dtype=torch.float16)
    rope_and_store(
        *on_device(qkv, cos, sin, pages, positions), keys, values, q_out,
        heads=heads, kv_heads=kv_heads, head_dim=d,
        qk_norm=mode, q_norm=None if q_weight is None else q_weight.to(DEVICE),
        k_norm=None if k_weight is None else k_weight.to(DEVICE), eps=1e-5, clip=clip,
    )  # fmt: skip
    q, k, v = (part.view(tokens, -1, d) for part in qkv.split([heads * d, kv_heads * d, kv_heads * d], 1))
    at = torch.tensor([5, 2, 1]), torch.tensor([1, 2, 0])  # pages and places in them
    angles = cos[positions.long()], sin[positions.long()]
    half = 5e-4
    assert distance(q_out, reference_heads(q, q_weight, mode, clip, *angles, 1e-5)) < half
    assert distance(keys[at], reference_heads(k, k_weight, mode, clip, *angles, 1e-5)) < half
    assert distance(values[at], v.clamp(-clip, clip) if clip else v) < half
    outside = torch.ones(6, page, dtype=torch.bool).index_put(at, torch.tensor(False))
    assert keys[outside].isnan().all() and values[outside].isnan().all()


def routed(
    x: Tensor, norm: Tensor, router: Tensor, top_k: int, normalise: bool, table: Tensor
) -> list[Tensor]:
    tokens, experts = len(x), len(router)
    results = [
        poisoned(*x.shape), poisoned(tokens, experts), poisoned(tokens, top_k, dtype=torch.int32),
        poisoned(tokens, top_k), poisoned(tokens, top_k, dtype=torch.int32),
        torch.tensor([99], dtype=torch.int32, device=DEVICE),
    ]  # fmt: skip
    route(
        x.to(DEVICE), norm.to(DEVICE), 1e-5, router.to(DEVICE), normalise, table.to(DEVICE), *results,
        layer=7, saved=(saved := poisoned(*x.shape)),
    )  # fmt: skip
    assert torch.equal(saved.cpu(), x) or x.isnan().any()
    return [result.cpu() for result in results]


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("hidden, experts, top_k, tokens", [(96, 8, 2, 1), (576, 60, 4, 3)])
def test_the_router_is_that_of_the_cpu_library(
    hidden: int, experts: int, top_k: int, tokens: int, normalise: bool
) -> None:
    x, norm, weight = random(1, tokens, hidden), random(2, hidden), random(3, experts, hidden, scale=0.3)
    spec = native.Router(hidden, experts, top_k, normalise, 1e-5, norm.data_ptr(), weight.data_ptr())
    h, probabilities = torch.empty(tokens, hidden), torch.empty(tokens, experts)
    ids, weights = torch.empty(tokens, top_k, dtype=torch.int32), torch.empty(tokens, top_k)
    pointers = (h.data_ptr(), probabilities.data_ptr(), ids.data_ptr(), weights.data_ptr())
    native.make_context(1).route(spec, x.data_ptr(), tokens, *pointers)
    table = torch.arange(experts, dtype=torch.int32) + 100
    ours = routed(x, norm, weight, top_k, normalise, table)
    assert distance(ours[0], h) < ROUNDING and distance(ours[1], probabilities) < 2e-5
    assert torch.equal(ours[2], ids) and distance(ours[3], weights) < 2e-5
    assert torch.equal(ours[4], ids + 100) and ours[5].item() == 99


def test_of_equally_likely_experts_the_lower_comes_first_and_an_absent_one_is_reported() -> None:
    table = torch.tensor([5, 4, -1, 3, 2, 1], dtype=torch.int32)
    ours = routed(random(1, 1, 32), torch.ones(32), torch.zeros(6, 32), 3, True, table)
    assert ours[2].tolist() == [[0, 1, 2]] and ours[4].tolist() == [[5, 4, -1]] and ours[5].item() == 7
    assert torch.allclose(ours[3], torch.full((1, 3), 1 / 3))


def test_a_router_that_sees_no_number_still_names_experts_in_range() -> None:
    x = random(1, 1, 32)
    x[0, 3] = math.nan
    ours = routed(x, torch.ones(32), random(2, 6, 32), 3, True, torch.arange(6, dtype=torch.int32))
    assert ours[2].tolist() == [[0, 1, 2]] and ours[3].isnan().all()


class Layer:
    """Random experts in a shuffled arena, tokens and their routing."""

    def __init__(self, format: str, hidden: int, width: int, tokens: int, experts: int, top_k: int) -> None:
        self.shape = (hidden, width)
        stride = -(-expert_slots.slot_bytes(format, hidden, width) // 64) * 64
        self.arena = torch.full((experts + 1, stride), 0x77, dtype=torch.uint8)
        self.slot_of = torch.randperm(experts + 1, generator=torch.Generator().manual_seed(1))[:experts].int()
        self.values, self.blobs = [], []
        for e in range(experts):
            gate, up = (random(10 * e + i, width, hidden, scale=hidden**-0.5) for i in range(2))
            blob = expert_slots.pack_expert(
                format, gate, up, random(10 * e + 2, hidden, width, scale=width**-0.5)
            )
            self.arena[self.slot_of[e], : len(blob)] = blob
            self.blobs.append(blob)
            self.values.append(expert_slots.unpack_expert(format, blob, hidden, width))
        self.x = random(5, tokens, hidden)
        self.ids = torch.stack([torch.randperm(experts)[:top_k] for _ in range(tokens)])
        self.weights = torch.rand(tokens, top_k, generator=torch.Generator().manual_seed(2))

    @property
    def slots(self) -> Tensor:
        return self.slot_of[self.ids].flatten()

    def exact_result(self, activation: str) -> Tensor:
        three = [tuple(weight.double() for weight in expert) for expert in self.values]
        weights = self.weights.double()
        return moe_reference(self.x.double(), self.ids, weights, three, activation)  # type: ignore[arg-type]

    def cpu_result(self, format: str, activation: str, exact: bool) -> Tensor:
        context, top_k = native.make_context(1), self.ids.shape[1]
        spec = Experts(*self.shape, NATIVE[format], native.ACTIVATIONS[activation], exact)
        products, y = torch.empty(self.ids.numel(), self.shape[0]), torch.zeros_like(self.x)
        context.moe_begin(spec, self.x.data_ptr(), len(self.x), top_k)
        for row, e in enumerate(self.ids.flatten().tolist()):
            one = torch.tensor([self.blobs[e].data_ptr(), 0, 0])
            begin, rows = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([row], dtype=torch.int32)
            context.moe_experts(one.data_ptr(), 1, begin.data_ptr(), rows.data_ptr(), products.data_ptr())
        context.moe_end(products.data_ptr(), self.weights.data_ptr(), y.data_ptr())
        return y


def decode(layer: Layer, format: str, activation: str = "silu", exact: bool = False) -> ExpertDecode:
    tokens, top_k = layer.ids.shape
    experts = ExpertDecode(*layer.shape, format, activation, top_k, tokens, DEVICE, exact)
    experts.products.fill_(math.nan)
    return experts


def result(layer: Layer, experts: ExpertDecode, *slots: Tensor) -> Tensor:
    y = torch.zeros_like(layer.x).to(DEVICE)
    x, weights, arena = on_device(layer.x, layer.weights, layer.arena)
    for some in slots:
        experts.run(x, some.to(DEVICE), arena)
    experts.combine(weights, y)
    return y.cpu()


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("format", ["int4", "int8"])
@pytest.mark.parametrize("hidden, width, tokens", [(128, 64, 2), (576, 96, 1)])
def test_packed_experts_are_those_of_the_cpu_library(
    format: str, hidden: int, width: int, tokens: int, exact: bool
) -> None:
    layer = Layer(format, hidden, width, tokens, experts=5, top_k=3)
    ours = result(layer, decode(layer, format, exact=exact), layer.slots)
    assert distance(ours, layer.cpu_result(format, "silu", exact)) < 5e-6
    assert distance(ours, layer.exact_result("silu")) < (1e-5 if exact else 0.03)


@pytest.mark.parametrize("format", ["bf16", "f16", "f32", "fp8", "mxfp4"])
@pytest.mark.parametrize("hidden, width, tokens", [(64, 128, 2), (576, 96, 1)])
def test_experts_of_rows_agree_with_float64(format: str, hidden: int, width: int, tokens: int) -> None:
    layer = Layer(format, hidden, width, tokens, experts=4, top_k=2)
    ours = result(layer, decode(layer, format), layer.slots)
    assert distance(ours, layer.exact_result("silu")) < ROUNDING


@pytest.mark.parametrize("format", ["int4", "int8", "bf16", "fp8", "mxfp4"])
def test_experts_in_chunks_of_columns_give_the_same(format: str) -> None:
    layer = Layer(format, 160, 96, 1, experts=2, top_k=1)
    experts = decode(layer, format)
    whole = result(layer, experts, layer.slots)
    experts.up_shape = experts.down_shape = Shape(2 if format in expert_slots.BITS else 16, 1, 64)
    experts.products.fill_(math.nan)
    assert distance(result(layer, experts, layer.slots), whole) < ROUNDING


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation: str) -> None:
    layer = Layer("f32", 48, 32, 2, experts=4, top_k=2)
    layer.x *= 4
    ours = result(layer, decode(layer, "f32", activation), layer.slots)
    assert distance(ours, layer.exact_result(activation)) < ROUNDING


@pytest.mark.parametrize("format", ["int4", "int8", "bf16", "fp8", "mxfp4"])
def test_late_experts_give_the_bits_of_all_at_once_and_skipped_rows_stay(format: str) -> None:
    layer = Layer(format, 64, 32, 2, experts=5, top_k=3)
    at_once = result(layer, decode(layer, format), layer.slots)
    early = torch.tensor([True, False, True, True, True, False])
    experts = decode(layer, format)
    hits, late = layer.slots.where(early, torch.tensor(-1)), layer.slots.where(~early, torch.tensor(-1))
    x, arena = on_device(layer.x, layer.arena)
    experts.run(x, hits.to(DEVICE), arena)
    assert torch.equal(experts.products.isnan().any(1).cpu(), ~early)
    assert torch.equal(result(layer, experts, late), at_once)


@pytest.mark.parametrize("format", ["int4", "int8", "bf16", "fp8", "mxfp4"])
def test_experts_read_in_place_from_ram_give_the_bits_of_those_in_slots(format: str) -> None:
    layer = Layer(format, 64, 32, 2, experts=5, top_k=3)
    at_once = result(layer, decode(layer, format), layer.slots)
    x, arena, weights = on_device(layer.x, layer.arena[:3], layer.weights)
    # The others are in RAM, in wider slots.
    ram = torch.zeros(3, layer.arena.shape[1] + 64, dtype=torch.uint8)
    ram[:, : layer.arena.shape[1]] = layer.arena[3:]
    if DEVICE == "cuda":
        ram = ram.pin_memory()
    experts, y = decode(layer, format), torch.zeros_like(x)
    experts.run(x, layer.slots.to(DEVICE), arena, ram)
    experts.combine(weights, y)
    assert torch.equal(y.cpu(), at_once)


def test_activations_have_the_names_of_the_cpu_library() -> None:
    assert set(ACTIVATIONS) == set(native.ACTIVATIONS)


@pytest.mark.gpu
@pytest.mark.parametrize("format", expert_slots.FORMATS)
def test_on_a_gpu_experts_of_real_size_agree_with_float64_and_late_ones_change_no_bit(format: str) -> None:
    from scripts.bench_gpu_decode import QWEN3, check_experts

    limit = 0.02 if format in expert_slots.BITS else ROUNDING  # activations rounded to int8
    assert max(check_experts(QWEN3, format, exact=False).values()) < limit
    if format in expert_slots.BITS:
        assert max(check_experts(QWEN3, format, exact=True).values()) < ROUNDING
