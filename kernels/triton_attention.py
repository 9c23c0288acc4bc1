"""What is left of attention beside torch's: joining what one query saw in stretches of a long context.

`join_splits` merges softmax attention over S stretches of the keys, each with its log-sum-exp, as
flash-decoding does. Axis letters: S splits, H query heads, G KV heads, d head size.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton_gemv import launch_options, wait_for_inputs


@triton.jit
def _join_splits(
    parts, lse, out,
    parts_split, parts_head, parts_query, lse_split, lse_head, splits,
    GROUP: tl.constexpr, HEAD: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program a query head."""
    wait_for_inputs(PDL)
    head = tl.program_id(0)
    kv_head, query = head // GROUP, head % GROUP
    column = tl.arange(0, BLOCK)
    s = tl.arange(0, SPLITS)
    live = s < splits
    weight = tl.load(lse + s * lse_split + kv_head * lse_head + query, mask=live, other=float("-inf"))
    weight = tl.exp(weight - tl.max(weight, 0))
    weight = weight / tl.sum(weight, 0)
    rows = parts + (s * parts_split + kv_head * parts_head + query * parts_query)[:, None] + column[None, :]
    values = tl.load(rows, mask=live[:, None] & (column < HEAD)[None, :], other=0.0).to(tl.float32)
    tl.store(out + head * HEAD + column, tl.sum(values * weight[:, None], 0), mask=column < HEAD)


def join_splits(parts: Tensor, lse: Tensor, out: Tensor) -> None:
    """parts [S, G, H / G, d] float, lse [S, G, at least H / G] fp32 -> out [H * d] fp32.

    A split in which nothing was seen has an lse far below the others', and weighs nothing.
    """
    assert parts.stride(3) == 1 and lse.stride(2) == 1 and out.dtype == torch.float32
    splits, kv_heads, group, head_dim = parts.shape
    _join_splits[(kv_heads * group,)](
        parts, lse, out, *parts.stride()[:3], *lse.stride()[:2], splits,
        GROUP=group, HEAD=head_dim, BLOCK=triton.next_power_of_2(head_dim),
        SPLITS=triton.next_power_of_2(splits), **launch_options(out.device),
    )  # fmt: skip
