"""smolmoe's weights in Mixtral's names: the base's FFN split into experts, plus the difference, in bf16.

In the files the experts come first, layer by layer, with an expert's w1, w3 and w2 (gate, up, down) adjacent:
442,368 bytes, 108 pages of 4 KiB, so that every expert begins on a page. The dense weights follow.
Everything is computed elementwise in float32: every machine builds the same bytes.

L layers, E experts, W neurons of an expert, D hidden, R rank.
"""

import re
from collections.abc import Hashable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashmoe.demo_model.delta import Delta
from flashmoe.demo_model.gguf_base import BaseModel, Float32
from storage.safetensors_writer import TensorSpec

EXPERT_NAME = re.compile(r"model\.layers\.(\d+)\.block_sparse_moe\.experts\.(\d+)\.(w[123])\.weight")
LAYER_NAME = re.compile(r"model\.layers\.(\d+)\.(.+)\.weight")


def expert_of(name: str) -> Hashable:
    """An expert's (layer, expert) as text, None for a dense tensor: what must stay together in a shard."""
    match = EXPERT_NAME.fullmatch(name)
    return match.group(1, 2) if match else None


def mixtral_specs(config: dict[str, Any]) -> list[TensorSpec]:
    """Every tensor of a Mixtral with this config.json, in our file order, as BF16."""
    hidden, width, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q_rows, kv_rows = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    layers = [f"model.layers.{layer}." for layer in range(config["num_hidden_layers"])]
    experts = range(config["num_local_experts"])
    matrices = {"w1": (width, hidden), "w3": (width, hidden), "w2": (hidden, width)}
    dense: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (q_rows, hidden),
        "self_attn.k_proj": (kv_rows, hidden),
        "self_attn.v_proj": (kv_rows, hidden),
        "self_attn.o_proj": (hidden, q_rows),
        "block_sparse_moe.gate": (len(experts), hidden),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    shapes: dict[str, tuple[int, ...]] = {
        f"{layer}block_sparse_moe.experts.{expert}.{matrix}": shape
        for layer in layers
        for expert in experts
        for matrix, shape in matrices.items()
    }
    shapes["model.embed_tokens"] = (config["vocab_size"], hidden)
    shapes |= {layer + name: shape for layer in layers for name, shape in dense.items()}
    shapes["model.norm"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head"] = (config["vocab_size"], hidden)
    return [TensorSpec(f"{name}.weight", "BF16", shape) for name, shape in shapes.items()]


class SmolmoeWeights:
    """Computes one tensor after the other; asked in file order, it dequantises each base matrix once."""

    def __init__(self, base: BaseModel, delta: Delta) -> None:
        self._base, self._delta = base, delta
        self._layer = -1
        self._ffn: dict[str, Float32] = {}
        self._corrections: dict[str, Float32] = {}
        self._neurons: NDArray[np.int64] = np.empty((0, 0), np.int64)

    def bf16_bytes(self, name: str) -> memoryview:
        """The bytes of a tensor that `mixtral_specs` names."""
        return to_bf16(self._tensor(name)).data.cast("B")

    def _tensor(self, name: str) -> Float32:
        if name == "model.embed_tokens.weight":
            return self._base.tensor("token_embd.weight")
        if name == "model.norm.weight":
            return self._base.tensor("output_norm.weight")
        if match := EXPERT_NAME.fullmatch(name):
            return self._expert(int(match[1]), int(match[2]), match[3])
        match = LAYER_NAME.fullmatch(name)
        assert match is not None, name
        return self._dense(int(match[1]), match[2])

    def _expert(self, layer: int, expert: int, matrix: str) -> Float32:
        """w1 = gate[n] + gB gA, w3 = up[n] + uB uA, w2 = (down[:, n] + dB dA) scale, of neurons n."""
        if layer != self._layer:
            self._enter(layer)
        neurons, corrections = self._neurons[expert], self._corrections
        kind = {"w1": "g", "w3": "u", "w2": "d"}[matrix]
        correction = low_rank(corrections[f"{kind}B"][expert], corrections[f"{kind}A"][expert])
        if matrix == "w2":
            correction += self._ffn["down"][:, neurons]
            correction *= corrections["scale"][expert]
        else:
            correction += self._ffn["gate" if matrix == "w1" else "up"][neurons]
        return correction

    def _enter(self, layer: int) -> None:
        self._layer = layer
        self._neurons = self._delta.neurons(layer)
        self._ffn = {matrix: self._base.ffn(layer, matrix) for matrix in ("gate", "up", "down")}
        names = ("gA", "gB", "uA", "uB", "dA", "dB", "scale")
        self._corrections = {name: self._delta.tensor(name, layer) for name in names}

    def _dense(self, layer: int, name: str) -> Float32:
        delta = self._delta
        if name == "block_sparse_moe.gate":
            return delta.router(layer)
        if name == "input_layernorm":
            return delta.tensor("n1", layer)
        if name == "post_attention_layernorm":
            return delta.tensor("n2", layer)
        projection = name.removeprefix("self_attn.")[0]  # q, k, v or o
        correction = low_rank(delta.tensor(f"{projection}B", layer), delta.tensor(f"{projection}A", layer))
        return self._base.attention(layer, projection) + correction


def low_rank(b: Float32, a: Float32) -> Float32:
    """b @ a for b [out, R], a [R, in], as R outer products added in order.

    Not by a BLAS, which may fuse or reorder the sums and then round differently from machine to machine.
    """
    total: Float32 = np.multiply.outer(b[:, 0], a[0])  # [out, in]
    term = np.empty_like(total)
    for k in range(1, len(a)):
        total += np.multiply.outer(b[:, k], a[k], out=term)
    return total


def to_bf16(values: Float32) -> NDArray[np.uint16]:
    """Round finite float32 to bf16, to nearest and ties to even; the result holds bf16's bits."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    return rounded.astype("<u2")
