"""smolmoe's difference to its base: which neurons each expert has, routers, norms and low-rank corrections.

A safetensors file in one of two forms, the original and the one that `scripts/compress_demo_delta.py` makes
of it; both load here, so that the two models can be compared:

    original                    compact
    name      fp16              name int8, name.scale float32 that broadcasts to it
    idx       int16 [L, E, W]   idx.bitmap uint8 [L, E, F/8], a bit for each neuron of the dense FFN
    router    fp16  [L, E, D]   the bf16 that the model will have, in 12 bits: router.low uint8 [L, E, D],
                                router.high uint8 [L, E, D/2] (two 4-bit places), router.palette uint8 [16]

The router alone stays exact: at int8 it costs more (KL 0.022) than everything else together (0.009), because
a changed logit changes which experts run. All but its smallest weights have one of 16 high bytes (sign and
exponent).

L layers, E experts, W neurons of an expert, F neurons of the dense FFN, D hidden, R rank.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from flashmoe.demo_model.gguf_base import Float32

FILE_NAME = "smolmoe-delta.safetensors"


class Delta:
    """The difference's tensors, as float32, one layer at a time."""

    def __init__(self, path: Path) -> None:
        """Read the whole file (16 or 30 MB), whose SHA-256 has been checked: shapes are trusted."""
        self._tensors: dict[str, NDArray[Any]] = load_file(path)
        self.num_layers, self.num_experts = self._tensors["scale"].shape
        self.hidden_size = self._tensors["n1"].shape[1]

    def neurons(self, layer: int) -> NDArray[np.int64]:
        """The dense FFN's neurons that each expert of a layer has, ascending: [E, W]."""
        if "idx" in self._tensors:
            ids: NDArray[np.int64] = self._tensors["idx"][layer].astype(np.int64)
            return ids
        member = np.unpackbits(self._tensors["idx.bitmap"][layer], axis=-1)  # [E, F] of 0 and 1
        return np.nonzero(member)[1].reshape(self.num_experts, -1)

    def router(self, layer: int) -> Float32:
        """A layer's router weight, [E, D]."""
        if "router" in self._tensors:
            return self.tensor("router", layer)
        places = self._tensors["router.high"][layer]
        places = np.stack([places >> 4, places & 15], axis=-1).reshape(self.num_experts, -1)  # [E, D]
        high = self._tensors["router.palette"][places].astype(np.uint32)
        low = self._tensors["router.low"][layer].astype(np.uint32)
        values: Float32 = ((high << 8 | low) << 16).view(np.float32)
        return values

    def tensor(self, name: str, layer: int) -> Float32:
        """One tensor of a layer, its first axis (L) gone."""
        values: Float32 = self._tensors[name][layer].astype(np.float32)
        if (scale := self._tensors.get(f"{name}.scale")) is not None:
            values *= scale[layer]
        return values
