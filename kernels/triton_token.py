"""How tokens begin on a GPU: their rows of the embedding matrix, by a Triton kernel.

Axis letters: T tokens, D hidden.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl
from torch import Tensor

from kernels.triton_decode import GpuMatrix
from kernels.triton_gemv import launch_options, wait_for_inputs


@triton.jit(do_not_specialize_on_alignment=["ids"])
def _embed(
    base, ids, out, missed, NO_MISS: tl.constexpr, D: tl.constexpr, C: tl.constexpr, FORMAT: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One token a program."""
    wait_for_inputs(PDL)
    t = tl.program_id(0)
    row = tl.load(ids + t).to(tl.int64)
    c = tl.arange(0, C)
    inside = c < D
    if FORMAT == "int8" or FORMAT == "int4":
        BITS: tl.constexpr = 8 if FORMAT == "int8" else 4
        BLOCK: tl.constexpr = 64 + 128 * BITS  # bytes of a superblock
        block = base + row // 16 * ((D + 63) // 64 * BLOCK) + c // 64 * BLOCK
        scale = block.to(tl.pointer_type(tl.float16)) + (c % 64 // 32 * 16 + row % 16)
        at = block + 64 + c % 64 // (32 // BITS) * 64 + 4 * (row % 16) + c % 4
        code = tl.load(at, mask=inside, other=0).to(tl.int32)
        if BITS == 4:
            code = (code >> (c % 8 // 4 * 4)) & 15
        value = (code - (1 << (BITS - 1))).to(tl.float32)
        value *= tl.load(scale, mask=inside, other=0.0).to(tl.float32)
    else:
        if FORMAT == "bf16":
            rows = base.to(tl.pointer_type(tl.bfloat16))
        elif FORMAT == "f16":
            rows = base.to(tl.pointer_type(tl.float16))
        else:
            rows = base.to(tl.pointer_type(tl.float32))
        value = tl.load(rows + row * D + c, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + t * D + c, value, mask=inside)
    if t == 0:
        tl.store(missed, NO_MISS)


def embed_rows(matrix: GpuMatrix, ids: Tensor, out: Tensor, missed: Tensor, no_miss: int) -> None:
    """out [T, D] fp32 = rows ids [T] int64, in range, of a weight [V, D]; missed int32 [1] = no_miss."""
    assert out.shape == (len(ids), matrix.columns) and out.is_contiguous()
    columns = triton.next_power_of_2(matrix.columns)
    _embed[(len(ids),)](
        matrix.data, ids, out, missed, NO_MISS=no_miss, D=matrix.columns, C=columns, FORMAT=matrix.format,
        num_warps=max(1, min(8, columns // 256)), **launch_options(out.device),
    )  # fmt: skip
