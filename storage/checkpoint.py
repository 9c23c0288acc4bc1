"""A checkpoint folder as Hugging Face ships it: one safetensors file, or shards and their index.

Opening reads headers only, never tensor data, and checks everything that a later read relies on: after
`open_checkpoint` every offset lies inside its shard. Knows nothing of models: a tensor is a name, a dtype, a
shape and a place. Does not cover GGUF, pickled `.bin` files, or downloads.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, overload

from storage.safetensors_header import MAX_HEADER_BYTES, TensorInfo, load_json, quote, read_header
from storage.shard_file import open_shard, read_exactly
from storage.storage_errors import CheckpointError

__all__ = ["Checkpoint", "TensorInfo", "open_checkpoint"]

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The index of a checkpoint: which tensor lies where. Holds no open files."""

    folder: Path
    shards: tuple[Path, ...]
    shard_bytes: tuple[int, ...]  # the size of each shard when it was opened
    tensors: Mapping[str, TensorInfo]

    @overload
    def read_tensor(self, name: str) -> bytearray: ...
    @overload
    def read_tensor(self, name: str, out: memoryview) -> memoryview: ...
    def read_tensor(self, name: str, out: memoryview | None = None) -> bytearray | memoryview:
        """Read one whole tensor with ordinary buffered reads, straight into its buffer.

        With `out`, a writable buffer of the tensor's `nbytes`, fills and returns that; otherwise a new
        bytearray. Raises CheckpointError for an unknown name, ReadError if the drive fails or the file has
        become shorter.
        """
        info = self.tensors.get(name)
        if info is None:
            raise CheckpointError(f"{self.folder} has no tensor {quote(name)}")
        assert out is None or out.nbytes == info.nbytes, "the buffer must have the tensor's size"
        buffer = bytearray(info.nbytes) if out is None else out
        with open_shard(self.shards[info.shard]) as file:
            read_exactly(file, buffer, info.offset)
        return buffer


def open_checkpoint(folder: Path) -> Checkpoint:
    """Index the safetensors files of `folder`: `model.safetensors`, or the shards that its index file names.

    Raises CheckpointError if a file is missing, truncated or malformed, or if index and shards disagree.
    """
    if os.path.lexists(folder / SINGLE_NAME):  # lexists: a symlink to a missing file is named as missing
        return _open_shards(folder, (SINGLE_NAME,), {})
    if (folder / INDEX_NAME).exists():
        weight_map = _read_weight_map(folder / INDEX_NAME)
        return _open_shards(folder, tuple(sorted(set(weight_map.values()))), weight_map)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; --model takes a folder of safetensors files")
    raise CheckpointError(
        f"{folder} has neither {SINGLE_NAME} nor {INDEX_NAME}; only safetensors can be read"
    )


def _open_shards(folder: Path, names: tuple[str, ...], weight_map: Mapping[str, str]) -> Checkpoint:
    """`weight_map` (tensor name -> shard name) may be empty, when there is no index to agree with."""
    paths = tuple(folder / name for name in names)
    sizes: list[int] = []
    tensors: dict[str, TensorInfo] = {}
    for shard, path in enumerate(paths):
        size, infos = read_header(path, shard)
        sizes.append(size)
        for info in infos:
            if info.name in tensors:
                first = names[tensors[info.name].shard]
                raise CheckpointError(
                    f"tensor {quote(info.name)} is in two shards, {first} and {names[shard]}"
                )
            tensors[info.name] = info
    for name, shard_name in weight_map.items():
        if name not in tensors or names[tensors[name].shard] != shard_name:
            raise CheckpointError(
                f"{folder / INDEX_NAME}: tensor {quote(name)} is not in its shard {shard_name}"
            )
    return Checkpoint(folder, paths, tuple(sizes), MappingProxyType(tensors))


def _read_weight_map(path: Path) -> dict[str, str]:
    """The index file's tensor name -> shard name, with every shard name a plain file name."""
    with open_shard(path) as file:
        size = file.size()
        if size > MAX_HEADER_BYTES:
            raise CheckpointError(f"{path}: index of {size} bytes is above the limit of {MAX_HEADER_BYTES}")
        text = bytearray(size)
        read_exactly(file, text, 0)
    index = load_json(path, text)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: no weight_map that names tensors and their shards")
    for shard_name in set(map(_as_text, weight_map.values())):
        if not _is_plain_shard_name(shard_name):
            raise CheckpointError(f"{path}: {quote(shard_name)} is not a plain *.safetensors file name")
    return weight_map


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else ""  # whatever is no string is no file name either


def _is_plain_shard_name(name: str) -> bool:
    """No folders, no drive letters, no way out of the model's folder, on any operating system."""
    plain = name.isprintable() and not any(character in "/\\:" for character in name)
    return plain and name.endswith(".safetensors")
