"""How a token begins on a GPU; without one in Triton's interpreter."""

import math

import pytest
import torch

from kernels.expert_slots import BITS, FLOATS, pack_matrix, unpack_matrix
from kernels.triton_decode import GpuMatrix
from kernels.triton_token import embed_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("columns", [64, 200])
@pytest.mark.parametrize("format", [*FLOATS, *BITS])
def test_rows_of_the_embedding_are_those_that_the_format_holds(format: str, columns: int) -> None:
    weight = torch.randn(37, columns, generator=torch.Generator().manual_seed(1))
    data = pack_matrix(format, weight)
    ids = torch.tensor([36, 0, 17])
    out = torch.full((3, columns), math.nan, device=DEVICE)
    missed = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    embed_rows(GpuMatrix(data.to(DEVICE), format, 37, columns), ids.to(DEVICE), out, missed, 99)
    assert torch.equal(out.cpu(), unpack_matrix(format, data, 37, columns)[ids]) and missed.item() == 99
