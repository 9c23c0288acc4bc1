"""Where a model's tensors are in its checkpoint, and the dense ones in memory.

`CheckpointLayout` finds and checks every tensor by the family's names: shapes against config.json, dtypes
against what we compute with. A packed folder (storage/expert_file.py) has the same meanings under a few names
of its own. Experts stay on the drive as extents; `load_dense` reads all else into ordinary memory.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from flashmoe.config import ModelConfig
from flashmoe.errors import ModelError
from kernels.native import DTYPES as FORMAT_OF_DTYPE
from kernels.native import Format, Matrix, expert_bytes, matrix_bytes
from storage.checkpoint import Checkpoint, TensorInfo
from storage.expert_file import PackManifest
from storage.expert_reader import Extent

DTYPES: Final = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
ITEM_BYTES: Final = {"BF16": 2, "F16": 2, "F32": 4}
ExpertId = tuple[int, int]
CPU: Final = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class ExpertLayout:
    """One expert on the drive: gate [F, D], up [F, D], down [D, F], or one extent that holds all, packed."""

    extents: tuple[Extent, ...]
    format: Format


class Weight:
    """A matrix [N, K] in RAM or VRAM: rows of a floating dtype, or packed bytes."""

    def __init__(self, data: Tensor, format: Format, rows: int, columns: int) -> None:
        self.data, self.format, self.rows, self.columns = data, format, rows, columns
        self.matrix = Matrix(data.data_ptr(), format, rows, columns)  # of use where `data` is in RAM

    @classmethod
    def of(cls, tensor: Tensor) -> "Weight":
        """From rows [N, K], contiguous."""
        return cls(tensor, FORMAT_OF_DTYPE[tensor.dtype], *tensor.shape)


@dataclass(frozen=True, slots=True)
class DenseMatrix:
    """Where a dense matrix [rows, columns] is: one tensor, or several that become one, rows below rows."""

    parts: tuple[TensorInfo, ...]
    format: Format
    rows: int
    columns: int


@dataclass(slots=True)
class LayerWeights:
    """The dense weights of one layer: matrices as stored, vectors and the router in fp32."""

    input_norm: Tensor  # [D]
    post_attention_norm: Tensor  # [D]
    qkv: Weight  # [(H + 2 G) d, D]
    qkv_bias: Tensor | None
    o: Weight  # [D, H d]
    o_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    router: Tensor | None  # [E, D]; None in a layer without experts
    mlp: tuple[Weight, Weight, Weight] | None  # gate, up, down of a dense layer or of the shared expert
    shared_gate: Tensor | None  # [1, D]


@dataclass(slots=True)
class DenseWeights:
    """Everything but the routed experts."""

    embedding: Weight  # [V, D]
    norm: Tensor  # [D]
    lm_head: Weight  # [V, D]; the embedding itself if tied
    layers: list[LayerWeights]


class CheckpointLayout:
    """A model's tensors by meaning. Raises ModelError for a missing tensor, a wrong shape or dtype.

    `packed`: the manifest of a packed folder; None for a checkpoint as published.
    """

    def __init__(
        self, checkpoint: Checkpoint, config: ModelConfig, packed: PackManifest | None = None
    ) -> None:
        self.checkpoint, self.config, self.packed = checkpoint, config, packed
        self._blocks = {
            layer: self._moe_block(layer) for layer, is_moe in enumerate(config.moe_layers) if is_moe
        }
        self.experts: dict[ExpertId, ExpertLayout] = {
            (layer, expert): self._expert(layer, expert)
            for layer in self._blocks
            for expert in range(config.num_experts)
        }
        formats = {expert.format.name for expert in self.experts.values()}
        if len(formats) > 1:
            raise ModelError(f"the experts mix {', '.join(sorted(formats))}; they must share one")
        vectors = [self._tensor(name, shape) for name, shape in self._vectors()]
        matrices = [info for matrix in self._matrices() for info in matrix.parts]
        self.dense_bytes = sum(info.nbytes // ITEM_BYTES[info.dtype] * 4 for info in vectors)
        self.dense_bytes += sum(info.nbytes for info in matrices)
        self.dense_read_bytes = sum(info.nbytes for info in [*vectors, *matrices])

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
        if self.packed is not None:
            return self._packed_expert(f"{block}.experts.{expert}.packed")
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
            return ExpertLayout(extents, self._one_format(fused, gate_up, down))
        names = [f"{block}.experts.{expert}.{p}.weight" for p in c.family.expert_projections]
        infos = [
            self._tensor(name, shape) for name, shape in zip(names, ((f, d), (f, d), (d, f)), strict=True)
        ]
        first, second, third = (Extent(i.shard, i.offset, i.nbytes) for i in infos)
        return ExpertLayout((first, second, third), self._one_format(names[0], *infos))

    def _packed_expert(self, name: str) -> ExpertLayout:
        """One tensor of bytes: tiles, or the rows of gate, up and down one behind the other."""
        assert self.packed is not None
        d, f = self.config.hidden_size, self.config.moe_intermediate_size
        experts = self.packed.experts
        if (experts.hidden, experts.width) != (d, f):
            raise ModelError(
                f"the manifest of {self.checkpoint.folder} has experts of {experts.hidden} x {experts.width};"
                f" config.json asks for {d} x {f}"
            )
        format = Format[experts.format.upper()]
        info = self._bytes_tensor(name, experts.extent_bytes)
        if experts.extent_bytes < expert_bytes(format, d, f):
            raise ModelError(
                f"{name} has {info.nbytes} bytes; an {format.name.lower()} expert of {d} x {f} needs"
                f" {expert_bytes(format, d, f)}"
            )
        if format.is_packed:
            return ExpertLayout((Extent(info.shard, info.offset, info.nbytes),), format)
        size = expert_bytes(format, d, f) // 3
        rest = info.nbytes - 2 * size  # of down, and what fills the last page
        first, second = info.offset + size, info.offset + 2 * size
        extents = (
            Extent(info.shard, info.offset, size),
            Extent(info.shard, first, size),
            Extent(info.shard, second, rest),
        )
        return ExpertLayout(extents, format)

    def _bytes_tensor(self, name: str, nbytes: int) -> TensorInfo:
        """A packed tensor: U8 of exactly so many bytes."""
        info = self.checkpoint.tensors.get(name)
        if info is None:
            raise ModelError(f"{self.checkpoint.folder} has no tensor {name}, which its manifest promises")
        if info.dtype != "U8" or info.shape != (nbytes,):
            raise ModelError(
                f"tensor {name} is {info.dtype} {list(info.shape)}; the manifest asks for U8 [{nbytes}]"
            )
        return info

    @staticmethod
    def _one_format(name: str, *infos: TensorInfo) -> Format:
        dtypes = {info.dtype for info in infos}
        if len(dtypes) > 1:
            raise ModelError(
                f"the tensors beside {name} mix {', '.join(sorted(dtypes))}; they must share one dtype"
            )
        return FORMAT_OF_DTYPE[DTYPES[infos[0].dtype]]

    def _vectors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """(name, shape) of every tensor that is kept in fp32: norms, biases, routers."""
        c = self.config
        d, q, kv = c.hidden_size, c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        for layer in range(c.num_hidden_layers):
            at = f"model.layers.{layer}"
            yield f"{at}.input_layernorm.weight", (d,)
            yield f"{at}.post_attention_layernorm.weight", (d,)
            for name, rows in (("q", q), ("k", kv), ("v", kv)):
                if c.qkv_bias:
                    yield f"{at}.self_attn.{name}_proj.bias", (rows,)
            if c.o_bias:
                yield f"{at}.self_attn.o_proj.bias", (d,)
            if c.family.qk_norm != "none":
                full = c.family.qk_norm == "full"
                yield f"{at}.self_attn.q_norm.weight", (q if full else c.head_dim,)
                yield f"{at}.self_attn.k_norm.weight", (kv if full else c.head_dim,)
            if layer in self._blocks:
                yield f"{self._blocks[layer]}.gate.weight", (c.num_experts, d)
                if c.shared_expert_intermediate_size:
                    yield f"{self._blocks[layer]}.shared_expert_gate.weight", (1, d)
        yield "model.norm.weight", (d,)

    def _matrices(self) -> Iterator["DenseMatrix"]:
        """Every dense matrix that is kept as stored."""
        c = self.config
        yield self.matrix("model.embed_tokens", c.vocab_size, c.hidden_size)
        if not c.tie_word_embeddings:
            yield self.matrix("lm_head", c.vocab_size, c.hidden_size)
        for layer in range(c.num_hidden_layers):
            yield self.qkv(layer)
            yield self.o(layer)
            yield from self.mlp(layer)

    def matrix(self, name: str, rows: int, columns: int) -> "DenseMatrix":
        """The matrix `name`.weight, or what a packed folder has instead: `name`.weight.int8, say."""
        packed = self._packed_matrix(name, rows, columns)
        if packed is not None:
            return packed
        info = self._tensor(f"{name}.weight", (rows, columns))
        return DenseMatrix((info,), FORMAT_OF_DTYPE[DTYPES[info.dtype]], rows, columns)

    def _packed_matrix(self, name: str, rows: int, columns: int) -> "DenseMatrix | None":
        for format in (Format.INT8, Format.INT4) if self.packed is not None else ():
            packed = f"{name}.weight.{format.name.lower()}"
            if packed in self.checkpoint.tensors:
                info = self._bytes_tensor(packed, matrix_bytes(format, rows, columns))
                return DenseMatrix((info,), format, rows, columns)
        return None

    def qkv(self, layer: int) -> "DenseMatrix":
        """The projections to queries, keys and values as one matrix: rows of q, k, v."""
        c, at = self.config, f"model.layers.{layer}.self_attn"
        q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        packed = self._packed_matrix(f"{at}.qkv_proj", q + 2 * kv, c.hidden_size)
        if packed is not None:
            return packed
        parts = [
            self._tensor(f"{at}.{name}_proj.weight", (rows, c.hidden_size))
            for name, rows in (("q", q), ("k", kv), ("v", kv))
        ]
        return DenseMatrix(
            tuple(parts), self._one_format(parts[0].name, *parts), q + 2 * kv, c.hidden_size
        )

    def o(self, layer: int) -> "DenseMatrix":
        """The output projection of attention."""
        c = self.config
        name = f"model.layers.{layer}.self_attn.o_proj"
        return self.matrix(name, c.hidden_size, c.num_attention_heads * c.head_dim)

    def mlp(self, layer: int) -> tuple["DenseMatrix", ...]:
        """gate, up, down of a dense layer or of the shared expert; () where there is neither."""
        where = self.mlp_prefix(layer)
        if where is None:
            return ()
        prefix, width = where
        d = self.config.hidden_size
        shapes = (("gate", width, d), ("up", width, d), ("down", d, width))
        found = tuple(self.matrix(f"{prefix}.{name}_proj", rows, columns) for name, rows, columns in shapes)
        if len({matrix.format for matrix in found}) > 1:
            formats = ", ".join(sorted({matrix.format.name for matrix in found}))
            raise ModelError(f"the matrices of {prefix} mix {formats}; they must share one")
        return found

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


def load_dense(
    layout: CheckpointLayout,
    progress: Callable[[int], None] | None = None,
    device: torch.device = CPU,
) -> DenseWeights:
    """Read all dense weights to `device`, one by one; `progress` is told the bytes read since its last
    call."""
    c = layout.config

    def read(info: TensorInfo, into: Tensor) -> None:
        layout.checkpoint.read_tensor(info.name, out=memoryview(into.numpy()))  # type: ignore[arg-type]
        if progress is not None:
            progress(info.nbytes)

    def vector(name: str) -> Tensor:
        info = layout.checkpoint.tensors[name]
        tensor = torch.empty(info.shape, dtype=DTYPES[info.dtype])
        read(info, tensor.view(torch.uint8).reshape(-1))
        return tensor.float().to(device)

    def vectors(names: Sequence[str]) -> Tensor:
        return torch.cat([vector(name) for name in names])

    def matrix(where: DenseMatrix) -> Weight:
        data = torch.empty(sum(info.nbytes for info in where.parts), dtype=torch.uint8)
        begin = 0
        for info in where.parts:
            read(info, data[begin : begin + info.nbytes])
            begin += info.nbytes
        return Weight(data.to(device), where.format, where.rows, where.columns)

    def layer_weights(layer: int) -> LayerWeights:
        at, full = f"model.layers.{layer}", c.family.qk_norm != "none"
        qkv_bias = [f"{at}.self_attn.{name}_proj.bias" for name in "qkv"]
        is_moe = c.moe_layers[layer]
        shared = is_moe and c.shared_expert_intermediate_size > 0
        mlp = [matrix(where) for where in layout.mlp(layer)]
        return LayerWeights(
            input_norm=vector(f"{at}.input_layernorm.weight"),
            post_attention_norm=vector(f"{at}.post_attention_layernorm.weight"),
            qkv=matrix(layout.qkv(layer)),
            qkv_bias=vectors(qkv_bias) if c.qkv_bias else None,
            o=matrix(layout.o(layer)),
            o_bias=vector(f"{at}.self_attn.o_proj.bias") if c.o_bias else None,
            q_norm=vector(f"{at}.self_attn.q_norm.weight") if full else None,
            k_norm=vector(f"{at}.self_attn.k_norm.weight") if full else None,
            router=vector(f"{layout.moe_block(layer)}.gate.weight") if is_moe else None,
            mlp=(mlp[0], mlp[1], mlp[2]) if mlp else None,
            shared_gate=vector(f"{layout.moe_block(layer)}.shared_expert_gate.weight") if shared else None,
        )

    embedding = matrix(layout.matrix("model.embed_tokens", c.vocab_size, c.hidden_size))
    return DenseWeights(
        embedding=embedding,
        layers=[layer_weights(layer) for layer in range(c.num_hidden_layers)],
        norm=vector("model.norm.weight"),
        lm_head=embedding
        if c.tie_word_embeddings
        else matrix(layout.matrix("lm_head", c.vocab_size, c.hidden_size)),
    )
