"""The routed experts of a layer through the native kernels: the one class the engine calls for them.

A MoE layer's result is sum over j of weight[t, j] * ffn(expert[t, j], x[t]). `begin` takes the activations,
`add` computes experts as they are at hand, in any order and any number of calls, `end` sums. Each (token, j)
has a row of products of its own and rows are added in top-k order: the bits of the result do not depend on
which experts were resident.
"""

import ctypes
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.native import Context, Experts

Addresses = tuple[int, int, int]  # of gate, up and down; of a packed expert the first only


class Routing:
    """Which rows each expert serves, for T tokens with K experts each.

    expert_ids [T, K] int32. Row r of the products belongs to token r // K.
    """

    def __init__(self, expert_ids: Tensor) -> None:
        flat = expert_ids.numpy().reshape(-1)
        self._rows = np.argsort(flat, kind="stable").astype(np.int32)  # those of one expert side by side
        experts, first = np.unique(flat[self._rows], return_index=True)
        self._begin = np.append(first, len(flat)).astype(np.int32)  # where each expert's rows begin
        self._index = {expert: i for i, expert in enumerate(experts.tolist())}

    def rows_of(self, experts: Sequence[int]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """(begin [n + 1], rows): the rows that each of n experts serves, one expert's behind the other's."""
        bounds = [(self._begin[i], self._begin[i + 1]) for i in map(self._index.__getitem__, experts)]
        begin = np.zeros(len(bounds) + 1, np.int32)
        np.cumsum([end - first for first, end in bounds], out=begin[1:])
        if len(bounds) == 1:
            return begin, self._rows[bounds[0][0] : bounds[0][1]]
        return begin, np.concatenate([self._rows[first:end] for first, end in bounds])


class ExpertFFN:
    """One layer's event at a time. Not for use from two threads at once."""

    def __init__(
        self, context: Context, experts: Experts, hidden_size: int, top_k: int, pinned: bool = False
    ) -> None:
        """`pinned`: one token's products can be copied to a GPU at once."""
        self._context, self._experts = context, experts
        self._hidden_size, self._top_k = hidden_size, top_k
        self.products = torch.empty(top_k, hidden_size, pin_memory=pinned)  # grows to [T * K, D]
        self._table = (ctypes.c_uint64 * (3 * top_k))()
        self._one_row_each = (ctypes.c_int32 * (top_k + 1))(*range(top_k + 1))
        self._rows = (ctypes.c_int32 * top_k)()
        arrays = (self._table, self._one_row_each, self._rows)
        self._addresses = tuple(ctypes.addressof(array) for array in arrays)

    def begin(self, x: Tensor) -> None:
        """Start an event for x [T, D] float32, contiguous; it must stay as it is until the last `add`."""
        tokens = len(x)
        if len(self.products) < tokens * self._top_k:
            self.products = torch.empty(tokens * self._top_k, self._hidden_size)
        self._context.moe_begin(self._experts, x.data_ptr(), tokens, self._top_k)

    def add_to_one_token(self, experts: Sequence[tuple[int, Addresses]]) -> None:
        """Of T = 1: compute experts, each given as (its place among the K, its addresses)."""
        for i, (k, addresses) in enumerate(experts):
            self._table[3 * i : 3 * i + 3] = list(addresses)
            self._rows[i] = k
        table, row_begin, rows = self._addresses
        self._context.moe_experts(table, len(experts), row_begin, rows, self.products.data_ptr())

    def add(self, routing: Routing, experts: Sequence[tuple[int, Addresses]]) -> None:
        """Compute experts, each for all its tokens."""
        row_begin, rows = routing.rows_of([expert for expert, _ in experts])
        table = np.array([addresses for _, addresses in experts], np.uint64)
        self._context.moe_experts(
            table.ctypes.data, len(experts), row_begin.ctypes.data, rows.ctypes.data, self.products.data_ptr()
        )

    def end(self, weights: Tensor, y: Tensor) -> None:
        """y [T, D] += the sum of each token's products, weights [T, K], in top-k order."""
        self._context.moe_end(self.products.data_ptr(), weights.data_ptr(), y.data_ptr())
