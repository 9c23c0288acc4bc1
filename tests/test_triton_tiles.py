"""Packed tiles on a GPU (or in Triton's interpreter) give the weights that the CPU library reads from
them."""

import pytest
import torch

from kernels.native import Format, make_context, matrix_bytes, pack_matrix
from kernels.native import unpack_matrix as unpack_on_cpu
from kernels.triton_decode import GpuMatrix
from kernels.triton_tiles import round_to_int8, unpack_matrix

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def packed(format: Format, rows: int, columns: int) -> tuple[GpuMatrix, torch.Tensor]:
    """A random matrix, and what its bytes say."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    out = torch.empty(matrix_bytes(format, rows, columns), dtype=torch.uint8)
    pack_matrix(make_context(1), weight, format, out)
    matrix = GpuMatrix(out.to(DEVICE), format.name.lower(), rows, columns)
    return matrix, unpack_on_cpu(out, format, rows, columns)


@pytest.mark.parametrize("format", [Format.INT8, Format.INT4])
@pytest.mark.parametrize(("rows", "columns"), [(16, 64), (50, 200), (33, 576)])
def test_a_matrix_unpacks_as_on_the_cpu(format: Format, rows: int, columns: int) -> None:
    matrix, expected = packed(format, rows, columns)
    assert torch.equal(unpack_matrix(matrix, torch.float32).cpu(), expected)
    rounded = unpack_matrix(matrix, torch.bfloat16).float().cpu()
    assert torch.allclose(rounded, expected, rtol=2**-7, atol=0)  # Triton's interpreter cuts, a GPU rounds


@pytest.mark.parametrize("columns", [32, 96, 576, 2080])
def test_activations_are_rounded_in_groups_of_32(columns: int) -> None:
    x = torch.randn(5, columns, generator=torch.Generator().manual_seed(columns))
    x[1] = 0
    x[2, :32] *= 1e-3
    groups = x.view(5, -1, 32)
    largest = groups.abs().amax(-1, keepdim=True)
    codes = (groups * torch.where(largest > 0, 127 / largest, 0)).round()
    expected = (codes * (largest / 127)).view(5, -1)
    assert torch.allclose(round_to_int8(x.to(DEVICE)).cpu(), expected, rtol=1e-6, atol=1e-12)
