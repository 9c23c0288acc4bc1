"""Write safetensors files one tensor at a time, with the data section on a page boundary.

The safetensors library writes a whole dict at once, which needs the model's size in memory, and starts the
data wherever the header ends. Here a file is written under a temporary name, synced and renamed: it is there
whole or not at all. Does not convert anything: the bytes come in as they go out.
"""

import json
import os
import shutil
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

from storage.checkpoint import INDEX_NAME
from storage.host import sync_folder
from storage.safetensors_header import DTYPE_BITS, MAX_HEADER_BYTES, element_bytes, quote
from storage.shard_file import PAGE_BYTES
from storage.storage_errors import StorageError

Bytes = bytes | bytearray | memoryview


class TensorSpec(NamedTuple):
    """One tensor to write. `dtype` is the safetensors name ("BF16")."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Raises StorageError for an unknown dtype or an impossible shape."""
        nbytes = element_bytes(self.dtype, self.shape) if self.dtype in DTYPE_BITS else None
        if nbytes is None:
            raise StorageError(
                f"tensor {quote(self.name)}: {self.dtype} {list(self.shape)} cannot be written"
            )
        return nbytes


def write_safetensors(
    path: Path,
    tensors: Sequence[TensorSpec],
    data: Callable[[str], Bytes] | Iterable[Bytes | Iterable[Bytes]],
    metadata: Mapping[str, str] | None = None,
    align: int = PAGE_BYTES,
    private: bool = False,
) -> None:
    """Write `tensors` in the order given, without gaps, the first one at a multiple of `align` bytes.

    `data` is called with each tensor's name, or iterated, and gives its bytes, contiguous, or iterated piece
    by piece, and exactly as many as dtype and shape need; one tensor, or piece, is held at a time.
    `transformers` wants `metadata` to contain {"format": "pt"}. An existing file is replaced. `private`: only
    its owner may ever open it. On any error, a full disk included, nothing is left and StorageError names the
    path, the bytes needed and the bytes free.
    """
    header = header_bytes(tensors, metadata, align)
    needed_bytes = len(header) + sum(spec.nbytes for spec in tensors)
    _require_room(path, needed_bytes)
    chunks = map(data, (spec.name for spec in tensors)) if callable(data) else iter(data)
    with new_file(path, needed_bytes, private) as file:
        file.write(header)
        for spec in tensors:
            _write_tensor(file, spec, chunks)


def write_whole(path: Path, content: bytes) -> None:
    """One small file, there whole or not at all; an existing one is replaced. Raises StorageError."""
    with new_file(path, len(content)) as file:
        file.write(content)


def write_sharded(
    folder: Path,
    tensors: Sequence[TensorSpec],
    data: Callable[[str], Bytes],
    max_shard_bytes: int,
    together: Callable[[str], Hashable] | None = None,
    metadata: Mapping[str, str] | None = None,
    align: int = PAGE_BYTES,
) -> tuple[Path, ...]:
    """Write `model-00001-of-0000n.safetensors` … and their index into an existing folder; return the shards.

    No tensor is split. Tensors for which `together` gives the same key other than None are written side by
    side into one shard, where the first of them would stand. A shard is larger than `max_shard_bytes` of
    tensor data only where a single group is. On an error the shards written by this call are removed.
    """
    shards = _fill_shards(_groups(tensors, together), max_shard_bytes)
    paths = tuple(folder / name for name in shard_names(len(shards)))
    total_bytes = sum(spec.nbytes for spec in tensors)
    _require_room(folder / INDEX_NAME, total_bytes)
    written: list[Path] = []
    try:
        for path, specs in zip(paths, shards, strict=True):
            write_safetensors(path, specs, data, metadata, align)
            written.append(path)
        write_index(folder, {path.name: specs for path, specs in zip(paths, shards, strict=True)})
    except BaseException:  # Ctrl-C too: shards without an index are no checkpoint
        for path in written:
            path.unlink(missing_ok=True)
        raise
    return paths


def shard_names(count: int) -> list[str]:
    """As Hugging Face numbers them."""
    return [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]


