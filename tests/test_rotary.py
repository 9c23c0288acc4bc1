"""The rotary embedding's tables against transformers and against plain formulas."""

import ctypes
import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from flashmoe.config import ModelConfig, RopeConfig, parse_model_config
from flashmoe.rotary import Rotary, inverse_frequencies

transformers = pytest.importorskip("transformers", reason="transformers is the oracle; pip install -e .[dev]")
rope_utils = pytest.importorskip("transformers.modeling_rope_utils", reason="transformers is the oracle")


def config_of(rope: dict[str, Any], head_dim: int = 16, positions: int = 512) -> ModelConfig:
    return parse_model_config(dict(
        model_type="qwen3_moe", vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=head_dim, num_experts=2, num_experts_per_tok=1,
        moe_intermediate_size=4, max_position_embeddings=positions, rope_parameters=rope,
    ))  # fmt: skip


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
    rotary = Rotary(config, 256)
    assert factor > 1
    for position in (5, 6, 255):
        cos, sin = ((ctypes.c_float * 8).from_address(a) for a in rotary.addresses(position))
        for i in range(8):
            angle = position * float(frequencies[i % 4])
            assert cos[i] == pytest.approx(factor * math.cos(angle), abs=1e-6)
            assert sin[i] == pytest.approx(factor * math.sin(angle), abs=1e-6)


def test_later_positions_follow_in_memory() -> None:
    rotary = Rotary(config_of(dict(rope_type="default", rope_theta=1e4)), 64)
    (cos, sin), (cos_later, sin_later) = rotary.addresses(3), rotary.addresses(10)
    assert cos_later - cos == sin_later - sin == 7 * 16 * 4
