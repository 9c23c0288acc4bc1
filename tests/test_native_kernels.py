"""The native kernels through their Python face: what they promise of values, and of bits.

Values: kernels/reference.py in float64, with the weights as the format holds them. Bits: the same for any
instruction set, any number of threads, any split of the experts into calls, any order of arrival, and for a
token alone or among others. What needs no Python is tested in C++ (tests/test_cpu_selftest.py).
"""

import math
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from kernels import native
from kernels.native import Activation, Attention, Context, Experts, Format, Matrix, plain_matrix
from kernels.reference import ffn_reference, moe_reference

NAMES = {activation: name for name, activation in native.ACTIVATIONS.items()}
DTYPES = {format: dtype for dtype, format in native.DTYPES.items()}
PLAIN = tuple(DTYPES)
PACKED = (Format.INT4, Format.INT8)
# int8 activations differ from the real ones by up to 1/254 of the largest in their group.
INT8_ACTIVATIONS_ERROR, FP32_ERROR = 0.05, 2e-5

sizes = st.integers(1, 150)
seeds = st.integers(0, 10**6)
formats = st.sampled_from(tuple(Format))


@cache
def context(threads: int = 1, isa: str = "scalar") -> Context:
    return native.make_context(threads, isa)


def every_context() -> list[Context]:
    return [context(threads, isa) for isa in native.available_isas() for threads in (1, 2, 3)]


def random(generator: torch.Generator, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=generator) * scale


