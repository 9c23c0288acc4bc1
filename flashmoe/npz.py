"""Read and write .npz files (a zip of numpy arrays), checked as if an enemy had written them.

Numpy's own loader unpickles objects when asked to, and allocates what a header declares. Here every size is
checked before anything of that size is allocated, only plain numbers and short texts are read, and nothing is
ever unpickled. Knows nothing of traces.

Formats: numpy/lib/_format_impl.py (NEP 1), versions 1.0 to 3.0; APPNOTE.TXT (zip), stored or deflated.
"""

import math
import re
import struct
import zipfile
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from flashmoe.errors import TraceError
from storage.safetensors_header import quote
from storage.safetensors_writer import new_file

Bytes = bytes | memoryview
Array = NDArray[Any]

DEFAULT_LIMIT_BYTES = 8 << 30  # of all arrays that are read from one file
MAX_MEMBERS = 64
MAX_DIRECTORY_BYTES = 64 << 10  # of the zip's table of contents, which the zipfile module reads whole
MAX_HEADER_BYTES = 10_000  # numpy's own limit
MAX_DIMENSIONS = 8
# Deflate cannot do better than 1032 to 1 (zlib's technical notes): whoever declares more lies.
MAX_RATIO, RATIO_SLACK_BYTES = 1032, 1 << 16
PIECE_BYTES = 1 << 20
COMPRESSION = 4  # of zlib's 9: a trace's scores hardly get smaller with more

# Plain little-endian numbers, as every machine that we run on has them, and texts of up to 9999 letters.
_DTYPE = re.compile(r"[<|=](?:b1|[iu]1)|[<=](?:[iu][248]|f[248]|U[1-9]\d{0,3})")
_ENTRY = re.compile(
    r"\s*+'(?P<key>\w{1,20}+)'\s*+:\s*+"
    r"(?:'(?P<text>[^'\\]*+)'|(?P<flag>True|False)|\((?P<shape>[\d,\s]*+)\))\s*+(?P<more>,?+)"
)
_EOCD, _ZIP64_LOCATOR = b"PK\x05\x06", b"PK\x06\x07"


