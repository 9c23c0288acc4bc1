"""y = x @ W.T + b with fp32 activations and weights as the checkpoint stores them (bf16, fp16 or fp32).

The weights are widened to fp32 exactly, a block of rows at a time, into one scratch buffer that stays in the
processor's cache; the product is then an fp32 one. So the result is that of an fp32 model with these weights,
the memory traffic is that of the stored bytes, and the bits do not depend on where in memory the weights lie.
Only fp32 weights are used where they are; a slot keeps their place in the page, so theirs do not either.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

# Elements of scratch, measured on 2 cores with 2048 x 768 experts in bf16 (scripts/bench_kernels.py): one
# token reads 11 GB/s with 1 MiB blocks (in L2) against 9.4 with the whole matrix at once; many tokens gain
# from larger blocks.
VECTOR_BLOCK = 1 << 18
MATRIX_BLOCK = 1 << 22


class MixedLinear:
    """The product, with its scratch: not for use from two threads at once."""

    scratch_bytes = 4 * MATRIX_BLOCK

    def __init__(self) -> None:
        self._scratch = torch.empty(MATRIX_BLOCK)

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [T, D] float32, weight [N, D], bias [N] float32 -> [T, N] float32, which may be strided."""
        y = self._one_token(x[0], weight) if x.shape[0] == 1 else self._tokens(x, weight)
        return y if bias is None else y + bias

    def _one_token(self, x: Tensor, weight: Tensor) -> Tensor:
        n = weight.shape[0]
        if weight.numel() <= VECTOR_BLOCK:  # smaller than a block: what the loop costs would show
            return torch.mv(weight.float(), x).view(1, n)
        y = torch.empty(n)
        for begin, end, block in self._blocks(weight, VECTOR_BLOCK):
            torch.mv(block, x, out=y[begin:end])
        return y.view(1, n)

    def _tokens(self, x: Tensor, weight: Tensor) -> Tensor:
        columns = x.t()  # [D, T]
        y = torch.empty(weight.shape[0], x.shape[0])  # [N, T]: a block of rows is contiguous
        for begin, end, block in self._blocks(weight, MATRIX_BLOCK):
            torch.mm(block, columns, out=y[begin:end])
        return y.t()

    def _blocks(self, weight: Tensor, elements: int) -> Iterator[tuple[int, int, Tensor]]:
        """Yield (first row, end row, fp32 rows) over weight [N, D]; fp32 weights are passed through whole."""
        n, d = weight.shape
        if weight.dtype == torch.float32:
            yield 0, n, weight
            return
        rows = max(1, elements // d)
        if rows * d > self._scratch.numel():
            self._scratch = torch.empty(rows * d)
        for begin in range(0, n, rows):
            end = min(begin + rows, n)
            block = self._scratch[: (end - begin) * d].view(end - begin, d)
            block.copy_(weight[begin:end])
            yield begin, end, block
