"""Native attention, norms and routing against plain formulas in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashmoe.config import RopeConfig
from flashmoe.rotary import inverse_frequencies
from kernels.native import Attention, Context, Router, make_context, plain_matrix

HUGE = 1e12  # as eps and squared weight of a norm: x / sqrt(mean(x^2) + eps) * weight is x


@pytest.fixture(scope="module")
def kernels() -> Context:
    return make_context(2)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Layer:
    """An attention layer whose projections are identities: input [q, k, v], output the attention."""

    def __init__(
        self,
        kernels: Context,
        heads: int,
        groups: int,
        d: int,
        window: int | None = None,
        context: int = 64,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
    ) -> None:
        self.kernels, self.length = kernels, 0
        self.width, self.hidden = heads * d, (heads + 2 * groups) * d
        self.keys, self.values = torch.full((2, context, groups, d), math.nan)
        self.cos = torch.ones(context, d) if cos is None else cos
        self.sin = torch.zeros(context, d) if sin is None else sin
        self._norm = torch.full((self.hidden,), HUGE**0.5)
        self._qkv, self._o = torch.eye(self.hidden), torch.eye(self.hidden, self.width)
        self.native = Attention(
            hidden=self.hidden, heads=heads, kv_heads=groups, head_dim=d, qk_norm=0, window=window or 0,
            exact=False, eps=HUGE, clip=0.0, input_norm=self._norm.data_ptr(), qkv=plain_matrix(self._qkv),
            qkv_bias=0, q_norm=0, k_norm=0, o=plain_matrix(self._o), o_bias=0, keys=self.keys.data_ptr(),
            values=self.values.data_ptr(),
        )  # fmt: skip

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """New tokens q [T, H, d], k and v [T, G, d] behind those before -> [T, H * d]."""
        tokens, end = len(q), self.length + len(q)
        x = torch.cat([t.reshape(tokens, -1) for t in (q, k, v)], dim=1)
        before = x.clone()
        sequence = torch.tensor([0, self.length, tokens])
        self.kernels.attend(
            self.native, self.cos.data_ptr(), self.sin.data_ptr(), sequence.data_ptr(), 1, x.data_ptr()
        )
        self.length = end
        return (x - before)[:, : self.width]


def plain_attention(q: Tensor, keys: Tensor, values: Tensor, window: int | None) -> Tensor:
    """Softmax of the allowed scores, one head and one token at a time, in float64."""
    new, heads, d = q.shape
    total, groups, _ = keys.shape
    out = torch.zeros(new, heads * d, dtype=torch.float64)
    for t in range(new):
        position = total - new + t
        first = 0 if window is None else max(0, position - window + 1)
        for head in range(heads):
            group = head // (heads // groups)
            k, v = keys[first : position + 1, group].double(), values[first : position + 1, group].double()
            weights = torch.softmax(k @ q[t, head].double() / math.sqrt(d), dim=0)
            out[t, head * d : (head + 1) * d] = weights @ v
    return out


@settings(deadline=None, max_examples=60)
@given(
    new=st.sampled_from([1, 2, 7, 20]),
    before=st.sampled_from([0, 1, 5, 30]),
    heads=st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 1), (9, 3)]),
    d=st.sampled_from([2, 8, 24, 64, 80]),
    window=st.sampled_from([None, 1, 2, 6, 26, 100]),
)
def test_attention_is_a_softmax_over_what_each_token_may_see(
    kernels: Context, new: int, before: int, heads: tuple[int, int], d: int, window: int | None
) -> None:
    total = before + new
    q, keys = random(total, heads[0], d), random(total, heads[1], d, seed=1)
    values = random(total, heads[1], d, seed=2)
    layer = Layer(kernels, *heads, d, window)
    if before:
        layer.attend(q[:before], keys[:before], values[:before])
    ours = layer.attend(q[before:], keys[before:], values[before:])
    expected = plain_attention(q[before:], keys, values, window)
    assert torch.allclose(ours.double(), expected, atol=1e-5)


def test_a_token_cannot_see_those_behind_it_or_before_its_window(kernels: Context) -> None:
    q, keys, values = random(6, 2, 4), random(6, 1, 4, seed=1), random(6, 1, 4, seed=2)

    def run(v: Tensor, window: int | None) -> Tensor:
        return Layer(kernels, 2, 1, 4, window).attend(q, keys, v)

    later, earlier = values.clone(), values.clone()
    later[4:] = 99.0
    earlier[:3] = 99.0
    assert torch.equal(run(later, None)[:4], run(values, None)[:4])
    assert torch.equal(run(earlier, 2)[4:], run(values, 2)[4:])
    assert not torch.allclose(run(earlier, 2)[3], run(values, 2)[3])


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("chunks", [[12], [5, 7], [1] * 12, [11, 1], [1, 11]])
def test_attention_in_chunks_has_the_bits_of_the_whole(
    kernels: Context, window: int | None, chunks: list[int]
) -> None:
    q, keys, values = random(12, 4, 8), random(12, 2, 8, seed=1), random(12, 2, 8, seed=2)
    whole = Layer(kernels, 4, 2, 8, window).attend(q, keys, values)
    layer, parts, end = Layer(kernels, 4, 2, 8, window), [], 0
    for tokens in chunks:
        begin, end = end, end + tokens
        parts.append(layer.attend(q[begin:end], keys[begin:end], values[begin:end]))
    assert torch.equal(torch.cat(parts), whole)


def test_rotation_turns_each_pair_of_halves_by_its_angle(kernels: Context) -> None:
    frequencies, _ = inverse_frequencies(RopeConfig("default", 1e4), 4)
    angles = torch.outer(torch.arange(10.0), frequencies).repeat(1, 2)
    layer = Layer(kernels, 2, 2, 4, cos=angles.cos(), sin=angles.sin())
    k = random(10, 2, 4)
    layer.attend(random(10, 2, 4, seed=1), k, random(10, 2, 4, seed=2))
    for t in range(10):
        for head in range(2):
            for i, frequency in enumerate((1.0, 0.01)):
                pair = complex(float(k[t, head, i]), float(k[t, head, i + 2]))
                expected = pair * complex(math.cos(t * frequency), math.sin(t * frequency))
                found = complex(float(layer.keys[t, head, i]), float(layer.keys[t, head, i + 2]))
                assert abs(found - expected) < 1e-5


@pytest.mark.parametrize("scale, eps", [(100.0, 1e-5), (0.01, 1e-5), (0.01, 1e-2)])
@pytest.mark.parametrize("hidden", [5, 16, 700])
def test_rms_norm_is_x_over_its_root_mean_square(
    kernels: Context, scale: float, eps: float, hidden: int
) -> None:
    x, weight, y = random(3, hidden) * scale, random(hidden, seed=1), torch.full((3, hidden), math.nan)
    kernels.rms_norm(x.data_ptr(), weight.data_ptr(), 3, hidden, eps, y.data_ptr())
    root = ((x.double() ** 2).sum(dim=-1, keepdim=True) / hidden + eps).sqrt()
    assert torch.allclose(y.double(), x.double() / root * weight.double(), rtol=1e-5)


def route(
    kernels: Context, logits: Tensor, top_k: int, renormalise: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """logits [T, E] through a router whose matrix is the identity -> ids, weights, all probabilities."""
    tokens, experts = logits.shape
    norm, weight = torch.full((experts,), HUGE**0.5), torch.eye(experts)
    router = Router(experts, experts, top_k, renormalise, HUGE, norm.data_ptr(), weight.data_ptr())
    h, probabilities, logits = torch.empty(tokens, experts), torch.empty(tokens, experts), logits.contiguous()
    ids, weights = torch.empty(tokens, top_k, dtype=torch.int32), torch.empty(tokens, top_k)
    kernels.route(
        router, logits.data_ptr(), tokens, h.data_ptr(), probabilities.data_ptr(), ids.data_ptr(),
        weights.data_ptr(),
    )  # fmt: skip
    return ids, weights, probabilities


@settings(deadline=None)
@given(
    order=st.permutations(range(10)),
    spread=st.sampled_from([0.01, 0.5, 3.0]),
    top_k=st.integers(1, 10),
    renormalise=st.booleans(),
)
def test_routing_is_softmax_then_top_k(
    kernels: Context, order: list[int], spread: float, top_k: int, renormalise: bool
) -> None:
    logits = torch.tensor([[spread * rank for rank in order]]).repeat(3, 1)
    ids, weights, probabilities = route(kernels, logits, top_k, renormalise)
    exact = torch.softmax(logits.double(), dim=1)
    assert torch.allclose(probabilities.double(), exact, rtol=1e-5)
    chosen, expected_ids = exact.topk(top_k)
    expected = chosen / chosen.sum(dim=1, keepdim=True) if renormalise else chosen
    assert torch.equal(ids.long(), expected_ids) and torch.allclose(weights.double(), expected, rtol=1e-5)


def test_of_equal_logits_the_lower_ids_are_chosen(kernels: Context) -> None:
    ids, weights, _ = route(kernels, torch.zeros(3, 8), 5, renormalise=True)
    assert ids.tolist() == [[0, 1, 2, 3, 4]] * 3
    assert torch.allclose(weights, torch.full((3, 5), 0.2))


def test_logits_too_large_for_an_exponential_still_route(kernels: Context) -> None:
    ids, weights, _ = route(kernels, torch.tensor([[1e4, 3e4, 2e4]]), 1, renormalise=True)
    assert ids.tolist() == [[1]] and weights.tolist() == [[1.0]]


def test_logits_that_are_no_numbers_give_weights_that_are_none(kernels: Context) -> None:
    ids, weights, _ = route(kernels, torch.tensor([[1.0, math.nan, 2.0]]), 2, renormalise=True)
    assert all(0 <= expert < 3 for expert in ids[0].tolist()) and len(set(ids[0].tolist())) == 2
    assert weights.isnan().all()
