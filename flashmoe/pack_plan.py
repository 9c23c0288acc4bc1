"""What a packed folder will hold: each tensor, what it is made of, and in which shard it lies.

Made from headers alone. A large tensor is made piece by piece, so that no model needs much memory.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from flashmoe.weights import CheckpointLayout, DenseMatrix, ExpertId
from kernels.native import Format, expert_bytes, matrix_bytes
from storage.checkpoint import TensorInfo
from storage.expert_reader import Extent
from storage.safetensors_writer import TensorSpec, shard_names
from storage.shard_file import PAGE_BYTES

SHARD_BYTES = 1 << 30
PIECE_BYTES = 64 << 20
TILE_ROWS = 16  # of a packed matrix; whole tiles can be made apart from each other


@dataclass(frozen=True, slots=True)
class Piece:
    """One buffer to write: some source bytes, copied or quantised.

    A matrix is `rows` of `columns`, one extent behind the other; an expert is gate, up, down, `rows` wide.
    """

    extents: tuple[Extent, ...]
    source: str  # dtype of the source as safetensors names it
    target: Format | None  # None: the bytes as they are
    nbytes: int  # to write; a copy is filled up with zeros
    rows: int = 0
    columns: int = 0
    expert: ExpertId | None = None

    @property
    def source_bytes(self) -> int:
        return sum(extent.nbytes for extent in self.extents)


@dataclass(frozen=True, slots=True)
class PackedTensor:
    """One tensor of the packed folder, in the order of its pieces."""

    spec: TensorSpec
    pieces: tuple[Piece, ...]
    layer: int | None  # of an expert
    is_quantised: bool


@dataclass(frozen=True, slots=True)
class PackPlan:
    """All shards, by name, and how experts are stored."""

    shards: dict[str, tuple[PackedTensor, ...]]
    expert_format: Format
    extent_bytes: int
    expert_bytes: int  # without the padding

    def tensors(self) -> Iterator[PackedTensor]:
        for shard in self.shards.values():
            yield from shard

    def digest(self) -> str:
        """The same for the same layout of the same tensors."""
        lines = (f"{name} {t.spec}" for name, tensors in self.shards.items() for t in tensors)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def plan_pack(
    layout: CheckpointLayout, experts: Format, dense: Format, shard_bytes: int = SHARD_BYTES
) -> PackPlan:
    """`experts`: INT4, INT8, or BF16 for the source's own dtype; `dense`: likewise."""
    c = layout.config
    stored = next(iter(layout.experts.values())).format  # all experts of a layout share one
    format = experts if experts.is_packed else stored
    size = expert_bytes(format, c.hidden_size, c.moe_intermediate_size)
    extent_bytes = -(-size // PAGE_BYTES) * PAGE_BYTES
    tensors = [_expert(layout, key, format, extent_bytes) for key in layout.experts]
    tensors += _dense(layout, dense)
    return PackPlan(_fill_shards(tensors, shard_bytes), format, extent_bytes, size)


def _expert(layout: CheckpointLayout, key: ExpertId, format: Format, extent_bytes: int) -> PackedTensor:
    layer, number = key
    expert, config = layout.experts[key], layout.config
    target = format if format.is_packed else None
    shape = config.moe_intermediate_size, config.hidden_size
    piece = Piece(expert.extents, expert.format.name, target, extent_bytes, *shape, expert=key)
    name = f"{layout.moe_block(layer)}.experts.{number}.packed"
    return PackedTensor(TensorSpec(name, "U8", (extent_bytes,)), (piece,), layer, format.is_packed)


def _dense(layout: CheckpointLayout, dense: Format) -> Iterator[PackedTensor]:
    """Everything but the experts: the large matrices quantised if asked for, the rest as it is."""
    of_experts = tuple({f"{layout.moe_block(layer)}.experts." for layer, _ in layout.experts})
    left = {name: info for name, info in layout.checkpoint.tensors.items() if not name.startswith(of_experts)}
    if dense.is_packed:
        for name, matrix, format in _matrices(layout, dense):
            for part in matrix.parts:
                del left[part.name]
            yield _packed_matrix(name, matrix, format)
    for info in left.values():
        pieces = tuple(
            Piece((Extent(info.shard, info.offset + begin, size),), info.dtype, None, size)
            for begin, size in _cut(info.nbytes, PIECE_BYTES)
        )
        yield PackedTensor(TensorSpec(info.name, info.dtype, info.shape), pieces, None, False)


def _matrices(layout: CheckpointLayout, dense: Format) -> Iterator[tuple[str, DenseMatrix, Format]]:
    """(name without the format, matrix, format). Embedding and output stay at int8: each token meets them."""
    c = layout.config
    ends = ["model.embed_tokens"] if c.tie_word_embeddings else ["model.embed_tokens", "lm_head"]
    for name in ends:
        yield f"{name}.weight", layout.matrix(name, c.vocab_size, c.hidden_size), Format.INT8
    for layer in range(c.num_hidden_layers):
        yield f"model.layers.{layer}.self_attn.qkv_proj.weight", layout.qkv(layer), dense
        for matrix in (layout.o(layer), *layout.mlp(layer)):
            yield matrix.parts[0].name, matrix, dense


def _packed_matrix(name: str, matrix: DenseMatrix, format: Format) -> PackedTensor:
    rows_each = max(TILE_ROWS, PIECE_BYTES // (2 * matrix.columns) // TILE_ROWS * TILE_ROWS)
    pieces = tuple(
        Piece(
            tuple(_extents_of_rows(matrix.parts, begin, count)),
            matrix.parts[0].dtype,
            format,
            matrix_bytes(format, count, matrix.columns),
            count,
            matrix.columns,
        )
        for begin, count in _cut(matrix.rows, rows_each)
    )
    nbytes = matrix_bytes(format, matrix.rows, matrix.columns)
    spec = TensorSpec(f"{name}.{format.name.lower()}", "U8", (nbytes,))
    return PackedTensor(spec, pieces, None, True)


def _extents_of_rows(parts: Sequence[TensorInfo], begin: int, count: int) -> Iterator[Extent]:
    """Where rows [begin, begin + count) of matrices that lie one below the other are."""
    first = 0
    for part in parts:
        low, high = max(begin, first), min(begin + count, first + part.shape[0])
        if low < high:
            row_bytes = part.nbytes // part.shape[0]
            yield Extent(part.shard, part.offset + (low - first) * row_bytes, (high - low) * row_bytes)
        first += part.shape[0]


def _cut(total: int, each: int) -> Iterator[tuple[int, int]]:
    for begin in range(0, total, each):
        yield begin, min(each, total - begin)


def _fill_shards(tensors: Iterable[PackedTensor], shard_bytes: int) -> dict[str, tuple[PackedTensor, ...]]:
    shards: list[list[PackedTensor]] = []
    room = 0
    for tensor in tensors:
        if not shards or tensor.spec.nbytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(tensor)
        room -= tensor.spec.nbytes
    return {name: tuple(shard) for name, shard in zip(shard_names(len(shards)), shards, strict=True)}
