"""Queries, keys and values of tokens on a GPU: norms, clipping, rotary embedding, into the KV cache.

In the order of kernels/cpu/attention.cpp. One compiled kernel takes any number of tokens: a token's bits do
not depend on those beside it.
Axis letters: T tokens, H query heads, G KV heads, d head size, P pages of the KV cache, M of a sequence.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl
from torch import Tensor

from kernels.triton_gemv import launch_options, wait_for_inputs


@triton.jit(do_not_specialize=["most_pages"], do_not_specialize_on_alignment=["pages", "positions"])
def _rope_and_store(
    qkv, cos, sin, pages, positions, keys, values, q_out, q_norm, k_norm, eps, clip, most_pages,
    PAGE: tl.constexpr, H: tl.constexpr, G: tl.constexpr, d: tl.constexpr, BLOCK: tl.constexpr,
    FULL: tl.constexpr, QK_NORM: tl.constexpr, CLIP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One head of one token a program: query heads, then keys, then values."""
    wait_for_inputs(PDL)
    t, head = tl.program_id(0), tl.program_id(1)
    place = tl.load(positions + t).to(tl.int64)
    page = tl.load(pages + t * most_pages + place // PAGE).to(tl.int64)
    of_token = qkv + t * (H + 2 * G) * d
    i = tl.arange(0, BLOCK)
    inside = i < d
    x = of_token + head * d
    cached = (page * PAGE + place % PAGE) * (G * d) + i
    if head >= H + G:
        v = tl.load(x + i, mask=inside, other=0.0)
        if CLIP:
            v = tl.minimum(tl.maximum(v, -clip), clip)
        tl.store(values + cached + (head - H - G) * d, v.to(values.dtype.element_ty), mask=inside)
    else:
        is_key = head >= H
        partner = tl.where(i < d // 2, i + d // 2, i - d // 2)
        v = tl.load(x + i, mask=inside, other=0.0)
        other = tl.load(x + partner, mask=inside, other=0.0)
        if QK_NORM == "full":
            heads = tl.where(is_key, G, H)
            start = of_token + tl.where(is_key, H * d, 0)
            j = tl.arange(0, FULL)
            every = tl.load(start + j, mask=j < heads * d, other=0.0)
            scale = tl.div_rn(
                1.0, tl.sqrt_rn(tl.div_rn(tl.sum(every * every), (heads * d).to(tl.float32)) + eps)
            )
            weight = (k_norm + (head - H) * d) if is_key else (q_norm + head * d)
            v = v * scale * tl.load(weight + i, mask=inside, other=0.0)
            other = other * scale * tl.load(weight + partner, mask=inside, other=0.0)
        if CLIP:
            v = tl.minimum(tl.maximum(v, -clip), clip)
            other = tl.minimum(tl.maximum(other, -clip), clip)
        if QK_NORM == "head":
            scale = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(v * v) / d + eps))
            weight = k_norm if is_key else q_norm
            v = v * scale * tl.load(weight + i, mask=inside, other=0.0)
            other = other * scale * tl.load(weight + partner, mask=inside, other=0.0)
        angle = place * d + i
        c = tl.load(cos + angle, mask=inside, other=0.0)
        s = tl.load(sin + angle, mask=inside, other=0.0)
        rotated = v * c + tl.where(i < d // 2, -other, other) * s
        if is_key:
            tl.store(keys + cached + (head - H) * d, rotated.to(keys.dtype.element_ty), mask=inside)
        else:
            tl.store(q_out + (t * H + head) * d + i, rotated.to(q_out.dtype.element_ty), mask=inside)


def rope_and_store(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    pages: Tensor,
    positions: Tensor,
    keys: Tensor,
    values: Tensor,
    q_out: Tensor,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    qk_norm: str = "none",
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
    clip: float = 0.0,
) -> None:
    """Norm, clip and rotate queries and keys; queries into q_out, keys and values into the cache.

    qkv [T, (H + 2 G) d] fp32; cos, sin [context, d] fp32. Token t is that at positions[t], int32 [T] on the
    device, of the sequence whose pages are pages[t], int32 [T, M], and goes there in keys, values
    [P, page, G, d]. q_out [T, H, d], of keys' and values' float type. qk_norm: "none", "head" (q_norm,
    k_norm [d]; after clipping) or "full" ([H d], [G d]; before). clip 0: none. Halves are paired as in
    Hugging Face checkpoints.
    """
    tokens = len(qkv)
    assert qkv.shape == (tokens, (heads + 2 * kv_heads) * head_dim) and qkv.is_contiguous()
    assert keys.shape[2:] == (kv_heads, head_dim) and all(t.is_contiguous() for t in (keys, values, pages))
    assert len(pages) == len(positions) == tokens and qk_norm in ("none", "head", "full")
    _rope_and_store[(tokens, heads + 2 * kv_heads)](
        qkv, cos, sin, pages, positions, keys, values, q_out, qkv if q_norm is None else q_norm,
        qkv if k_norm is None else k_norm, eps, clip, pages.shape[1], PAGE=keys.shape[1], H=heads, G=kv_heads,
        d=head_dim, BLOCK=triton.next_power_of_2(head_dim), FULL=triton.next_power_of_2(heads * head_dim),
        QK_NORM=qk_norm, CLIP=clip > 0, num_warps=4 if qk_norm == "full" else 1, **launch_options(qkv.device),
    )  # fmt: skip
