"""The experts' arithmetic in plain torch: the oracle that every kernel is compared with. Clear, not fast."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional


def _swiglu_clamped(gate: Tensor, up: Tensor, limit: float = 7.0, alpha: float = 1.702) -> Tensor:
    """gpt-oss's: (up + 1) * gate * sigmoid(alpha * gate), gate <= limit, |up| <= limit."""
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (up + 1) * gate * torch.sigmoid(alpha * gate)


ACTIVATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": lambda gate, up: functional.silu(gate) * up,
    "gelu": lambda gate, up: functional.gelu(gate) * up,
    "gelu_pytorch_tanh": lambda gate, up: functional.gelu(gate, approximate="tanh") * up,
    "relu": lambda gate, up: functional.relu(gate) * up,
    "swiglu_clamped": _swiglu_clamped,
}  # (gate x, up x) -> h


def ffn_reference(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, activation: str) -> Tensor:
    """down(act(gate x, up x)): x [T, D], gate and up [F, D], down [D, F] -> [T, D], in x's dtype."""
    gate, up, down = gate.to(x.dtype), up.to(x.dtype), down.to(x.dtype)
    return ACTIVATIONS[activation](x @ gate.T, x @ up.T) @ down.T


def moe_reference(
    x: Tensor,
    expert_ids: Tensor,
    weights: Tensor,
    experts: list[tuple[Tensor, Tensor, Tensor]],
    activation: str,
) -> Tensor:
    """Every token through its experts, summed in top-k order.

    x [T, D], expert_ids [T, K] int64, weights [T, K], experts: (gate, up, down) of each -> [T, D] in x's
    dtype.
    """
    y = torch.zeros_like(x)
    for t in range(x.shape[0]):
        for k in range(expert_ids.shape[1]):
            gate, up, down = experts[int(expert_ids[t, k])]
            y[t] += weights[t, k] * ffn_reference(x[t : t + 1], gate, up, down, activation)[0]
    return y