def distance(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|"""
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


def pack(
    weight: Tensor, format: Format, importance: Tensor | None = None
) -> tuple[Tensor, tuple[float, float]]:
    packed = torch.full((native.matrix_bytes(format, *weight.shape),), 0xEE, dtype=torch.uint8)
    return packed, native.pack_matrix(context(), weight, format, packed, importance)


@dataclass
class Weights:
    """A matrix in some format, the memory behind it, and the values that the format holds."""

    matrix: Matrix
    memory: Tensor
    values: Tensor

    @classmethod
    def make(cls, weight: Tensor, format: Format) -> "Weights":
        if format.is_packed:
            packed, _ = pack(weight, format)
            values = native.unpack_matrix(packed, format, *weight.shape)
            return cls(Matrix(packed.data_ptr(), format, *weight.shape), packed, values)
        plain = weight.to(DTYPES[format])
        return cls(plain_matrix(plain), plain, plain.float())


class Layer:
    """Random experts of one layer, tokens and their routing."""

    def __init__(
        self,
        seed: int,
        format: Format,
        hidden: int,
        width: int,
        tokens: int,
        experts: int = 5,
        top_k: int = 3,
        exact: bool = False,
        activation: Activation = Activation.SILU,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.format, self.hidden, self.top_k = format, hidden, top_k
        self.spec = Experts(hidden, width, format, activation, exact)
        self.activation = NAMES[activation]
        self.values: list[tuple[Tensor, Tensor, Tensor]] = []  # as the format holds them
        self._memory: list[tuple[Tensor, ...]] = []
        for _ in range(experts):
            gate = random(generator, width, hidden, scale=hidden**-0.5)
            up = random(generator, width, hidden, scale=hidden**-0.5)
            down = random(generator, hidden, width, scale=width**-0.5)
            self._add(gate, up, down, width)
        self.x = random(generator, tokens, hidden)
        self.weights = torch.rand(tokens, top_k, generator=generator)
        self.ids = torch.stack([torch.randperm(experts, generator=generator)[:top_k] for _ in range(tokens)])

    def _add(self, gate: Tensor, up: Tensor, down: Tensor, width: int) -> None:
        if self.format.is_packed:
            blob = torch.full(
                (native.expert_bytes(self.format, self.hidden, width),), 0xEE, dtype=torch.uint8
            )
            native.pack_expert(context(), gate, up, down, self.format, blob)
            self._memory.append((blob,))
            self.values.append(native.unpack_expert(blob, self.format, self.hidden, width))
        else:
            plain = [weight.to(DTYPES[self.format]) for weight in (gate, up, down)]
            self._memory.append(tuple(plain))
            self.values.append((plain[0].float(), plain[1].float(), plain[2].float()))

    def run(
        self, kernels: Context, calls: list[list[int]] | None = None, tokens: slice = slice(None)
    ) -> Tensor:
        """y [T, D]. calls: which experts each call computes, in which order (default: all in one)."""
        x, weights, ids = self.x[tokens].contiguous(), self.weights[tokens].contiguous(), self.ids[tokens]
        flat = ids.flatten()
        products = torch.full((len(flat), self.hidden), math.nan)
        y = torch.zeros_like(x)
        kernels.moe_begin(self.spec, x.data_ptr(), len(x), self.top_k)
        for experts in calls or [list(range(len(self.values)))]:
            rows = [(flat == expert).nonzero().flatten() for expert in experts]
            begin = torch.tensor([0, *(len(r) for r in rows)]).cumsum(0).int()
            table = torch.tensor([self._addresses(expert) for expert in experts], dtype=torch.int64)
            owed = torch.cat(rows).int()
            kernels.moe_experts(
                table.data_ptr(), len(experts), begin.data_ptr(), owed.data_ptr(), products.data_ptr()
            )
        kernels.moe_end(products.data_ptr(), weights.data_ptr(), y.data_ptr())
        return y

    def _addresses(self, expert: int) -> list[int]:
        addresses = [tensor.data_ptr() for tensor in self._memory[expert]]
        return addresses + [0] * (3 - len(addresses))

    def reference(self) -> Tensor:
        experts = [(gate.double(), up.double(), down.double()) for gate, up, down in self.values]
        return moe_reference(self.x.double(), self.ids, self.weights.double(), experts, self.activation)


# ---- packing


@given(seeds, sizes, sizes, st.sampled_from(PACKED), st.sampled_from(PLAIN), st.booleans())
@settings(max_examples=60, deadline=None)
def test_packing_reports_the_weighted_error_of_what_it_wrote(
    seed: int, rows: int, columns: int, format: Format, source: Format, weighted: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = random(generator, rows, columns).to(DTYPES[source])
    importance = torch.rand(columns, generator=generator) + 0.01 if weighted else None
    packed, (missed, squares) = pack(weight, format, importance)
    wide, by = weight.double(), importance.double() if importance is not None else 1.0
    error = native.unpack_matrix(packed, format, rows, columns).double() - wide
    assert missed == pytest.approx(float((by * error**2).sum()), rel=1e-3, abs=1e-9 * squares)
    assert squares == pytest.approx(float((by * wide**2).sum()), rel=1e-4)


def test_int4_beats_rounding_to_nearest_on_gaussian_weights() -> None:
    weight = random(torch.Generator().manual_seed(0), 256, 1024)
    packed, (missed, squares) = pack(weight, Format.INT4)
    groups = weight.view(256, -1, 32)
    scale = groups.abs().amax(-1, keepdim=True) / 7
    rounded = ((groups / scale).round() * scale - groups).norm() / groups.norm()
    assert math.sqrt(missed / squares) < 0.92 * rounded


def test_int8_is_within_half_a_step_of_the_weight() -> None:
    weight = random(torch.Generator().manual_seed(0), 64, 512)
    packed, _ = pack(weight, Format.INT8)
    error = (native.unpack_matrix(packed, Format.INT8, 64, 512) - weight).abs().view(64, -1, 32)
    step = weight.view(64, -1, 32).abs().amax(-1, keepdim=True) / 127
    assert bool((error <= 0.6 * step).all())  # the scale is fitted, then rounded to fp16


def test_columns_that_matter_more_are_kept_better() -> None:
    weight = random(torch.Generator().manual_seed(0), 64, 512)
    importance = torch.ones(512)
    importance[::32] = 100.0
    kept = []
    for weights in (None, importance):
        unpacked = native.unpack_matrix(pack(weight, Format.INT4, weights)[0], Format.INT4, 64, 512)
        kept.append(float((unpacked - weight)[:, ::32].norm()))
    assert kept[1] < 0.8 * kept[0]


@given(seeds, sizes, sizes, st.sampled_from(PACKED))
@settings(max_examples=30, deadline=None)
def test_packing_gives_the_same_bytes_everywhere_and_writes_all_of_them(
    seed: int, hidden: int, width: int, format: Format
) -> None:
    generator = torch.Generator().manual_seed(seed)
    gate, up = random(generator, width, hidden), random(generator, width, hidden)
    down = random(generator, hidden, width)
    found = []
    for i, kernels in enumerate(every_context()):
        blob = torch.full((native.expert_bytes(format, hidden, width),), i, dtype=torch.uint8)
        error = native.pack_expert(kernels, gate, up, down, format, blob)
        found.append((bytes(blob.numpy()), error))
    assert all(one == found[0] for one in found)


@pytest.mark.parametrize("format", PACKED)
def test_padding_holds_nothing(format: Format) -> None:
    """Read as a matrix of whole tiles and superblocks, what lies past the edge is zero."""
    packed, _ = pack(random(torch.Generator().manual_seed(0), 17, 70), format)
    whole = native.unpack_matrix(packed, format, 32, 128)
    assert whole[:17, :70].count_nonzero() > 0
    assert whole[17:].count_nonzero() == 0 and whole[:, 70:].count_nonzero() == 0


# ---- a layer of experts


@given(seeds, formats, st.sampled_from(tuple(Activation)), st.booleans(), sizes, sizes, st.integers(1, 11))
@settings(max_examples=150, deadline=None)
def test_a_layer_computes_what_the_reference_does(
    seed: int, format: Format, activation: Activation, exact: bool, hidden: int, width: int, tokens: int
) -> None:
    rounds = format.is_packed and not exact
    if rounds:  # a few values have no average error to speak of
        hidden, width = hidden + 60, width + 60
    layer = Layer(seed, format, hidden, width, tokens, exact=exact, activation=activation)
    y, reference = layer.run(context()).double(), layer.reference()
    if rounds:
        assert distance(y, reference) < INT8_ACTIVATIONS_ERROR
        return
    assert float((y - reference).abs().max()) < FP32_ERROR * max(float(reference.abs().max()), 1.0)


@given(seeds, formats, st.booleans(), sizes, sizes, st.integers(1, 20), st.data())
@settings(max_examples=60, deadline=None)
def test_bits_depend_on_nothing_but_the_token(
    seed: int, format: Format, exact: bool, hidden: int, width: int, tokens: int, data: st.DataObject
) -> None:
    """Instruction set, threads, calls, order of arrival, company."""
    layer = Layer(seed, format, hidden, width, tokens, exact=exact)
    whole = layer.run(context())
    for kernels in every_context():
        order = data.draw(st.permutations(range(len(layer.values))))
        cut = data.draw(st.integers(1, len(order)))
        assert torch.equal(
            layer.run(kernels, [order[:cut], order[cut:]] if cut < len(order) else None), whole
        )
    token = data.draw(st.integers(0, tokens - 1))
    kernels = data.draw(st.sampled_from(every_context()))
    assert torch.equal(layer.run(kernels, tokens=slice(token, token + 1))[0], whole[token])


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("format", Format)
def test_a_nan_is_seen_in_its_token_and_in_no_other(format: Format, exact: bool) -> None:
    layer = Layer(0, format, 96, 80, tokens=9, exact=exact)
    before = layer.run(context(2, native.available_isas()[0]))
    layer.x[4, 17] = math.nan
    after = layer.run(context(2, native.available_isas()[0]))
    assert bool(after[4].isnan().all())
    after[4] = before[4]
    assert torch.equal(after, before)


# ---- dense layers


@given(seeds, formats, st.booleans(), st.booleans(), sizes, sizes, st.integers(1, 9))
@settings(max_examples=80, deadline=None)
def test_linear_is_a_product_and_a_bias(
    seed: int, format: Format, exact: bool, biased: bool, rows: int, columns: int, tokens: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    w = Weights.make(random(generator, rows, columns, scale=columns**-0.5), format)
    x, bias = random(generator, tokens, columns), random(generator, rows)
    found = []
    for kernels in (context(), context(2, native.available_isas()[0])):
        y = torch.full((tokens, rows), math.nan)
        kernels.linear(
            w.matrix, bias.data_ptr() if biased else 0, x.data_ptr(), tokens, exact, y.data_ptr(), rows
        )
        found.append(y)
    assert torch.equal(*found)
    reference = functional.linear(x.double(), w.values.double(), bias.double() if biased else None)
    size = x.abs().double() @ w.values.abs().double().T + 1
    # A code is off by half a step of its group's largest value, at most that of the token.
    step = x.abs().amax(1, keepdim=True).double() / 254 * w.values.abs().double().sum(1)
    bound = FP32_ERROR * size + (1.01 * step if format.is_packed and not exact else 0)
    assert bool(((found[0] - reference).abs() <= bound).all())


@given(seeds, st.sampled_from(tuple(Activation)[:4]), formats, formats, st.booleans(), sizes, sizes)
@settings(max_examples=60, deadline=None)
def test_mlp_adds_its_result_times_a_factor(
    seed: int, activation: Activation, inner: Format, outer: Format, factored: bool, hidden: int, width: int
) -> None:
    """gate and up in one format, down perhaps in another; exact, so that the reference holds."""
    generator = torch.Generator().manual_seed(seed)
    tokens = 7
    gate = Weights.make(random(generator, width, hidden, scale=hidden**-0.5), inner)
    up = Weights.make(random(generator, width, hidden, scale=hidden**-0.5), inner)
    down = Weights.make(random(generator, hidden, width, scale=width**-0.5), outer)
    x, before, factor = (random(generator, tokens, n) for n in (hidden, hidden, 1))
    y = before.clone()
    context(2, native.available_isas()[0]).mlp(
        activation, gate.matrix, up.matrix, down.matrix, x.data_ptr(), tokens, True,
        factor.data_ptr() if factored else 0, y.data_ptr(),
    )  # fmt: skip
    values = [w.values.double() for w in (gate, up, down)]
    added = ffn_reference(x.double(), *values, NAMES[activation]) * (factor.double() if factored else 1)
    assert float((y - (before + added)).abs().max()) < FP32_ERROR * max(1.0, float(added.abs().max()))


@given(seeds, formats, sizes, sizes, st.lists(st.integers(0, 10**6), max_size=5))
@settings(max_examples=40, deadline=None)
def test_gathered_rows_are_the_rows(
    seed: int, format: Format, rows: int, columns: int, ids: list[int]
) -> None:
    w = Weights.make(random(torch.Generator().manual_seed(seed), rows, columns), format)
    chosen = [i % rows for i in ids]
    assert torch.equal(native.gather_rows(w.matrix, chosen, columns), w.values[chosen])


@pytest.mark.parametrize("qk_norm", [0, 1, 2])
def test_attention_has_projections_biases_norms_and_clipping(qk_norm: int) -> None:
    """One token against a formula in float64; windows, groups and rotation: tests/test_attention.py."""
    generator = torch.Generator().manual_seed(qk_norm)
    hidden, heads, groups, d, position, clip, eps = 40, 4, 2, 6, 5, 0.9, 1e-5
    queries, keys = heads * d, groups * d
    qkv = Weights.make(random(generator, queries + 2 * keys, hidden, scale=hidden**-0.5), Format.F32)
    o = Weights.make(random(generator, hidden, queries, scale=queries**-0.5), Format.BF16)
    input_norm, qkv_bias, o_bias, x = (
        random(generator, n) for n in (hidden, queries + 2 * keys, hidden, hidden)
    )
    q_norm = random(generator, queries if qk_norm == 2 else d)
    k_norm = random(generator, keys if qk_norm == 2 else d)
    kv = random(generator, 2, position + 1, groups, d)
    want_kv = kv.double()
    cos, sin = torch.ones(position + 1, d), torch.zeros(position + 1, d)
    sequence = torch.tensor([0, position, 1])
    spec = Attention(
        hidden, heads, groups, d, qk_norm, 0, False, eps, clip, input_norm.data_ptr(), qkv.matrix,
        qkv_bias.data_ptr(), q_norm.data_ptr(), k_norm.data_ptr(), o.matrix, o_bias.data_ptr(),
        kv[0].data_ptr(), kv[1].data_ptr(),
    )  # fmt: skip
    y = x.clone()
    context(2, native.available_isas()[0]).attend(
        spec, cos.data_ptr(), sin.data_ptr(), sequence.data_ptr(), 1, y.data_ptr()
    )

    def norm(values: Tensor, weight: Tensor) -> Tensor:
        return values / (values.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()

    projected = qkv.values.double() @ norm(x.double(), input_norm) + qkv_bias.double()
    q, k, v = projected.split([queries, keys, keys])
    if qk_norm == 2:
        q, k = norm(q, q_norm), norm(k, k_norm)
    q, k, v = (part.clamp(-clip, clip).view(-1, d) for part in (q, k, v))
    if qk_norm == 1:
        q, k = norm(q, q_norm), norm(k, k_norm)
    want_kv[0, position], want_kv[1, position] = k, v
    attended = functional.scaled_dot_product_attention(
        q[None, :, None], *want_kv.transpose(1, 2)[:, None], enable_gqa=True
    )
    want = x.double() + o.values.double() @ attended.flatten() + o_bias.double()
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(kv.double(), want_kv, rtol=1e-5, atol=1e-5)


# ---- contexts


def test_the_environment_chooses_an_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.ISA_VARIABLE, "scalar")
    assert native.make_context(1).isa == "scalar"
    assert native.make_context(1, native.available_isas()[0]).isa == native.available_isas()[0]
    monkeypatch.delenv(native.ISA_VARIABLE)
    assert native.make_context(1).isa == native.available_isas()[0]
    assert native.available_isas()[-1] == "scalar"


def test_an_instruction_set_that_is_not_there_is_an_error_that_names_those_that_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ValueError, match=r"no kernels for pdp11 on this machine; there are: .*scalar"):
        native.make_context(1, "pdp11")
    monkeypatch.setenv(native.ISA_VARIABLE, "vax")
    with pytest.raises(ValueError, match="no kernels for vax"):
        native.make_context(1)


def test_a_context_counts_its_time_and_its_memory() -> None:
    kernels = native.make_context(1)
    assert kernels.busy_s == 0 and kernels.workspace_bytes == 0
    layer = Layer(0, Format.INT4, 128, 64, tokens=3)
    layer.run(kernels)
    assert kernels.busy_s > 0 and kernels.workspace_bytes >= 3 * 3 * (128 + 64)