@dataclass(frozen=True, slots=True)
class StreamedArray:
    """An array to write that is not in memory: its bytes come in pieces, in C order."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    pieces: Iterable[Bytes]


def read_npz(
    path: Path, names: Collection[str] | None = None, limit_bytes: int = DEFAULT_LIMIT_BYTES
) -> dict[str, Array]:
    """The arrays of a file by name; of `names` those that are there, None: all.

    Raises TraceError, one line, for whatever is wrong with the file: not a zip, truncated, encrypted, members
    twice or in folders, pickled objects, big-endian or Fortran-ordered arrays, sizes that disagree, more than
    `limit_bytes` in all.
    """
    with _one_line(path), path.open("rb") as file:
        _check_directory(path, file)
        with zipfile.ZipFile(file) as archive:
            members = _checked_members(path, archive)
            wanted = {name: info for name, info in members.items() if names is None or name in names}
            total = sum(info.file_size for info in wanted.values())
            if total > limit_bytes:
                raise TraceError(f"{path} unpacks to {total} bytes; the limit is {limit_bytes}")
            return {name: _read_member(path, archive, name, info) for name, info in wanted.items()}


def write_npz(path: Path, arrays: Mapping[str, Array | StreamedArray]) -> None:
    """Write compressed; `path` gets its name when the file is whole, an existing one is replaced.

    Raises StorageError when the file cannot be written.
    """
    total = sum(array.dtype.itemsize * math.prod(array.shape) for array in arrays.values())
    with (
        new_file(path, total) as file,
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=COMPRESSION) as archive,
    ):
        for name, array in arrays.items():
            # A date of its own: the same arrays give the same file.
            info = zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0))
            info.compress_type = zipfile.ZIP_DEFLATED
            with archive.open(info, "w", force_zip64=True) as member:
                member.write(_header(array))
                for piece in _pieces(array):
                    member.write(piece)


@contextmanager
def _one_line(path: Path) -> Iterator[None]:
    """Turn what zipfile and zlib raise over a bad file into a TraceError."""
    try:
        yield
    except zipfile.BadZipFile as error:
        raise TraceError(f"{path} is no whole .npz file: {error}; get it again") from error
    except OSError as error:
        raise TraceError(f"{path} cannot be read: {error.strerror or error}") from error
    except MemoryError as error:
        raise TraceError(f"{path} unpacks to more than the memory at hand") from error
    except (
        zlib.error, struct.error, EOFError, NotImplementedError, RuntimeError, ValueError, LookupError,
        OverflowError, AttributeError, TypeError, AssertionError,
    ) as error:  # fmt: skip  # the zipfile module checks little before it uses what a directory says
        raise TraceError(f"{path} is damaged: {type(error).__name__}: {str(error)[:200]}") from error


def _check_directory(path: Path, file: BinaryIO) -> None:
    """A table of contents of a few members, so that opening the zip costs no memory."""
    size = file.seek(0, 2)
    file.seek(max(0, size - 22 - 65535 - 20))
    tail = file.read()
    at = tail.rfind(_EOCD)
    if at < 0 or len(tail) - at < 22:
        raise TraceError(f"{path} is no .npz file, or truncated: it does not end as a zip does")
    directory_bytes = int.from_bytes(tail[at + 12 : at + 16], "little")
    if directory_bytes > MAX_DIRECTORY_BYTES or _ZIP64_LOCATOR in tail[max(0, at - 20) : at]:
        raise TraceError(f"{path} has a table of contents for more than {MAX_MEMBERS} arrays; no trace has")
    file.seek(0)


def _checked_members(path: Path, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    members: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        where = f"{path}: member {quote(info.filename)}"
        name = info.filename.removesuffix(".npy")
        if "/" in info.filename or "\\" in info.filename or name == info.filename or not name:
            raise TraceError(f"{where} is no array; an .npz holds NAME.npy and nothing else")
        if name in members:
            raise TraceError(f"{where} is there twice")
        if info.flag_bits & 0x1:
            raise TraceError(f"{where} is encrypted; save it without a password")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise TraceError(f"{where} is compressed by method {info.compress_type}; numpy writes 0 or 8")
        if info.file_size > info.compress_size * MAX_RATIO + RATIO_SLACK_BYTES:
            raise TraceError(
                f"{where} claims that {info.compress_size} bytes unpack to {info.file_size}: impossible"
            )
        members[name] = info
    if not 0 < len(members) <= MAX_MEMBERS:
        raise TraceError(f"{path} holds {len(members)} arrays; 1 to {MAX_MEMBERS} can be read")
    return members


def _read_member(path: Path, archive: zipfile.ZipFile, name: str, info: zipfile.ZipInfo) -> Array:
    where = f"{path}: array {quote(name)}"
    with archive.open(info) as member:
        dtype, shape, header_bytes = _read_header(where, member)
        nbytes, there = math.prod(shape) * dtype.itemsize, info.file_size - header_bytes
        if nbytes != there:
            raise TraceError(f"{where}: {dtype.str} {list(shape)} needs {nbytes} bytes, it holds {there}")
        array = np.empty(shape, dtype)
        view = array.reshape(-1).view(np.uint8).data
        at = 0
        while at < nbytes:
            piece = member.read(min(PIECE_BYTES, nbytes - at))  # the last one compares the checksum
            if not piece:
                raise TraceError(f"{where} is truncated: {at} of {nbytes} bytes are there; get it again")
            view[at : at + len(piece)] = piece
            at += len(piece)
    _check_values(where, array)
    return array


def _read_header(where: str, member: IO[bytes]) -> tuple[np.dtype[Any], tuple[int, ...], int]:
    """(dtype, shape, bytes of the header with all before it)."""
    start = member.read(8)
    if len(start) < 8 or start[:6] != b"\x93NUMPY":
        raise TraceError(f"{where} is no numpy array: it does not begin as one")
    if start[6] not in (1, 2, 3) or start[7] != 0:
        raise TraceError(f"{where} has format version {start[6]}.{start[7]}; 1.0 to 3.0 can be read")
    length_bytes = 2 if start[6] == 1 else 4
    length = int.from_bytes(member.read(length_bytes), "little")
    if length > MAX_HEADER_BYTES:
        raise TraceError(f"{where} has a header of {length} bytes; the limit is {MAX_HEADER_BYTES}")
    text = member.read(length)
    if len(text) < length:
        raise TraceError(f"{where} is truncated within its header; get it again")
    values = _parse_header(text.decode("utf-8" if start[6] == 3 else "latin-1", "replace"))
    if values is None:
        raise TraceError(f"{where} has a header that numpy did not write: {quote(text.decode('latin-1'))}")
    descr, fortran, shape_text = values
    if not _DTYPE.fullmatch(descr):
        raise TraceError(
            f"{where} has dtype {quote(descr)}; only little-endian integers, floats, booleans and texts up"
            " to 9999 letters are read, and never pickled objects"
        )
    parts = [part.strip() for part in shape_text.split(",")]
    dimensions = parts[:-1] if parts[-1] == "" else parts
    if len(dimensions) > MAX_DIMENSIONS or not all(re.fullmatch(r"\d{1,18}", d) for d in dimensions):
        raise TraceError(f"{where} has the shape {quote('(' + shape_text + ')')}, which is none")
    shape = tuple(map(int, dimensions))
    if fortran and len(shape) > 1:
        raise TraceError(f"{where} is in Fortran order; save numpy.ascontiguousarray of it")
    return np.dtype(descr), shape, 8 + length_bytes + length


def _parse_header(text: str) -> tuple[str, bool, str] | None:
    """(descr, fortran_order, what is between the brackets of shape) of the dict that a header is."""
    text = text.strip()
    if not (text.startswith("{") and text.endswith("}")):
        return None
    entries: dict[str, str] = {}
    at, more = 1, True
    while (match := _ENTRY.match(text, at)) is not None:
        kind = {"descr": "text", "fortran_order": "flag", "shape": "shape"}.get(match["key"])
        if kind is None or match[kind] is None or match["key"] in entries or not more:
            return None
        entries[match["key"]] = match[kind]
        at, more = match.end(), bool(match["more"])
    if len(entries) < 3 or text[at:].strip() != "}":
        return None
    return entries["descr"], entries["fortran_order"] == "True", entries["shape"]


def _check_values(where: str, array: Array) -> None:
    """Bytes that are no values of their dtype: numpy fails on them at some later time."""
    if array.dtype.kind == "U":
        if (array.reshape(-1).view(np.uint32) > 0x10FFFF).any():
            raise TraceError(f"{where} holds bytes that are no text")
    elif array.dtype.kind == "b" and (array.view(np.uint8) > 1).any():
        raise TraceError(f"{where} holds bytes that are neither true nor false")


def _header(array: Array | StreamedArray) -> bytes:
    """Version 1.0, padded so that the values begin at a multiple of 64 bytes."""
    shape = tuple(array.shape)
    text = f"{{'descr': '{array.dtype.str}', 'fortran_order': False, 'shape': {shape}, }}"
    padding = -(10 + len(text) + 1) % 64
    content = text.encode("latin-1") + b" " * padding + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(content)) + content


def _pieces(array: Array | StreamedArray) -> Iterator[Bytes]:
    if isinstance(array, StreamedArray):
        yield from array.pieces
        return
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    yield from (flat[at : at + PIECE_BYTES] for at in range(0, len(flat), PIECE_BYTES))
