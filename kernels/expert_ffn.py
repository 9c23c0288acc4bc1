"""The routed experts of a layer through the native kernels: the one class the engine calls for them.

A MoE layer's result is sum over j of weight[t, j] * ffn(expert[t, j], x[t]). `begin` takes the activations,
`add` computes experts as they are at hand, in any order and any number of calls, `end` sums. Each (token, j) has
a row of products of its own and rows are added in top-k order: the bits of the result do not depend on which
experts were resident.
"""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.native import Context, Experts

Addresses = tuple[int, int, int]  # of gate, up and down; of a packed expert the first only


class Routing:
    """Which rows each expert serves, for T tokens with K experts each.

    expert_ids [T, K] int64. Row r of the products belongs to token r // K.
    """

    def __init__(self, expert_ids: Tensor) -> None:
        self.top_k = expert_ids.shape[1]
        flat = expert_ids.flatten()
        order = torch.argsort(flat, stable=True)
        experts, counts = torch.unique_consecutive(flat[order], return_counts=True)
        self.rows = order.int()  # [T * K], those of one expert side by side, ascending
        self.begin = torch.zeros(len(experts) + 1, dtype=torch.int32)  # where each expert's begin
        self.begin[1:] = counts.cumsum(0)
        self._index = {expert: i for i, expert in enumerate(experts.tolist())}
        last = self.rows[(self.begin[1:] - 1).long()] // self.top_k  # the last token of each
        self._last_token = dict(zip(self._index, last.tolist(), strict=True))

    @property
    def experts(self) -> list[int]:
        """The routed experts, each once, the one whose last token came earliest first."""
        return sorted(self._index, key=lambda expert: (self._last_token[expert], expert))

    def row_begin(self, expert: int) -> int:
        """The address of two int32: where this expert's rows begin and end."""
        return self.begin.data_ptr() + 4 * self._index[expert]


class ExpertFFN:
    """One layer's event at a time. Not for use from two threads at once."""

    def __init__(self, context: Context, experts: Experts, hidden_size: int, top_k: int) -> None:
        self._context, self._experts = context, experts
        self._hidden_size, self._top_k = hidden_size, top_k
        self._products = torch.empty(top_k, hidden_size)  # grows to [T * K, D]
        self._table = (ctypes.c_uint64 * (3 * top_k))()
        self._one_row_each = (ctypes.c_int32 * (top_k + 1))(*range(top_k + 1))
        self._rows = (ctypes.c_int32 * top_k)()
        self._addresses = tuple(map(ctypes.addressof, (self._table, self._one_row_each, self._rows)))

    def begin(self, x: Tensor) -> None:
        """Start an event for x [T, D] float32, contiguous; it must stay as it is until the last `add`."""
        tokens = len(x)
        if len(self._products) < tokens * self._top_k:
            self._products = torch.empty(tokens * self._top_k, self._hidden_size)
        self._context.moe_begin(self._experts, x.data_ptr(), tokens, self._top_k)

    def add_to_one_token(self, experts: Sequence[tuple[int, Addresses]]) -> None:
        """Of T = 1: compute experts, each given as (its place among the K, its addresses)."""
        for i, (k, addresses) in enumerate(experts):
            self._table[3 * i : 3 * i + 3] = addresses  # type: ignore[assignment]  # the stubs want a list
            self._rows[i] = k
        table, row_begin, rows = self._addresses
        self._context.moe_experts(table, len(experts), row_begin, rows, self._products.data_ptr())

    def add(self, routing: Routing, expert: int, addresses: Addresses) -> None:
        """Compute one expert for all its tokens."""
        self._table[:3] = addresses  # type: ignore[assignment]
        self._context.moe_experts(
            self._addresses[0],
            1,
            routing.row_begin(expert),
            routing.rows.data_ptr(),
            self._products.data_ptr(),
        )

    def end(self, weights: Tensor, y: Tensor) -> None:
        """y [T, D] += the sum of each token's products, weights [T, K], in top-k order."""
        self._context.moe_end(self._products.data_ptr(), weights.data_ptr(), y.data_ptr())
