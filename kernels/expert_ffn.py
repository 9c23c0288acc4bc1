"""All arithmetic of experts goes through `ExpertFFN`, the one class that a native back-end replaces.

A MoE layer's result is sum over j of weight[t, j] * ffn(expert[t, j], x[t]). The products land in a buffer
with one row per (token, j), in whatever order experts arrive, and `combine` adds each token's rows in top-k
order: so the bits of the result do not depend on which experts were resident.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.activation import ACTIVATIONS
from kernels.mixed_linear import MixedLinear


class ExpertWeights(NamedTuple):
    """One expert: gate and up [F, D], down [D, F], of a floating dtype; views of a slot while it is held."""

    gate: Tensor
    up: Tensor
    down: Tensor


class Routing:
    """Which rows each expert serves, for T tokens with K experts each.

    expert_ids [T, K] int64, weights [T, K] float32. Row r of the product buffer belongs to token r // K.
    """

    def __init__(self, expert_ids: Tensor, weights: Tensor) -> None:
        self.top_k = expert_ids.shape[1]
        flat = expert_ids.flatten()
        self.weights = weights.reshape(-1, 1)  # [T*K, 1]
        order = torch.argsort(flat, stable=True)
        experts, counts = torch.unique_consecutive(flat[order], return_counts=True)
        self._rows = dict(zip(experts.tolist(), torch.split(order, counts.tolist()), strict=True))

    @property
    def experts(self) -> list[int]:
        """The routed experts, each once, the one whose last token came earliest first."""
        return sorted(self._rows, key=lambda expert: (int(self._rows[expert][-1]) // self.top_k, expert))

    def rows(self, expert: int) -> Tensor:
        """Row indices [n] int64 of the products this expert owes, ascending."""
        rows: Tensor = self._rows[expert]
        return rows


class ExpertFFN:
    """Fused-by-hand torch back-end: fp32 activations on weights as stored."""

    def __init__(self, activation: str, linear: MixedLinear) -> None:
        self._activation = ACTIVATIONS[activation]
        self._linear = linear

    def feed_forward(self, x: Tensor, expert: ExpertWeights) -> Tensor:
        """x [n, D] float32 -> [n, D] float32: down(act(gate x) * up x)."""
        hidden = self._activation(self._linear(x, expert.gate)).mul_(self._linear(x, expert.up))
        return self._linear(hidden, expert.down)

    def one_token(self, x: Tensor, weight: Tensor, expert: ExpertWeights, product: Tensor) -> None:
        """x [1, D], weight [] float32; writes weight * ffn(x) to product [D]. The decode path: no gather."""
        torch.mul(self.feed_forward(x, expert)[0], weight, out=product)

    def tokens(
        self, x: Tensor, routing: Routing, expert_id: int, expert: ExpertWeights, products: Tensor
    ) -> None:
        """x [T, D]; writes this expert's rows of products [T*K, D]."""
        rows = routing.rows(expert_id)
        y = self.feed_forward(x[rows // routing.top_k], expert)  # [n, D]
        products[rows] = y * routing.weights[rows]

    @staticmethod
    def combine(products: Tensor, top_k: int) -> Tensor:
        """products [T*K, D] -> [T, D], each token's K rows added in top-k order."""
        rows = products.view(-1, top_k, products.shape[1])
        total = rows[:, 0].clone()
        for k in range(1, top_k):
            total += rows[:, k]
        return total
