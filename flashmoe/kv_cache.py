"""Keys and values of the tokens so far, in fp32, allocated once for the whole context.

Memory is touched only as tokens arrive, so a long context costs nothing until it is used. Layout
[context, KV heads, head size] a layer: the strides, and so the bits of attention, do not depend on the
context.
"""

import torch
from torch import Tensor

from flashmoe.config import ModelConfig


class KVCache:
    """`length` tokens are valid; native code writes those behind them layer by layer, then `advance` is
    called.
    """

    def __init__(self, config: ModelConfig, context: int) -> None:
        shape = (context, config.num_key_value_heads, config.head_dim)
        self.context = context
        self.length = 0
        self._keys = [torch.empty(shape) for _ in range(config.num_hidden_layers)]
        self._values = [torch.empty(shape) for _ in range(config.num_hidden_layers)]

    def tensors(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the whole context, [context, G, d] each, valid or not."""
        return self._keys[layer], self._values[layer]

    def advance(self, tokens: int) -> None:
        """Make `tokens` more valid, once every layer has them."""
        self.length += tokens

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        self.length = min(self.length, length)
