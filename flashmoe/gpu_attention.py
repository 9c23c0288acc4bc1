"""Attention and the KV cache on a GPU: torch's attention kernels over keys and values in fp16.

A prompt's chunk is one call. One token's query is split over stretches of the keys, which are the batch of
one call, and joined afterwards: a single sequence would use as many multiprocessors as there are KV heads.
Shapes must not change between replays of a CUDA graph, so one token sees a power-of-two stretch of the cache
under a mask. Axis letters: T new tokens, H query heads, G KV heads, d head size, B keys seen, S splits.
"""

from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from flashmoe.config import ModelConfig
from flashmoe.vram_budget import KEYS_MULTIPLE
from kernels.triton_attention import join_splits

# fp16 keeps three bits more than bf16 of keys and values, which the CPU holds in fp32.
KV_DTYPE: Final = torch.float16
SMALLEST_BUCKET = 256  # keys
MOST_SPLITS = 32
MASKED = -3e4  # fp16 has no -1e30; a split that sees nothing then weighs exp(-3e4) = 0


class GpuKVCache:
    """Keys and values [context, G, d] of each layer; those of `tokens` are valid. As `KVCache`, on a GPU."""

    def __init__(self, config: ModelConfig, context: int, device: torch.device) -> None:
        self.context = context
        self.tokens: list[int] = []
        padded = bucket_for(context, context)  # what a bucket's mask hides is read, and must be finite
        shape = (padded, config.num_key_value_heads, config.head_dim)
        layers = range(config.num_hidden_layers)
        self._keys = [torch.zeros(shape, dtype=KV_DTYPE, device=device) for _ in layers]
        self._values = [torch.zeros(shape, dtype=KV_DTYPE, device=device) for _ in layers]

    def tensors(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the whole context, valid or not."""
        return self._keys[layer], self._values[layer]

    @property
    def length(self) -> int:
        return len(self.tokens)

    def append(self, tokens: list[int]) -> None:
        """Make more tokens valid, once every layer has them."""
        self.tokens += tokens

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        del self.tokens[length:]


def bucket_for(length: int, context: int) -> int:
    """How many keys one token looks at when `length` are valid: a power of two, or the padded context."""
    whole = -(-context // KEYS_MULTIPLE) * KEYS_MULTIPLE
    bucket = SMALLEST_BUCKET
    while bucket < length:
        bucket *= 2
    return min(bucket, whole)


def attend_one(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, out: Tensor) -> None:
    """One token: q [H, d], keys and values [B, G, d], mask [B] -> out [1, H * d] fp32."""
    bucket, kv_heads, head_dim = keys.shape
    splits = _splits(bucket)
    # The query heads of one KV head are the queries; each split of the keys is a sequence of the batch.
    k, v = (t.view(splits, -1, kv_heads, head_dim).transpose(1, 2) for t in (keys, values))  # [S, G, B/S, d]
    queries = q.view(1, kv_heads, -1, head_dim).expand(splits, -1, -1, -1)  # [S, G, H/G, d]
    bias = mask.view(splits, 1, 1, -1).expand(-1, kv_heads, queries.shape[2], -1)
    if not q.is_cuda:  # Triton's interpreter, in tests
        y = functional.scaled_dot_product_attention(
            queries[:1].float(), keys.transpose(0, 1)[None].float(), values.transpose(0, 1)[None].float(),
            mask.float().expand(1, kv_heads, queries.shape[2], -1),
        )  # fmt: skip
        out.copy_(y.reshape(1, -1))
        return
    parts, lse, _, _ = torch.ops.aten._scaled_dot_product_efficient_attention(
        queries, k, v, bias, compute_log_sumexp=True
    )
    join_splits(parts, lse, out)


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


def _splits(bucket: int) -> int:
    splits = min(MOST_SPLITS, bucket // KEYS_MULTIPLE)
    while bucket % splits:  # a context's own bucket is a multiple of KEYS_MULTIPLE, not always of this
        splits -= 1
    return splits
