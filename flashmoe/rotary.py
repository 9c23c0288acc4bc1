"""The rotary embedding's tables: plain, linear, llama3 and yarn. Rotating is native (attention.cpp)."""

import math

import torch
from torch import Tensor

from flashmoe.config import ModelConfig, RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> tuple[Tensor, float]:
    """[d/2] float32 and the factor on cos and sin; formulas as in transformers' modeling_rope_utils.

    linear: every frequency divided by `factor`. llama3: low frequencies divided, a smooth band between. yarn
    (arXiv 2309.00071): a ramp between interpolated and original frequencies, and a factor on cos and sin.
    """
    frequencies = 1.0 / rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    given = rope.parameters
    if rope.rope_type == "linear":
        return frequencies / given["factor"], 1.0
    if rope.rope_type == "llama3":
        return _llama3(frequencies, given["factor"], given["low_freq_factor"], given["high_freq_factor"],
                       given["original_max_position_embeddings"]), 1.0  # fmt: skip
    if rope.rope_type == "yarn":
        return _yarn(frequencies, rope, head_dim)
    return frequencies, 1.0


def _llama3(frequencies: Tensor, factor: float, low: float, high: float, original: float) -> Tensor:
    wavelength = 2 * math.pi / frequencies
    smooth = ((original / wavelength - low) / (high - low)).clamp(0, 1)
    return (1 - smooth) * frequencies / factor + smooth * frequencies


def _yarn(frequencies: Tensor, rope: RopeConfig, head_dim: int) -> tuple[Tensor, float]:
    given, original = rope.parameters, rope.parameters["original_max_position_embeddings"]
    factor = given["factor"]

    def scale(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    def dimension(rotations: float) -> float:
        return head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    attention_factor = given.get("attention_factor")
    if attention_factor is None:
        both = given.get("mscale") and given.get("mscale_all_dim")
        attention_factor = scale(given["mscale"]) / scale(given["mscale_all_dim"]) if both else scale(1.0)
    low, high = dimension(given.get("beta_fast") or 32), dimension(given.get("beta_slow") or 1)
    if given.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    span = high - low if high != low else 0.001
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / span).clamp(0, 1)
    return frequencies / factor * ramp + frequencies * (1 - ramp), float(attention_factor)


class Rotary:
    """cos and sin of every position of the context, computed once: 2 x [context, d] float32."""

    def __init__(self, config: ModelConfig, context: int) -> None:
        frequencies, factor = inverse_frequencies(config.rope, config.head_dim)
        angles = torch.outer(torch.arange(context, dtype=torch.float32), frequencies)
        angles = angles.repeat(1, 2)  # [context, d]
        self.cos, self.sin = angles.cos() * factor, angles.sin() * factor

    def addresses(self, position: int) -> tuple[int, int]:
        """Where cos and sin of `position` lie; those of later positions follow."""
        return self.cos[position].data_ptr(), self.sin[position].data_ptr()
