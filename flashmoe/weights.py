"""Where a model's tensors are in its checkpoint, and the dense ones in memory.

`CheckpointLayout` finds and checks every tensor by the family's names: shapes against config.json, dtypes
against what we compute with. Experts stay on the drive as extents; `load_dense` reads all else into ordinary
memory.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from flashmoe.config import ModelConfig
from flashmoe.errors import ModelError
from storage.checkpoint import Checkpoint, TensorInfo
from storage.expert_reader import Extent

DTYPES: Final = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
ITEM_BYTES: Final = {"BF16": 2, "F16": 2, "F32": 4}
ExpertId = tuple[int, int]


@dataclass(frozen=True, slots=True)
class ExpertLayout:
    """The three matrices of one expert on the drive: gate [F, D], up [F, D], down [D, F], in `dtype`."""

    extents: tuple[Extent, Extent, Extent]
    dtype: torch.dtype


@dataclass(slots=True)
class LayerWeights:
    """The dense weights of one layer: matrices as in the checkpoint, vectors and the router in fp32."""

    input_norm: Tensor  # [D]
    post_attention_norm: Tensor  # [D]
    qkv: Tensor  # [(H + 2 G) d, D]
    qkv_bias: Tensor | None
    o: Tensor  # [D, H d]
    o_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    router: Tensor | None  # [E, D]; None in a layer without experts
    mlp: tuple[Tensor, Tensor, Tensor] | None  # gate, up, down of a dense layer or of the shared expert
    shared_gate: Tensor | None  # [1, D]


@dataclass(slots=True)
class DenseWeights:
    """Everything but the routed experts."""

    embedding: Tensor  # [V, D]
    norm: Tensor  # [D]
    lm_head: Tensor  # [V, D]; the embedding itself if tied
    layers: list[LayerWeights]


class CheckpointLayout:
    """A model's tensors by meaning. Raises ModelError for a missing tensor, a wrong shape or dtype."""

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig) -> None:
        self.checkpoint, self.config = checkpoint, config
        self._blocks = {
            layer: self._moe_block(layer) for layer, is_moe in enumerate(config.moe_layers) if is_moe
        }
        self.experts: dict[ExpertId, ExpertLayout] = {
            (layer, expert): self._expert(layer, expert)
            for layer in self._blocks
            for expert in range(config.num_experts)
        }
        dense = [(self._tensor(name, shape), widen) for name, shape, widen in self._dense_tensors()]
        for layer in range(config.num_hidden_layers):  # these three become one matrix
            names = [f"model.layers.{layer}.self_attn.{part}_proj.weight" for part in "qkv"]
            self._one_dtype(names[0], *(checkpoint.tensors[name] for name in names))
        self.dense_bytes = sum(
            i.nbytes // ITEM_BYTES[i.dtype] * 4 if widen else i.nbytes for i, widen in dense
        )
        self.dense_read_bytes = sum(info.nbytes for info, _ in dense)

    def _tensor(self, name: str, shape: tuple[int, ...]) -> TensorInfo:
        info = self.checkpoint.tensors.get(name)
        if info is None:
            raise ModelError(
                f"{self.checkpoint.folder} has no tensor {name}, which a {self.config.model_type} model needs"
            )
        if info.shape != shape:
            raise ModelError(
                f"tensor {name} has shape {list(info.shape)}; config.json asks for {list(shape)}"
            )
        if info.dtype not in DTYPES:
            raise ModelError(f"tensor {name} is {info.dtype}; supported: {', '.join(DTYPES)}")
        return info

    def _moe_block(self, layer: int) -> str:
        """The prefix under which this layer's router is found."""
        candidates = [f"model.layers.{layer}.{block}" for block in self.config.family.moe_blocks]
        return next((c for c in candidates if f"{c}.gate.weight" in self.checkpoint.tensors), candidates[0])

    def _expert(self, layer: int, expert: int) -> ExpertLayout:
        c, block = self.config, self._blocks[layer]
        d, f = c.hidden_size, c.moe_intermediate_size
        fused = f"{block}.experts.gate_up_proj"
        if fused in self.checkpoint.tensors:  # one tensor a layer: expert e is the e-th slice of each
            gate_up = self._tensor(fused, (c.num_experts, 2 * f, d))
            down = self._tensor(f"{block}.experts.down_proj", (c.num_experts, d, f))
            size = f * d * ITEM_BYTES[gate_up.dtype]
            base = gate_up.offset + expert * 2 * size
            down_size = f * d * ITEM_BYTES[down.dtype]
            extents = (
                Extent(gate_up.shard, base, size),
                Extent(gate_up.shard, base + size, size),
                Extent(down.shard, down.offset + expert * down_size, down_size),
            )
            return ExpertLayout(extents, self._one_dtype(fused, gate_up, down))
        names = [f"{block}.experts.{expert}.{p}.weight" for p in c.family.expert_projections]
        infos = [
            self._tensor(name, shape) for name, shape in zip(names, ((f, d), (f, d), (d, f)), strict=True)
        ]
        first, second, third = (Extent(i.shard, i.offset, i.nbytes) for i in infos)
        return ExpertLayout((first, second, third), self._one_dtype(names[0], *infos))

    @staticmethod
    def _one_dtype(name: str, *infos: TensorInfo) -> torch.dtype:
        dtypes = {info.dtype for info in infos}
        if len(dtypes) > 1:
            raise ModelError(
                f"the tensors beside {name} mix {', '.join(sorted(dtypes))}; they must share one dtype"
            )
        return DTYPES[infos[0].dtype]

    def _dense_tensors(self) -> Iterator[tuple[str, tuple[int, ...], bool]]:
        """(name, shape, kept in fp32) of every dense tensor, in the order in which they are loaded."""
        c = self.config
        d, q, kv = c.hidden_size, c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        yield "model.embed_tokens.weight", (c.vocab_size, d), False
        for layer in range(c.num_hidden_layers):
            at = f"model.layers.{layer}"
            yield f"{at}.input_layernorm.weight", (d,), True
            yield f"{at}.post_attention_layernorm.weight", (d,), True
            for name, rows in (("q", q), ("k", kv), ("v", kv)):
                yield f"{at}.self_attn.{name}_proj.weight", (rows, d), False
                if c.qkv_bias:
                    yield f"{at}.self_attn.{name}_proj.bias", (rows,), True
            yield f"{at}.self_attn.o_proj.weight", (d, q), False
            if c.o_bias:
                yield f"{at}.self_attn.o_proj.bias", (d,), True
            if c.family.qk_norm != "none":
                full = c.family.qk_norm == "full"
                yield f"{at}.self_attn.q_norm.weight", (q if full else c.head_dim,), True
                yield f"{at}.self_attn.k_norm.weight", (kv if full else c.head_dim,), True
            if layer in self._blocks:
                yield f"{self._blocks[layer]}.gate.weight", (c.num_experts, d), True
            mlp = self.mlp_prefix(layer)
            if mlp is not None:
                prefix, width = mlp
                yield f"{prefix}.gate_proj.weight", (width, d), False
                yield f"{prefix}.up_proj.weight", (width, d), False
                yield f"{prefix}.down_proj.weight", (d, width), False
            if layer in self._blocks and c.shared_expert_intermediate_size:
                yield f"{self._blocks[layer]}.shared_expert_gate.weight", (1, d), True
        yield "model.norm.weight", (d,), True
        if not c.tie_word_embeddings:
            yield "lm_head.weight", (c.vocab_size, d), False

    def mlp_prefix(self, layer: int) -> tuple[str, int] | None:
        """Name and width of the layer's dense network or shared expert; None if it has neither."""
        c = self.config
        if layer not in self._blocks:
            return f"model.layers.{layer}.mlp", c.intermediate_size
        if c.shared_expert_intermediate_size:
            return f"{self._blocks[layer]}.shared_expert", c.shared_expert_intermediate_size
        return None

    def moe_block(self, layer: int) -> str:
        """Name prefix of the layer's router and experts."""
        return self._blocks[layer]


