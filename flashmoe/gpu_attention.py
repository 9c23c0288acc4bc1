"""Attention of a chunk on a GPU, by torch's kernels, and how many keys a step's kernel looks at.

Axis letters: T new tokens, H query heads, G KV heads, d head size, B keys seen.
"""

import torch
from torch import Tensor
from torch.nn import functional

SMALLEST_BUCKET = 2048  # keys


def bucket_for(length: int, context: int) -> int:
    """For how many keys the steps of a token are captured when `length` are valid: a power of two, or the
    context. What is not there costs programs that end at once."""
    bucket = SMALLEST_BUCKET
    while bucket < length:
        bucket *= 2
    return min(bucket, context)


def attend_many(q: Tensor, keys: Tensor, values: Tensor, window: int | None) -> Tensor:
    """A chunk: q [T, H, d] of the last T of the tokens in keys and values [B, G, d] -> [T, H * d]."""
    tokens, heads, _ = q.shape
    seen, kv_heads, _ = keys.shape
    q, keys, values = (t.transpose(0, 1)[None] for t in (q, keys, values))
    if seen == tokens and (window is None or window >= seen):
        y = functional.scaled_dot_product_attention(q, keys, values, is_causal=True, enable_gqa=True)
    else:  # with a mask, torch's fused kernel wants as many KV heads as there are heads
        places = torch.arange(seen, device=q.device)
        last = places[-tokens:, None]
        mask = places <= last
        if window is not None:
            mask &= places > last - window
        keys, values = (t.repeat_interleave(heads // kv_heads, 1) for t in (keys, values))
        y = functional.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
    return y[0].transpose(0, 1).reshape(tokens, -1)
