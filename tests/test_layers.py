"""Norm, rotary embedding and attention against transformers and against plain formulas."""

import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashmoe.config import ModelConfig, RopeConfig, parse_model_config
from flashmoe.layers import Rotary, attention, inverse_frequencies, rms_norm, rotate

transformers = pytest.importorskip("transformers", reason="transformers is the oracle; pip install -e .[dev]")
rope_utils = pytest.importorskip("transformers.modeling_rope_utils", reason="transformers is the oracle")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def config_of(rope: dict[str, Any], head_dim: int = 16, positions: int = 512) -> ModelConfig:
    return parse_model_config(dict(
        model_type="qwen3_moe", vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=head_dim, num_experts=2, num_experts_per_tok=1,
        moe_intermediate_size=4, max_position_embeddings=positions, rope_parameters=rope,
    ))  # fmt: skip


# RMS norm


@pytest.mark.parametrize("scale, eps", [(100.0, 1e-5), (0.01, 1e-5), (0.01, 1e-2)])
def test_rms_norm_is_x_over_its_root_mean_square(scale: float, eps: float) -> None:
    x, weight = random(3, 5) * scale, random(5, seed=1)
    root = ((x.double() ** 2).sum(dim=-1, keepdim=True) / 5 + eps).sqrt()
    assert torch.allclose(rms_norm(x, weight, eps).double(), x.double() / root * weight.double(), rtol=1e-5)


def test_rms_norm_of_heads_treats_each_alone_and_eps_keeps_zero_finite() -> None:
    x = random(2, 4, 6)
    whole = rms_norm(x, torch.ones(6), 1e-6)
    assert torch.equal(whole[1, 2], rms_norm(x[1, 2], torch.ones(6), 1e-6))
    assert torch.equal(rms_norm(torch.zeros(1, 6), torch.ones(6), 1e-6), torch.zeros(1, 6))


# Rotary embedding


def assert_rope_of_transformers(rope: dict[str, Any], head_dim: int, positions: int) -> None:
    """Frequencies and factor against ROPE_INIT_FUNCTIONS, on the config object that it takes."""
    ours = config_of(rope, head_dim, positions)
    theirs = transformers.Qwen3MoeConfig(
        hidden_size=8, num_attention_heads=2, num_key_value_heads=1, head_dim=head_dim,
        max_position_embeddings=positions, rope_parameters=dict(rope),
    )  # fmt: skip
    expected, factor = rope_utils.ROPE_INIT_FUNCTIONS[rope["rope_type"]](theirs, device="cpu")
    frequencies, our_factor = inverse_frequencies(ours.rope, ours.head_dim)
    assert frequencies.dtype == torch.float32
    assert torch.allclose(frequencies, expected, rtol=2e-6, atol=0)
    assert our_factor == pytest.approx(factor, rel=1e-12)


THETA = st.sampled_from([1e4, 1e6, 5e5, 17.0])
HEAD_DIM = st.sampled_from([2, 6, 16, 64, 128])
POSITIONS = st.sampled_from([256, 4096, 131072])
FACTOR = st.sampled_from([1.0, 1.5, 4.0, 8.0, 40.0])


@settings(deadline=None, max_examples=30)
@given(theta=THETA, head_dim=HEAD_DIM, factor=FACTOR)
def test_linear_rope_has_the_frequencies_of_transformers(theta: float, head_dim: int, factor: float) -> None:
    assert_rope_of_transformers(dict(rope_type="linear", rope_theta=theta, factor=factor), head_dim, 4096)


@settings(deadline=None, max_examples=60)
@given(
    theta=THETA,
    head_dim=HEAD_DIM,
    factor=FACTOR,
    low=st.sampled_from([0.5, 1.0, 2.0]),
    high=st.sampled_from([4.0, 8.0, 32.0]),
    original=st.sampled_from([64, 8192]),
)
def test_llama3_rope_has_the_frequencies_of_transformers(
    theta: float, head_dim: int, factor: float, low: float, high: float, original: int
) -> None:
    rope = dict(
        rope_type="llama3", rope_theta=theta, factor=factor, original_max_position_embeddings=original
    )
    assert_rope_of_transformers(rope | dict(low_freq_factor=low, high_freq_factor=high), head_dim, 131072)


@settings(deadline=None, max_examples=100)
@given(
    theta=THETA,
    head_dim=HEAD_DIM,
    positions=POSITIONS,
    factor=st.none() | FACTOR,
    original=st.sampled_from([64, 4096, 32768]),
    extras=st.fixed_dictionaries(
        {},
        optional=dict(
            beta_fast=st.sampled_from([32, 16.0, 64, None]),
            beta_slow=st.sampled_from([1, 2.0, None]),
            attention_factor=st.sampled_from([0.7, 1.0, None]),
            mscale=st.sampled_from([0.707, 1.0, None]),
            mscale_all_dim=st.sampled_from([0.707, 1.0, None]),
            truncate=st.booleans(),
        ),
    ),
)
def test_yarn_rope_has_the_frequencies_and_the_factor_of_transformers(
    theta: float, head_dim: int, positions: int, factor: float | None, original: int, extras: dict[str, Any]
) -> None:
    assume(original <= positions)
    rope = dict(rope_type="yarn", rope_theta=theta, factor=factor, original_max_position_embeddings=original)
    assert_rope_of_transformers(rope | extras, head_dim, positions)


