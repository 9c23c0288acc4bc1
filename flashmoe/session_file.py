"""One conversation's keys and values as a safetensors file that checks itself.

    fingerprint  U8 [32]         of the model, its files and the way it computes: other rows are of no use
    tokens       I64 [n]
    checksums    U64 [2 L, blocks]  xxh3_64 of every 256 rows of every tensor below
    head         U64 [1]         xxh3_64 of every byte before it, the header's included
    layers.0.keys, layers.0.values, layers.1.keys, …   F32 [n, G, d]

A file is hostile until checked. A flipped bit anywhere is found; of a long conversation only the rows that
are wanted are read; one block is in memory at a time. Knows nothing of folders and of who goes first.

Letters: n tokens, L layers, G KV heads, d head size.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from flashmoe.config import ModelConfig
from storage.expert_file import read_manifest
from storage.safetensors_header import TensorInfo, read_header
from storage.safetensors_writer import Bytes, TensorSpec, header_bytes, write_safetensors
from storage.shard_file import open_shard, read_exactly
from storage.storage_errors import CheckpointError

LAYOUT_VERSION = 1
BLOCK_ROWS = 256  # 0.5 MiB of Qwen3-30B-A3B's keys: large enough to read at speed, small beside any budget
FINGERPRINT_BYTES = 32
MOST_HEAD_BYTES = 256 << 20  # a million tokens of a thousand layers
FLOAT_BYTES = 4

Layers = Sequence[tuple[Tensor, Tensor]]  # keys and values of each layer


@dataclass(frozen=True, slots=True)
class SessionHead:
    """All that a file says before its rows, checked."""

    fingerprint: bytes
    tokens: NDArray[np.int64]
    layers: int
    heads: int  # G
    head_dim: int  # d
    checksums: NDArray[np.uint64]  # [2 L, blocks]
    rows_offset: int  # where layers.0.keys begins

    @property
    def row_bytes(self) -> int:
        """One token's keys, or values, of one layer."""
        return self.heads * self.head_dim * FLOAT_BYTES


def fingerprint(config: ModelConfig, folder: Path, exact: bool, device: str = "cpu") -> str:
    """64 hex digits that change when the rows of the same tokens might: another model, other weights, another
    precision, another kind of device, another layout.

    Of a packed folder the checksums of its manifest count, else names, sizes and times of its shards. Raises
    CheckpointError for a damaged manifest.
    """
    shape = [(f.name, getattr(config, f.name)) for f in fields(config) if f.name != "family"]
    manifest = read_manifest(folder)
    if manifest is not None:
        weights: list[object] = [sorted(manifest.tensors.items()), sorted(manifest.headers.items())]
    else:
        found = sorted(folder.glob("*.safetensors"))
        weights = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in found]
    text = repr((LAYOUT_VERSION, "float32", bool(exact), device, shape, weights))
    return hashlib.sha256(text.encode()).hexdigest()


def session_key(fingerprint: str, tokens: NDArray[np.int64]) -> str:
    """32 hex digits: what the file of these tokens is named by."""
    digest = hashlib.blake2b(bytes.fromhex(fingerprint), digest_size=16)
    digest.update(np.ascontiguousarray(tokens, "<i8").tobytes())
    return digest.hexdigest()


def file_bytes(tokens: int, layers: int, heads: int, head_dim: int) -> int:
    """The size of a session's file."""
    specs = _specs(tokens, layers, heads, head_dim)
    return len(header_bytes(specs)) + sum(spec.nbytes for spec in specs)


def write_session(path: Path, fingerprint: str, tokens: NDArray[np.int64], layers: Layers) -> None:
    """Write [n, G, d] float32 of every layer, readable by its owner alone. Raises StorageError."""
    _, heads, head_dim = layers[0][0].shape
    specs = _specs(len(tokens), len(layers), heads, head_dim)
    checksums = [[xxhash.xxh3_64_intdigest(block) for block in _blocks(rows)] for rows in _flat(layers)]
    head: list[Bytes] = [
        bytes.fromhex(fingerprint),
        np.ascontiguousarray(tokens, "<i8").tobytes(),
        np.array(checksums, "<u8").tobytes(),
    ]
    digest = xxhash.xxh3_64(header_bytes(specs))
    for part in head:
        digest.update(part)
    head.append(digest.intdigest().to_bytes(8, "little"))
    write_safetensors(path, specs, [*head, *map(_blocks, _flat(layers))], private=True)


