"""RMS norm, rotary embedding and attention, in fp32, for one sequence.

Axis letters: T new tokens, S tokens in the KV cache including them, H query heads, G key/value heads, d head
size.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

from flashmoe.config import ModelConfig, RopeConfig

QUERY_BLOCK = 128  # queries of attention at once; torch holds 13 bytes of mask for each and each key


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., D] float32 / sqrt(mean(x^2) + eps) * weight [D]."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


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
        self._cos, self._sin = angles.cos() * factor, angles.sin() * factor

    def at(self, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """cos and sin of positions [begin, end): [T, 1, d] each, to broadcast over heads."""
        return self._cos[begin:end, None], self._sin[begin:end, None]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, heads, d] turned by its position, halves paired as in Hugging Face checkpoints."""
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos + turned * sin


def attention(q: Tensor, keys: Tensor, values: Tensor, window: int | None) -> Tensor:
    """Causal attention of the last T of S tokens: q [T, H, d], keys and values [S, G, d] -> [T, H * d].

    `window`: a token sees itself and the window - 1 before it; None: all before it. Queries go in blocks, so
    that the mask stays small however long the context is.
    """
    new, total = q.shape[0], keys.shape[0]
    q = q.contiguous()  # or torch does without its fused kernel: ten times slower, and all scores in memory
    keys, values = keys.transpose(0, 1)[None], values.transpose(0, 1)[None]  # [1, G, S, d]
    outputs: list[Tensor] = []
    for begin in range(0, new, QUERY_BLOCK):
        queries = q[begin : begin + QUERY_BLOCK]
        mask = _visible(total - new + begin, len(queries), total, window)
        y = functional.scaled_dot_product_attention(
            queries.transpose(0, 1)[None],
            keys,
            values,
            attn_mask=mask,
            enable_gqa=q.shape[1] != keys.shape[1],
        )  # [1, H, block, d]
        outputs.append(y[0].transpose(0, 1).reshape(len(queries), -1))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _visible(first: int, new: int, total: int, window: int | None) -> Tensor | None:
    """Which of `total` keys queries [first, first + new) see: [new, total] bool; None: all of them."""
    if new == 1 and first == total - 1 and (window is None or total <= window):
        return None
    position, key = torch.arange(first, first + new)[:, None], torch.arange(total)
    visible = key <= position
    return visible if window is None else visible & (key > position - window)