def test_default_rope_is_theta_to_the_minus_2i_over_d() -> None:
    frequencies, factor = inverse_frequencies(RopeConfig("default", 1e4), 8)
    assert frequencies.tolist() == pytest.approx([1.0, 0.1, 0.01, 0.001]) and factor == 1.0


def test_rotary_gives_cos_and_sin_of_position_times_frequency() -> None:
    rope = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=64)
    config = config_of(rope, head_dim=8, positions=256)
    frequencies, factor = inverse_frequencies(config.rope, 8)
    cos, sin = Rotary(config, 256).at(5, 8)
    assert cos.shape == sin.shape == (3, 1, 8) and factor > 1
    for row, position in enumerate((5, 6, 7)):
        for i in range(8):
            angle = position * float(frequencies[i % 4])
            assert float(cos[row, 0, i]) == pytest.approx(factor * math.cos(angle), abs=1e-6)
            assert float(sin[row, 0, i]) == pytest.approx(factor * math.sin(angle), abs=1e-6)


def test_rotate_turns_each_pair_of_halves_by_its_angle() -> None:
    config = config_of(dict(rope_type="default", rope_theta=1e4), head_dim=4)
    x = random(3, 2, 4)
    turned = rotate(x, *Rotary(config, 16).at(7, 10))
    for t in range(3):
        for head in range(2):
            for i, frequency in enumerate((1.0, 0.01)):
                pair = complex(float(x[t, head, i]), float(x[t, head, i + 2]))
                angle = (7 + t) * frequency
                expected = pair * complex(math.cos(angle), math.sin(angle))
                found = complex(float(turned[t, head, i]), float(turned[t, head, i + 2]))
                assert abs(found - expected) < 1e-5


def test_scores_after_rotation_depend_only_on_the_distance() -> None:
    rotary = Rotary(config_of(dict(rope_type="default", rope_theta=1e4)), 512)
    q, k = random(1, 1, 16), random(1, 1, 16, seed=1)

    def score(at_q: int, at_k: int) -> float:
        one, other = rotate(q, *rotary.at(at_q, at_q + 1)), rotate(k, *rotary.at(at_k, at_k + 1))
        return float((one * other).sum())

    assert score(9, 4) == pytest.approx(score(405, 400), abs=1e-4)
    assert abs(score(9, 4) - score(9, 5)) > 1e-3


# Attention


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
    d=st.sampled_from([2, 8, 24]),
    window=st.sampled_from([None, 1, 2, 6, 26, 100]),
)
def test_attention_is_a_softmax_over_what_each_token_may_see(
    new: int, before: int, heads: tuple[int, int], d: int, window: int | None
) -> None:
    q, keys = random(new, heads[0], d), random(before + new, heads[1], d, seed=1)
    values = random(before + new, heads[1], d, seed=2)
    ours = attention(q, keys, values, window)
    assert ours.shape == (new, heads[0] * d) and ours.dtype == torch.float32
    assert torch.allclose(ours.double(), plain_attention(q, keys, values, window), atol=1e-5)


def test_a_token_cannot_see_those_behind_it_or_before_its_window() -> None:
    q, keys, values = random(6, 2, 4), random(6, 1, 4, seed=1), random(6, 1, 4, seed=2)
    full, windowed = attention(q, keys, values, None), attention(q, keys, values, 2)
    later = values.clone()
    later[4:] = 99.0
    assert torch.equal(attention(q, keys, later, None)[:4], full[:4])
    earlier = values.clone()
    earlier[:3] = 99.0
    assert torch.equal(attention(q, keys, earlier, 2)[4:], windowed[4:])
    assert not torch.allclose(attention(q, keys, earlier, 2)[3], windowed[3])


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("chunks", [[12], [5, 7], [1] * 12, [11, 1], [1, 11]])
def test_attention_in_chunks_is_that_of_the_whole(window: int | None, chunks: list[int]) -> None:
    q, keys, values = random(12, 4, 8), random(12, 2, 8, seed=1), random(12, 2, 8, seed=2)
    whole, parts, end = attention(q, keys, values, window), [], 0
    for tokens in chunks:
        begin, end = end, end + tokens
        parts.append(attention(q[begin:end], keys[:end], values[:end], window))
    assert torch.allclose(torch.cat(parts), whole, atol=1e-6)


def test_attention_reads_strided_heads() -> None:
    """Queries come out of a matrix product of many tokens as columns, not rows."""
    q = random(4 * 8, 5).t().reshape(5, 4, 8)
    assert not q.is_contiguous()
    keys, values = random(5, 2, 8, seed=1), random(5, 2, 8, seed=2)
    assert torch.allclose(
        attention(q, keys, values, None), attention(q.contiguous(), keys, values, None), atol=1e-6
    )
