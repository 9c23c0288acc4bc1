"""Attention of a chunk on a GPU, or by the same calls on the CPU, against a plain softmax in fp32."""

import pytest
import torch
from torch import Tensor

from flashmoe.gpu_attention import attend_many, bucket_for
from flashmoe.gpu_kv_cache import KV_DTYPE

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def plain(q: Tensor, keys: Tensor, values: Tensor, seen: Tensor) -> Tensor:
    """q [T, H, d], keys and values [B, G, d], seen [T, B] bool -> [T, H * d]."""
    group = q.shape[1] // keys.shape[1]
    keys, values = (t.float().repeat_interleave(group, 1) for t in (keys, values))
    scores = torch.einsum("thd,bhd->htb", q.float(), keys) / q.shape[2] ** 0.5
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("htb,bhd->thd", weights, values).reshape(len(q), -1)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE, KV_DTYPE)


@pytest.mark.parametrize("window", [None, 7, 1000])
@pytest.mark.parametrize("before", [0, 20])
def test_a_chunk_sees_what_is_behind_each_of_its_tokens(before: int, window: int | None) -> None:
    tokens, heads, kv_heads, head_dim = 33, 6, 2, 32
    seen = before + tokens
    q, keys = random(tokens, heads, head_dim), random(seen, kv_heads, head_dim)
    values = random(seen + 1, kv_heads, head_dim)[1:]
    places = torch.arange(seen, device=DEVICE)
    allowed = places <= places[before:, None]
    if window is not None:
        allowed &= places > places[before:, None] - window
    y = attend_many(q, keys, values, window).float()
    assert torch.allclose(y, plain(q, keys, values, allowed), atol=3e-3)


def test_a_bucket_holds_the_keys_and_no_more_than_the_context() -> None:
    for context in (16, 300, 4096, 5000):
        for length in (1, context // 2, context):
            assert length <= bucket_for(length, context) <= context
    assert bucket_for(2049, 8192) == 4096
