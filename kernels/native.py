"""The CPU library (kernels/cpu) from Python: formats, matrices and the context that computes.

Everything goes over as addresses: whoever makes a `Matrix` keeps its memory alive and in place. The native
module checks nothing; sizes and dtypes are checked here or by whoever read them from a file.
"""

import os
from collections.abc import Sequence
from enum import IntEnum
from typing import Final

import torch
from torch import Tensor

from kernels.cpu import _native
from kernels.cpu._native import Attention, Context, Experts, Matrix, Router

__all__ = [
    "ACTIVATIONS", "DTYPES", "GROUP", "Activation", "Attention", "Context", "Experts", "Format", "Matrix",
    "Router", "available_isas", "expert_bytes", "gather_rows", "lay_out_expert", "lay_out_matrix",
    "make_context", "matrix_bytes", "pack_expert", "pack_matrix", "plain_matrix", "search_scales",
    "unpack_expert", "unpack_matrix",
]  # fmt: skip

ISA_VARIABLE: Final = "FLASHMOE_ISA"
GROUP: Final = 32  # columns that share a scale (kernels/cpu/packed_layout.h)
TILE_ROWS: Final = 16


class Format(IntEnum):
    """How a matrix is stored: packed tiles (docs/kernels.md), or rows as in safetensors."""

    INT4 = 0
    INT8 = 1
    BF16 = 2
    F16 = 3
    F32 = 4

    @property
    def is_packed(self) -> bool:
        return self in (Format.INT4, Format.INT8)


class Activation(IntEnum):
    """What gates an expert: h = act(gate) * up; SWIGLU_CLAMPED is gpt-oss's (limit 7, alpha 1.702)."""

    SILU = 0
    GELU = 1
    GELU_TANH = 2
    RELU = 3
    SWIGLU_CLAMPED = 4


ACTIVATIONS: Final = {
    "silu": Activation.SILU,
    "gelu": Activation.GELU,
    "gelu_pytorch_tanh": Activation.GELU_TANH,
    "relu": Activation.RELU,
    "swiglu_clamped": Activation.SWIGLU_CLAMPED,
}  # by their name in config.json; gpt-oss names none

DTYPES: Final = {torch.bfloat16: Format.BF16, torch.float16: Format.F16, torch.float32: Format.F32}


def available_isas() -> list[str]:
    """The instruction sets that this machine runs, best first; "scalar" is always the last."""
    return _native.isa_names().split()


def make_context(threads: int, isa: str | None = None) -> Context:
    """Threads and workspace for one computation at a time, on instruction set `isa`, or $FLASHMOE_ISA, or the
    best.

    Raises ValueError for one that this machine does not run.
    """
    return Context(threads, isa or os.environ.get(ISA_VARIABLE, ""))


def plain_matrix(weight: Tensor) -> Matrix:
    """weight [N, K], contiguous, bf16, fp16 or fp32; keep it alive."""
    assert weight.is_contiguous() and weight.dim() == 2
    return Matrix(weight.data_ptr(), DTYPES[weight.dtype], *weight.shape)


def gather_rows(matrix: Matrix, ids: Sequence[int], columns: int) -> Tensor:
    """Rows of a matrix [N, columns], in range -> [len(ids), columns] fp32."""
    out = torch.empty(len(ids), columns)
    index = torch.tensor(ids)
    _native.gather_rows(matrix, index.data_ptr(), len(ids), out.data_ptr())
    return out


def matrix_bytes(format: Format, rows: int, columns: int) -> int:
    """The size of a packed matrix [rows, columns]."""
    return _native.packed_matrix_bytes(format, rows, columns)


def expert_bytes(format: Format, hidden: int, width: int) -> int:
    """The size of an expert: packed, or its three matrices one behind the other."""
    if format.is_packed:
        return _native.packed_expert_bytes(format, hidden, width)
    return 3 * hidden * width * (4 if format is Format.F32 else 2)


def pack_matrix(
    context: Context, weight: Tensor, format: Format, out: Tensor, importance: Tensor | None = None
) -> tuple[float, float]:
    """Quantise weight [N, K] into out [matrix_bytes] uint8.

    The scale of each group of 32 columns is the one with the least squared error, each column's weighted by
    importance [K] fp32. Returns (sum of weighted squared errors, sum of weighted squares).
    """
    assert out.numel() == matrix_bytes(format, *weight.shape) and out.dtype == torch.uint8
    return context.pack_matrix(plain_matrix(weight), format, _address(importance), out.data_ptr())