def write_index(folder: Path, shards: Mapping[str, Sequence[TensorSpec]]) -> None:
    """Write the index of shards, by their names; an existing one is replaced."""
    weight_map = {spec.name: name for name, specs in shards.items() for spec in specs}
    total_bytes = sum(spec.nbytes for specs in shards.values() for spec in specs)
    index = json.dumps({"metadata": {"total_size": total_bytes}, "weight_map": weight_map}, indent=2).encode()
    with new_file(folder / INDEX_NAME, len(index)) as file:
        file.write(index)


def header_bytes(
    tensors: Sequence[TensorSpec], metadata: Mapping[str, str] | None = None, align: int = PAGE_BYTES
) -> bytes:
    """Length and JSON, padded with spaces (which the format allows) up to a multiple of `align`."""
    entries: dict[str, object] = {}
    if metadata is not None:
        entries["__metadata__"] = dict(metadata)
    begin = 0
    for spec in tensors:
        if spec.name in entries or spec.name == "__metadata__":
            raise StorageError(f"tensor name {quote(spec.name)} is taken; names must be unique")
        end = begin + spec.nbytes
        entries[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % align)
    if len(text) > MAX_HEADER_BYTES:
        raise StorageError(
            f"header of {len(text)} bytes is above the limit of {MAX_HEADER_BYTES}; use more shards"
        )
    return len(text).to_bytes(8, "little") + text


def _write_tensor(file: BinaryIO, spec: TensorSpec, chunks: Iterator[Bytes | Iterable[Bytes]]) -> None:
    chunk = next(chunks, b"")
    given = 0
    for piece in (chunk,) if isinstance(chunk, Bytes) else chunk:
        given += memoryview(piece).nbytes
        if given <= spec.nbytes:
            file.write(piece)
    if given != spec.nbytes:
        raise StorageError(
            f"tensor {quote(spec.name)}: {given} bytes given, {spec.nbytes} needed "
            f"for {spec.dtype} {list(spec.shape)}"
        )


@contextmanager
def new_file(path: Path, needed_bytes: int, private: bool = False) -> Iterator[BinaryIO]:
    """A file that gets its name only when it is complete and on the drive; until then `.name.pid.partial`.

    `private`: nobody else may open it.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    mode = 0o600 if private else 0o666  # what the process's umask leaves of it
    try:
        with open(partial, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync_folder(path.parent)
    except OSError as error:
        _remove(partial)
        raise StorageError(_failure(path, needed_bytes, error.strerror or str(error))) from error
    except BaseException:
        _remove(partial)
        raise


def _remove(partial: Path) -> None:
    """What is half written. A read-only file system refuses that, too: the first error is the one to tell."""
    with suppress(OSError):
        partial.unlink(missing_ok=True)


def _require_room(path: Path, needed_bytes: int) -> None:
    """Fail before the first gigabyte rather than after the last."""
    free_bytes = _free_bytes(path)
    if free_bytes is not None and free_bytes < needed_bytes:
        raise StorageError(_failure(path, needed_bytes, "the disk is too full"))


def _failure(path: Path, needed_bytes: int, reason: str) -> str:
    return f"cannot write {path}: {reason}; needs {needed_bytes} bytes, {_free_bytes(path)} are free"


def _free_bytes(path: Path) -> int | None:
    try:
        return shutil.disk_usage(path.parent).free
    except OSError:
        return None  # no such folder; opening the file will say so


def _groups(
    tensors: Sequence[TensorSpec], together: Callable[[str], Hashable] | None
) -> Iterable[list[TensorSpec]]:
    """The tensors that may not be separated, in the order of each group's first tensor."""
    groups: dict[Hashable, list[TensorSpec]] = {}
    for spec in tensors:
        key = together(spec.name) if together is not None else None
        groups.setdefault(("alone", spec.name) if key is None else ("together", key), []).append(spec)
    return groups.values()


def _fill_shards(groups: Iterable[list[TensorSpec]], max_shard_bytes: int) -> list[list[TensorSpec]]:
    """Fill one shard after another; a group that does not fit begins the next."""
    shards: list[list[TensorSpec]] = []
    room = 0
    for group in groups:
        group_bytes = sum(spec.nbytes for spec in group)
        if not shards or group_bytes > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].extend(group)
        room -= group_bytes
    return shards
