"""GPTQ: int4 codes that make up for each other's errors (Frantar et al., arXiv 2210.17323).

A matrix W [N, K] that meets inputs x is to become Q with the least sum of |(W - Q) x|^2 over a text. Columns
are rounded from left to right; the error of each is passed on to the columns to its right, by how they go
together in H, the mean of x x^T. It knows tensors and the packed format's groups; H comes from
flashmoe/calibration.py.

Rows do not depend on each other. With more than MAX_COLUMNS columns, H is kept as blocks on its diagonal. Not
covered: reordering of columns. Axis letters: T tokens, N rows, K columns, G groups of 32 columns.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import native
from kernels.native import GROUP, Context

DAMPING = 0.01  # of the mean of H's diagonal; ten times as much as long as H is not positive definite
MOST_DAMPING = 1e3
MAX_COLUMNS = 4096  # of one block of H: 64 MiB, and twice that for its factors
CHUNK_BYTES = 64 << 20  # of rows at a time
LEAST, MOST = -8.0, 7.0


class Hessian:
    """Sums of x x^T over inputs x [K], fp32, in blocks on the diagonal."""

    def __init__(self, columns: int) -> None:
        self.ranges = list(column_ranges(columns))
        self.blocks = [torch.zeros(end - begin, end - begin) for begin, end in self.ranges]
        self.count = 0

    def add(self, x: Tensor) -> None:
        """x [T, K]"""
        self.count += len(x)
        for (begin, end), block in zip(self.ranges, self.blocks, strict=True):
            part = x[:, begin:end]
            block.addmm_(part.T, part)

    def mean(self) -> list[Tensor]:
        return [block / max(1, self.count) for block in self.blocks]

    def mean_with(self, prior: list[Tensor], prior_count: float) -> list[Tensor]:
        """As if `prior_count` more inputs had been seen whose mean is `prior`."""
        return [
            (block + prior_count * like) / (self.count + prior_count)
            for block, like in zip(self.blocks, prior, strict=True)
        ]


def column_ranges(columns: int) -> Iterator[tuple[int, int]]:
    """(begin, end) of blocks of about the same size, whole groups but for the last."""
    count = -(-columns // MAX_COLUMNS)
    size = -(-columns // (count * GROUP)) * GROUP
    for begin in range(0, columns, size):
        yield begin, min(begin + size, columns)


def hessian_bytes(columns: int) -> int:
    return sum(4 * (end - begin) ** 2 for begin, end in column_ranges(columns))


class Factors(NamedTuple):
    """Of a damped block of H [k, k], upper triangular: H = root root^T, H's inverse = inverse^T inverse."""

    root: Tensor
    inverse: Tensor


def factorise(means: list[Tensor]) -> list[Factors] | None:
    """Factors of each block; None where a block has values that are not numbers.

    A column that no input reached stays apart from all others: it is rounded as it is.
    """
    factors: list[Factors] = []
    for mean in means:
        found = _factorise(mean)
        if found is None:
            return None
        factors.append(found)
    return factors


def _factorise(mean: Tensor) -> Factors | None:
    size = float(mean.diagonal().mean())
    if not torch.isfinite(mean).all() or size < 0:
        return None
    if size == 0:
        return Factors(torch.eye(len(mean)), torch.eye(len(mean)))
    damping = DAMPING
    while damping <= MOST_DAMPING:
        flipped = mean.flip(0, 1) / size
        flipped.diagonal().add_(damping)
        lower, failed = torch.linalg.cholesky_ex(flipped)
        if not int(failed):
            root = lower.flip(0, 1).contiguous()
            inverse = torch.linalg.solve_triangular(root, torch.eye(len(root)), upper=True)
            if torch.isfinite(inverse).all():
                return Factors(root * size**0.5, inverse / size**0.5)
        damping *= 10
    return None


@dataclass(frozen=True, slots=True)
class Quantised:
    """codes int8 [N, K] and scales fp16 [N, G]; the weight is their product."""

    codes: Tensor
    scales: Tensor
    sums: tuple[float, float]  # of |(W - Q) x|^2 and |W x|^2, for damped H

    def values(self) -> Tensor:
        """[N, K] fp32"""
        columns = self.codes.shape[1]
        return self.codes * self.scales.float().repeat_interleave(GROUP, dim=1)[:, :columns]


def quantise(context: Context, weight: Tensor, factors: list[Factors]) -> Quantised:
    """weight [N, K] of any float dtype. Sums that are not finite: so were weights."""
    rows, columns = weight.shape
    codes = torch.empty(rows, columns, dtype=torch.int8)
    scales = torch.empty(rows, -(-columns // GROUP), dtype=torch.float16)
    missed = squares = 0.0
    rows_each = max(1, CHUNK_BYTES // (4 * columns))
    for first in range(0, rows, rows_each):
        chunk = slice(first, first + rows_each)
        for (begin, end), block in zip(column_ranges(columns), factors, strict=True):
            part = weight[chunk, begin:end].float()
            squares += float((part @ block.root).square_().sum(dtype=torch.float64))
            groups = slice(begin // GROUP, -(-end // GROUP))
            missed += _quantise_block(
                context, part.clone(), block.inverse, codes[chunk, begin:end], scales[chunk, groups]
            )
    return Quantised(codes, scales, (missed, squares))


def _quantise_block(context: Context, rest: Tensor, inverse: Tensor, codes: Tensor, scales: Tensor) -> float:
    """Fill codes [N, k] and scales [N, G], using up `rest` [N, k]; returns the sum of squared errors."""
    columns = rest.shape[1]
    missed = 0.0
    for begin in range(0, columns, GROUP):
        end = min(begin + GROUP, columns)
        triangle = inverse[begin:end, begin:end]
        # What an error costs that the columns to the right make up for.
        importance = triangle.diagonal().pow(-2)
        importance /= importance.mean()
        scale = native.search_scales(context, rest[:, begin:end].contiguous(), importance.contiguous())
        found, errors = _quantise_group(rest[:, begin:end], scale.float(), triangle)
        codes[:, begin:end], scales[:, begin // GROUP] = found, scale
        rest[:, end:].addmm_(errors.T, inverse[begin:end, end:], alpha=-1)
        missed += float(errors.square().sum(dtype=torch.float64))
    return missed


def _quantise_group(group: Tensor, scale: Tensor, triangle: Tensor) -> tuple[Tensor, Tensor]:
    """group [N, 32], scale [N] -> codes int8 [N, 32], and errors [32, N] over the inverse's diagonal."""
    x = group.T.contiguous()  # [32, N]: a column lies in one run
    steps = torch.where(scale != 0, 1 / scale, 0.0)
    codes, errors = torch.empty_like(x), torch.empty_like(x)
    diagonal = triangle.diagonal().tolist()
    for j, column in enumerate(x):
        code = torch.mul(column, steps, out=codes[j]).round_().clamp_(LEAST, MOST)
        error = torch.addcmul(column, code, scale, value=-1, out=errors[j]).div_(diagonal[j])
        x[j + 1 :].addr_(triangle[j, j + 1 :], error, alpha=-1)
    return codes.T.to(torch.int8), errors
