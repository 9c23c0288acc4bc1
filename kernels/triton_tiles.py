"""For a prompt's products by torch, on a GPU: packed tiles (docs/kernels.md) as plain rows, and activations
rounded as they are before such weights. Axis letters: N rows, K columns, T tokens.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.expert_slots import BITS, GROUP, SUPER, TILE_ROWS, superblock_bytes
from kernels.triton_decode import GpuMatrix
from kernels.triton_gemv import quantise

SUPERBLOCKS = 4  # of a program
ROUNDED_GROUPS = 32  # likewise


@triton.jit
def _unpack(
    tiles, out, rows, columns, supers,
    BITS: tl.constexpr, SUPER_BYTES: tl.constexpr, SUPERBLOCKS: tl.constexpr,
):  # fmt: skip
    """One program: 16 rows of SUPERBLOCKS superblocks."""
    LINES: tl.constexpr = 2 * BITS  # of 16 dwords in a superblock
    VALUES: tl.constexpr = 32 // BITS  # in a dword
    tile = tl.program_id(0).to(tl.int64)
    r = tl.arange(0, 16)
    value = tl.arange(0, VALUES)
    # A dword of int4 holds columns 0 to 3 in its low nibbles and 4 to 7 in its high ones.
    shift = (value % 4) * 8 + (value // 4) * 4
    for i in range(SUPERBLOCKS):
        block = tl.program_id(1) * SUPERBLOCKS + i
        if block < supers:
            base = tiles + (tile * supers + block) * SUPER_BYTES
            line = tl.arange(0, LINES)
            dwords = tl.load((base + 64).to(tl.pointer_type(tl.int32)) + line[None, :] * 16 + r[:, None])
            codes = (dwords[:, :, None] >> shift[None, None, :]) & ((1 << BITS) - 1)
            group = tl.arange(0, 2)
            scales = tl.load(base.to(tl.pointer_type(tl.float16)) + group[None, :] * 16 + r[:, None])
            weights = tl.reshape(codes, (16, 2, 32)).to(tl.float32) - (1 << (BITS - 1))
            weights = tl.reshape(weights * scales.to(tl.float32)[:, :, None], (16, 64))
            row, column = tile * 16 + r, block * 64 + tl.arange(0, 64)
            live = (row < rows)[:, None] & (column < columns)[None, :]
            at = out + row[:, None] * columns + column[None, :]
            tl.store(at, weights.to(out.dtype.element_ty), mask=live)


def unpack_matrix(matrix: GpuMatrix, dtype: torch.dtype) -> Tensor:
    """int8 or int4 tiles -> [N, K] in dtype, rounded to nearest."""
    supers = -(-matrix.columns // SUPER)
    out = torch.empty(matrix.rows, matrix.columns, dtype=dtype, device=matrix.data.device)
    grid = (-(-matrix.rows // TILE_ROWS), -(-supers // SUPERBLOCKS))
    _unpack[grid](
        matrix.data, out, matrix.rows, matrix.columns, supers,
        BITS=BITS[matrix.format], SUPER_BYTES=superblock_bytes(matrix.format), SUPERBLOCKS=SUPERBLOCKS,
        num_warps=1,
    )  # fmt: skip
    return out


@triton.jit
def _round_to_int8(x, out, columns, GROUPS: tl.constexpr):
    """One program: GROUPS groups of 32 columns of a row."""
    column = tl.program_id(1) * GROUPS * 32 + tl.arange(0, GROUPS * 32)
    at = tl.reshape(tl.program_id(0).to(tl.int64) * columns + column, (GROUPS, 32))
    inside = tl.reshape(column < columns, (GROUPS, 32))
    codes, scales = quantise(tl.load(x + at, mask=inside, other=0.0))
    tl.store(out + at, codes.to(tl.float32) * scales[:, None], mask=inside)


def round_to_int8(x: Tensor) -> Tensor:
    """x [T, K] fp32, each group of 32 columns rounded to int8 and a scale, as the CPU library does with what
    meets int8 and int4 weights -> [T, K] fp32."""
    out = torch.empty_like(x)
    tokens, columns = x.shape
    grid = (tokens, triton.cdiv(columns, ROUNDED_GROUPS * GROUP))
    _round_to_int8[grid](x, out, columns, GROUPS=ROUNDED_GROUPS, num_warps=4)
    return out