def read_head(path: Path) -> SessionHead:
    """Read and check all before the rows. Raises CheckpointError, or ReadError where the drive fails."""
    _, tensors = read_header(path)
    specs = _shape_of(path, tensors)
    begin, end = tensors[0].offset, tensors[4].offset
    if end > MOST_HEAD_BYTES:
        raise CheckpointError(f"{path}: {end} bytes before the rows are above the limit of {MOST_HEAD_BYTES}")
    head = bytearray(end)
    with open_shard(path) as file:
        read_exactly(file, head, 0)
    if xxhash.xxh3_64_intdigest(memoryview(head)[:-8]) != int.from_bytes(head[-8:], "little"):
        raise CheckpointError(f"{path} is damaged: its head has another checksum than it says")
    (n, heads, head_dim), rows_of_checksums = specs[4].shape, specs[2].shape
    at = begin + FINGERPRINT_BYTES
    tokens = np.frombuffer(head, "<i8", n, at).astype(np.int64)
    checksums = np.frombuffer(head, "<u8", specs[2].nbytes // 8, at + 8 * n).astype(np.uint64)
    return SessionHead(
        bytes(head[begin:at]), tokens, rows_of_checksums[0] // 2, heads, head_dim,
        checksums.reshape(rows_of_checksums), end,
    )  # fmt: skip


def read_rows(path: Path, head: SessionHead, tokens: int, layers: Layers) -> None:
    """Copy the first `tokens` rows into the tensors given, [at least that many, G, d] each, on any device.

    Every block is compared with its checksum before it is copied; on an error some are copied already. Raises
    CheckpointError and ReadError.
    """
    of_file = (head.layers, head.heads, head.head_dim)
    for keys, values in layers:
        for rows in (keys, values):
            shape = (len(layers), *rows.shape[1:])
            if shape != of_file or rows.dtype != torch.float32 or len(rows) < tokens:
                raise CheckpointError(
                    f"{path} holds {of_file} layers, KV heads and head size in float32; {shape} in "
                    f"{rows.dtype}, {len(rows)} rows for {tokens}, are wanted"
                )
    n = len(head.tokens)
    if len(layers) != head.layers or not 0 <= tokens <= n:
        raise CheckpointError(
            f"{path} holds {n} tokens of {head.layers} layers; {tokens} of {len(layers)} are wanted"
        )
    scratch = torch.empty(min(BLOCK_ROWS, n), head.heads, head.head_dim)
    view = _bytes_of(scratch)
    with open_shard(path) as file:
        for tensor, rows in enumerate(_flat(layers)):
            base = head.rows_offset + tensor * n * head.row_bytes
            for block, begin in enumerate(range(0, tokens, BLOCK_ROWS)):
                there, wanted = min(BLOCK_ROWS, n - begin), min(BLOCK_ROWS, tokens - begin)
                piece = view[: there * head.row_bytes]
                read_exactly(file, piece, base + begin * head.row_bytes)
                if xxhash.xxh3_64_intdigest(piece) != int(head.checksums[tensor, block]):
                    raise CheckpointError(f"{path} is damaged: rows from {begin} on of tensor {tensor}")
                if not bool(torch.isfinite(scratch[:wanted]).all()):
                    raise CheckpointError(f"{path} holds numbers that are not finite")
                rows[begin : begin + wanted].copy_(scratch[:wanted])


def _specs(tokens: int, layers: int, heads: int, head_dim: int) -> list[TensorSpec]:
    blocks = -(-tokens // BLOCK_ROWS)
    rows = [
        TensorSpec(f"layers.{layer}.{name}", "F32", (tokens, heads, head_dim))
        for layer in range(layers)
        for name in ("keys", "values")
    ]
    return [
        TensorSpec("fingerprint", "U8", (FINGERPRINT_BYTES,)),
        TensorSpec("tokens", "I64", (tokens,)),
        TensorSpec("checksums", "U64", (2 * layers, blocks)),
        TensorSpec("head", "U64", (1,)),
        *rows,
    ]


def _shape_of(path: Path, tensors: Sequence[TensorInfo]) -> list[TensorSpec]:
    """The tensors of the session that a checked header describes."""
    layers, odd = divmod(len(tensors) - 4, 2)
    shape = tensors[4].shape if layers > 0 else ()
    if odd or len(shape) != 3 or min(shape) == 0:
        raise CheckpointError(f"{path} is no stored session: {len(tensors)} tensors, the fifth {list(shape)}")
    specs = _specs(shape[0], layers, shape[1], shape[2])
    if specs != [TensorSpec(tensor.name, tensor.dtype, tensor.shape) for tensor in tensors]:
        raise CheckpointError(f"{path} is no stored session: its tensors have other names or shapes")
    return specs


def _flat(layers: Layers) -> Iterator[Tensor]:
    for keys, values in layers:
        yield keys
        yield values


def _blocks(rows: Tensor) -> Iterator[memoryview]:
    """The bytes of [n, G, d], so many rows at a time: at most one block is copied."""
    for begin in range(0, len(rows), BLOCK_ROWS):
        block = rows[begin : begin + BLOCK_ROWS].detach().to("cpu").contiguous()
        yield _bytes_of(block)


def _bytes_of(rows: Tensor) -> memoryview:
    return rows.view(-1).view(torch.uint8).numpy().data
