"""The header of one safetensors file, checked as if an enemy had written it.

Format: https://huggingface.co/docs/safetensors — eight bytes of little-endian header length, a JSON header,
the tensors' bytes without holes. Everything is bounded before it is allocated: the header by the file's size
and by the 100 MB that the safetensors library allows too, shapes and offsets by the file. Tensor data is
never read here.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from storage.host import ReadFile
from storage.shard_file import open_shard, read_exactly
from storage.storage_errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
MAX_ELEMENTS = 2**63 - 1

DTYPE_BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor's bytes lie."""

    name: str
    dtype: str  # the safetensors name: "BF16", "F32", ...
    shape: tuple[int, ...]
    shard: int  # index into Checkpoint.shards
    offset: int  # absolute byte offset in the shard
    nbytes: int


def read_header(path: Path, shard: int = 0) -> tuple[int, tuple[TensorInfo, ...]]:
    """Read and check one file's header; return the file's size and its tensors in the order of their bytes.

    Raises CheckpointError for whatever the safetensors specification forbids: wrong lengths, unknown dtypes,
    shapes that do not fill their bytes, overlaps, holes, a file shorter or longer than its header says.
    """
    with open_shard(path) as file:
        size, text = file.size(), _read_header_text(file)
    entries = _parse_json(path, text)
    data_begin = 8 + len(text)
    tensors = [_tensor_info(path, name, entry, shard, data_begin) for name, entry in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    _check_layout(path, tensors, data_begin, size)
    return size, tuple(tensors)


def element_bytes(dtype: str, shape: Sequence[int]) -> int | None:
    """The bytes that `shape` of a known dtype fills; None if that is no whole number or beyond 2**63."""
    elements = 1
    for dimension in shape:
        if dimension < 0 or dimension > MAX_ELEMENTS:
            return None
        elements *= dimension
        if elements > MAX_ELEMENTS:  # stop here: a long list of large numbers would take hours to multiply
            return None
    bits = elements * DTYPE_BITS[dtype]
    return bits // 8 if bits % 8 == 0 else None


def quote(name: str) -> str:
    """A name from a file, fit for a terminal: control characters escaped, at most 120 characters."""
    return repr(name if len(name) <= 120 else name[:117] + "...")


def load_json(path: Path, text: bytes | bytearray) -> Any:
    """Parse JSON that may be hostile; duplicate keys, NaN and bottomless nesting are CheckpointErrors."""
    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    except RecursionError:
        raise CheckpointError(f"{path}: JSON is nested too deeply") from None
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, numbers of thousands of digits
        raise CheckpointError(f"{path}: not valid JSON: {str(error)[:200]}") from None


def _read_header_text(file: ReadFile) -> bytearray:
    """The JSON text, whose length is checked before anything of that length is allocated."""
    path, size = file.path, file.size()
    if size < 8:
        raise CheckpointError(f"{path} is truncated: {size} bytes, too short for a safetensors header")
    length_field = bytearray(8)
    read_exactly(file, length_field, 0)
    length = int.from_bytes(length_field, "little")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{path}: header length {length} is above {MAX_HEADER_BYTES}; not a safetensors file?"
        )
    if 8 + length > size:
        raise CheckpointError(
            f"{path} is truncated: its header alone needs {8 + length} bytes, the file has {size}; "
            "download it again"
        )
    text = bytearray(length)
    read_exactly(file, text, 8)
    return text


def _parse_json(path: Path, text: bytes | bytearray) -> dict[str, Any]:
    if not text.startswith(b"{"):
        raise CheckpointError(f"{path}: header does not begin with '{{'; not a safetensors file?")
    entries = load_json(path, text)
    assert isinstance(entries, dict)  # it began with a brace
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ must map strings to strings")
    return entries


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"key {quote(twice)} appears twice")
    return entries


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def _tensor_info(path: Path, name: str, entry: Any, shard: int, data_begin: int) -> TensorInfo:
    where = f"{path}: tensor {quote(name)}"
    if not isinstance(entry, dict):
        raise CheckpointError(f"{where}: entry is not an object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise CheckpointError(f"{where}: unknown dtype {quote(str(dtype))}")
    if not _are_sizes(shape):
        raise CheckpointError(f"{where}: shape is not a list of non-negative integers")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where}: data_offsets are not [begin, end] with 0 <= begin <= end")
    begin, end = offsets
    needed = element_bytes(dtype, shape)
    if needed is None:
        raise CheckpointError(f"{where}: {dtype} {quote(str(shape))} is no possible number of bytes")
    if needed != end - begin:
        raise CheckpointError(
            f"{where}: {dtype} {quote(str(shape))} needs {needed} bytes, its offsets "
            f"[{begin}, {end}] hold {end - begin}"
        )
    return TensorInfo(name, dtype, tuple(shape), shard, data_begin + begin, end - begin)


def _are_sizes(values: Any) -> TypeGuard[list[int]]:
    # type() and not isinstance(): JSON's true is an int to isinstance.
    return isinstance(values, list) and all(
        type(value) is int and 0 <= value <= MAX_ELEMENTS for value in values
    )


def _check_layout(path: Path, tensors: Sequence[TensorInfo], data_begin: int, size: int) -> None:
    """The tensors, sorted by offset, must cover the data section exactly once and end where the file ends."""
    expected = max((tensor.offset + tensor.nbytes for tensor in tensors), default=data_begin)
    if expected > size:
        cut = next(tensor.name for tensor in tensors if tensor.offset + tensor.nbytes > size)
        raise CheckpointError(
            f"{path} is truncated: its header promises {expected} bytes, the file has {size}; "
            f"from {quote(cut)} on nothing is whole: download it again"
        )
    position, previous = data_begin, ""
    for tensor in tensors:
        if tensor.offset < position:
            raise CheckpointError(f"{path}: tensors {quote(previous)} and {quote(tensor.name)} overlap")
        if tensor.offset > position:
            raise CheckpointError(
                f"{path}: {tensor.offset - position} bytes before {quote(tensor.name)} belong to no tensor"
            )
        position, previous = tensor.offset + tensor.nbytes, tensor.name
    if position != size:
        raise CheckpointError(f"{path}: {size - position} bytes after the last tensor belong to no tensor")
