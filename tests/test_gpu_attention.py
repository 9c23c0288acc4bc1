"""Attention on a GPU (or, where Triton interprets, its parts) against a plain softmax in fp32."""

import pytest
import torch
from torch import Tensor

from flashmoe.gpu_attention import KV_DTYPE, MASKED, attend_many, attend_one, bucket_for
from kernels.triton_attention import join_splits
from kernels.triton_token import mark_visible

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


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 2, 16), (9, 3, 64), (8, 1, 128)])
@pytest.mark.parametrize("position", [0, 130, 511])
def test_one_token_sees_what_is_behind_it_in_its_window(
    position: int, heads: int, kv_heads: int, head_dim: int, window: int | None
) -> None:
    q = random(heads, head_dim)
    keys, values = random(512, kv_heads, head_dim), random(512, kv_heads, head_dim)
    keys[position + 1 :] = 1e4  # what is not valid must not be seen
    mask = torch.full((512,), float("nan"), dtype=KV_DTYPE, device=DEVICE)
    mark_visible(torch.tensor([position], dtype=torch.int32, device=DEVICE), mask, window, MASKED)
    out = torch.full((1, heads * head_dim), float("nan"), device=DEVICE)
    attend_one(q, keys, values, mask, out)
    places = torch.arange(512, device=DEVICE)
    seen = places <= position
    if window is not None:
        seen &= places > position - window
    assert torch.allclose(out, plain(q[None], keys, values, seen[None]), atol=3e-3)


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


def test_splits_join_to_the_softmax_over_all_keys() -> None:
    splits, kv_heads, group, head_dim = 5, 2, 3, 48
    scores = torch.randn(kv_heads, group, splits * 8, generator=torch.Generator().manual_seed(0))
    scores[:, :, 8:16] = -3e4  # a split in which nothing is seen
    values = random(splits * 8, head_dim).float().cpu()
    expected = (scores.softmax(-1) @ values).reshape(-1)
    of_split = scores.view(kv_heads, group, splits, 8).permute(2, 0, 1, 3)
    parts = torch.einsum("sghb,sbd->sghd", of_split.softmax(-1), values.view(splits, 8, -1)).to(DEVICE)
    lse = torch.zeros(splits, kv_heads, 32, device=DEVICE)
    lse[:, :, :group] = of_split.logsumexp(-1).to(DEVICE)
    out = torch.full((kv_heads * group * head_dim,), float("nan"), device=DEVICE)
    join_splits(parts, lse, out)
    assert torch.allclose(out.cpu(), expected, atol=1e-5)


def test_a_bucket_holds_the_keys_and_no_more_than_the_padded_context() -> None:
    for context in (16, 300, 4096, 5000):
        for length in (1, context // 2, context):
            bucket = bucket_for(length, context)
            assert length <= bucket <= -(-context // 128) * 128 and bucket % 128 == 0
    assert bucket_for(257, 4096) == 512