def load_dense(layout: CheckpointLayout, progress: Callable[[int], None] | None = None) -> DenseWeights:
    """Read all dense weights; `progress` is told the bytes read since its last call."""
    c = layout.config

    def read(name: str, into: Tensor | None = None) -> Tensor:
        info = layout.checkpoint.tensors[name]
        tensor = torch.empty(info.shape, dtype=DTYPES[info.dtype]) if into is None else into
        out = memoryview(tensor.view(torch.uint8).reshape(-1).numpy())  # type: ignore[arg-type]
        layout.checkpoint.read_tensor(name, out=out)
        if progress is not None:
            progress(info.nbytes)
        return tensor

    def vector(name: str) -> Tensor:
        return read(name).float()

    def stacked(names: list[str]) -> Tensor:
        """Matrices with equal columns, one below the other, read in place."""
        infos = [layout.checkpoint.tensors[name] for name in names]
        whole = torch.empty(sum(i.shape[0] for i in infos), infos[0].shape[1], dtype=DTYPES[infos[0].dtype])
        row = 0
        for name, info in zip(names, infos, strict=True):
            read(name, whole[row : row + info.shape[0]])
            row += info.shape[0]
        return whole

    def layer_weights(layer: int) -> LayerWeights:
        at, full = f"model.layers.{layer}", c.family.qk_norm != "none"
        qkv = [f"{at}.self_attn.{name}_proj" for name in "qkv"]
        mlp, is_moe = layout.mlp_prefix(layer), c.moe_layers[layer]
        shared = is_moe and c.shared_expert_intermediate_size > 0
        return LayerWeights(
            input_norm=vector(f"{at}.input_layernorm.weight"),
            post_attention_norm=vector(f"{at}.post_attention_layernorm.weight"),
            qkv=stacked([f"{name}.weight" for name in qkv]),
            qkv_bias=torch.cat([vector(f"{name}.bias") for name in qkv]) if c.qkv_bias else None,
            o=read(f"{at}.self_attn.o_proj.weight"),
            o_bias=vector(f"{at}.self_attn.o_proj.bias") if c.o_bias else None,
            q_norm=vector(f"{at}.self_attn.q_norm.weight") if full else None,
            k_norm=vector(f"{at}.self_attn.k_norm.weight") if full else None,
            router=vector(f"{layout.moe_block(layer)}.gate.weight") if is_moe else None,
            mlp=(
                read(f"{mlp[0]}.gate_proj.weight"),
                read(f"{mlp[0]}.up_proj.weight"),
                read(f"{mlp[0]}.down_proj.weight"),
            )
            if mlp
            else None,
            shared_gate=vector(f"{layout.moe_block(layer)}.shared_expert_gate.weight") if shared else None,
        )

    embedding = read("model.embed_tokens.weight")
    return DenseWeights(
        embedding=embedding,
        layers=[layer_weights(layer) for layer in range(c.num_hidden_layers)],
        norm=vector("model.norm.weight"),
        lm_head=embedding if c.tie_word_embeddings else read("lm_head.weight"),
    )
