"""Keys and values of the tokens so far, in fp32, allocated once for the whole context.

Memory is touched only as tokens arrive, so a long context costs nothing until it is used. Layout
[context, KV heads, head size] a layer: the strides, and so the bits of attention, do not depend on the
context.
"""

import torch
from torch import Tensor

from flashmoe.config import ModelConfig


class KVCache:
    """`length` tokens are valid; the model appends behind them layer by layer, then calls `advance`."""

    def __init__(self, config: ModelConfig, context: int) -> None:
        shape = (context, config.num_key_value_heads, config.head_dim)
        self.context = context
        self.length = 0
        self._keys = [torch.empty(shape) for _ in range(config.num_hidden_layers)]
        self._values = [torch.empty(shape) for _ in range(config.num_hidden_layers)]

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Put [T, G, d] behind the valid tokens; returns views of all [length + T, G, d]."""
        end = self.length + keys.shape[0]
        assert end <= self.context, "more tokens than the context holds"
        self._keys[layer][self.length : end] = keys
        self._values[layer][self.length : end] = values
        return self._keys[layer][:end], self._values[layer][:end]

    def tensors(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the whole context, [context, G, d] each, valid or not."""
        return self._keys[layer], self._values[layer]

    def advance(self, tokens: int) -> None:
        """Make `tokens` appended ones valid, once every layer has them."""
        self.length += tokens

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        self.length = min(self.length, length)