def pack_expert(
    context: Context,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    format: Format,
    out: Tensor,
    importance: tuple[Tensor | None, Tensor | None] = (None, None),
) -> tuple[float, float]:
    """Quantise gate, up [F, D] and down [D, F] into out [expert_bytes] uint8, as `pack_matrix` does.

    importance: of the D columns of gate and up, and of the F columns of down.
    """
    assert gate.shape == up.shape == down.shape[::-1]
    assert out.numel() == expert_bytes(format, gate.shape[1], gate.shape[0]) and out.dtype == torch.uint8
    return context.pack_expert(
        plain_matrix(gate), plain_matrix(up), plain_matrix(down), format,
        _address(importance[0]), _address(importance[1]), out.data_ptr(),
    )  # fmt: skip


def lay_out_matrix(context: Context, codes: Tensor, scales: Tensor, format: Format, out: Tensor) -> None:
    """Given codes int8 [N, K] and scales fp16 [N, ceil(K / 32)] as tiles into out [matrix_bytes] uint8."""
    rows, columns = codes.shape
    assert out.numel() == matrix_bytes(format, rows, columns) and out.dtype == torch.uint8
    _check_quantised(codes, scales)
    context.lay_out_matrix(format, rows, columns, codes.data_ptr(), scales.data_ptr(), out.data_ptr())


def lay_out_expert(
    context: Context, codes: Sequence[Tensor], scales: Sequence[Tensor], format: Format, out: Tensor
) -> None:
    """Likewise an expert, of gate and up [F, D] and down [D, F], into out [expert_bytes] uint8."""
    gate, up, down = codes
    width, hidden = gate.shape
    assert gate.shape == up.shape == down.shape[::-1]
    assert out.numel() == expert_bytes(format, hidden, width) and out.dtype == torch.uint8
    for pair in zip(codes, scales, strict=True):
        _check_quantised(*pair)
    gate_codes, up_codes, down_codes = (tensor.data_ptr() for tensor in codes)
    gate_scales, up_scales, down_scales = (tensor.data_ptr() for tensor in scales)
    context.lay_out_expert(
        format, hidden, width, gate_codes, up_codes, down_codes, gate_scales, up_scales, down_scales,
        out.data_ptr(),
    )  # fmt: skip


def search_scales(context: Context, weight: Tensor, importance: Tensor) -> Tensor:
    """The int4 scales that `pack_matrix` gives weight [N, K <= 32] fp32, contiguous -> [N] fp16."""
    rows, columns = weight.shape
    assert columns <= GROUP
    out = torch.empty(matrix_bytes(Format.INT4, rows, columns), dtype=torch.uint8)
    pack_matrix(context, weight, Format.INT4, out, importance)
    tiles = out.view(-(-rows // TILE_ROWS), -1)  # a superblock each: the first group's scales first
    return tiles[:, : 2 * TILE_ROWS].contiguous().view(torch.float16).flatten()[:rows]


def unpack_matrix(packed: Tensor, format: Format, rows: int, columns: int) -> Tensor:
    """packed uint8 -> [rows, columns] fp32."""
    out = torch.empty(rows, columns)
    _native.unpack_matrix(Matrix(packed.data_ptr(), format, rows, columns), out.data_ptr())
    return out


def unpack_expert(packed: Tensor, format: Format, hidden: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """packed uint8 -> gate, up [width, hidden] and down [hidden, width], fp32."""
    gate, up, down = torch.empty(width, hidden), torch.empty(width, hidden), torch.empty(hidden, width)
    _native.unpack_expert(
        format, hidden, width, packed.data_ptr(), gate.data_ptr(), up.data_ptr(), down.data_ptr()
    )
    return gate, up, down


def _check_quantised(codes: Tensor, scales: Tensor) -> None:
    assert codes.dtype == torch.int8 and scales.dtype == torch.float16
    assert scales.shape == (len(codes), -(-codes.shape[1] // GROUP))
    assert codes.is_contiguous() and scales.is_contiguous()


def _address(tensor: Tensor | None) -> int:
    if tensor is None:
        return 0
    assert tensor.dtype == torch.float32 and tensor.is_contiguous()
    return tensor.data_ptr()
