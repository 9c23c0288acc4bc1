"""A packed folder: every expert one aligned extent, and a manifest with a checksum of every one.

    flashmoe.json                     the manifest, written last: a folder without it is not complete
    model-00001-of-0000n.safetensors  experts as `….experts.7.packed`, U8; then dense tensors
    model.safetensors.index.json      where each tensor is, as in any other checkpoint
    config.json, tokenizer.json, …    as in the source

The manifest may come from anywhere and is checked as such. Knows nothing of models or of what the bytes of an
expert mean (kernels/cpu/packed_layout.h); writing is flashmoe/pack.py.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import xxhash

from storage.checkpoint import Checkpoint, open_checkpoint
from storage.expert_reader import ExpertReader, ReadPlan, Run
from storage.host import ReadFile, allocate_aligned
from storage.safetensors_header import load_json, quote
from storage.shard_file import PAGE_BYTES, open_shard, read_exactly
from storage.storage_errors import CheckpointError, ReadError, StorageError

MANIFEST_NAME: Final = "flashmoe.json"
JOURNAL_NAME: Final = ".flashmoe-pack.json"  # of a pack that is under way or was interrupted
FORMAT_VERSION: Final = 1
ALGORITHM: Final = "xxh3_64"
LAYOUTS: Final = {"int4": "tiles16", "int8": "tiles16", "bf16": "rows", "f16": "rows", "f32": "rows"}
DENSE_FORMATS: Final = ("bf16", "int8", "int4")
LARGEST_MANIFEST_BYTES: Final = 64 << 20  # 60 bytes a tensor: room for a million experts
LARGEST_NUMBER: Final = 2**40
CHUNK_BYTES: Final = 8 << 20  # read at once while checking
_CHECKSUM: Final = re.compile(r"[0-9a-f]{16}")
_EXPERT: Final = re.compile(r".*\blayers\.(\d+)\..*\bexperts\.(\d+)\.packed")

Progress = Callable[[str, int, int], None]  # (what, bytes done, bytes in all)


@dataclass(frozen=True, slots=True)
class PackSource:
    """The checkpoint that was packed."""

    name: str
    revision: str | None  # of a snapshot in the Hugging Face cache
    model_type: str
    fingerprint: str  # sha256 over the names, sizes and headers of its shards


@dataclass(frozen=True, slots=True)
class PackedExperts:
    """How all experts are stored."""

    format: str  # a key of LAYOUTS
    layout: str
    group: int  # columns that share a scale; 0 without scales
    hidden: int
    width: int
    extent_bytes: int  # of each expert, a multiple of 4096


@dataclass(frozen=True, slots=True)
class PackManifest:
    """flashmoe.json."""

    source: PackSource
    experts: PackedExperts
    dense_format: str  # one of DENSE_FORMATS; "bf16": each tensor as in the source
    tensors: Mapping[str, str]  # the checksum of every tensor of every shard
    headers: Mapping[str, str] = field(default_factory=dict)  # … of every shard's bytes before the data
    files: Mapping[str, str] = field(default_factory=dict)  # … of every other file
    layer_errors: Mapping[int, float] = field(default_factory=dict)  # relative rms error of a layer's experts
    dense_error: float | None = None
    calibration: Mapping[str, Any] | None = None  # what the errors were weighted by


# The manifest


def read_manifest(folder: Path) -> PackManifest | None:
    """The manifest of a packed folder; None if the folder is none.

    Raises CheckpointError for an interrupted pack and for a manifest that is damaged or of another version.
    """
    path = folder / MANIFEST_NAME
    if not path.exists():
        if (folder / JOURNAL_NAME).exists():
            raise CheckpointError(
                f"{folder} is an incomplete pack; run the same `flashmoe pack` command again"
            )
        return None
    return _parse(path, _read_json(path))


def write_manifest(folder: Path, manifest: PackManifest, write: Callable[[Path, bytes], None]) -> None:
    """Write the manifest through `write`, with a checksum of its own."""
    raw = _as_dict(manifest)
    raw["checksums"]["manifest"] = _own_checksum(raw)
    write(folder / MANIFEST_NAME, json.dumps(raw, indent=1, ensure_ascii=False).encode() + b"\n")


def checksum(data: bytes | bytearray | memoryview) -> str:
    """16 hex digits."""
    return xxhash.xxh3_64_hexdigest(data)


def describe_tensor(name: str) -> str:
    """`expert 3 of layer 2`, or the name of a tensor that is no expert."""
    match = _EXPERT.fullmatch(name)
    return f"expert {match[2]} of layer {match[1]}" if match else f"tensor {quote(name)}"


def _read_json(path: Path) -> dict[str, Any]:
    with open_shard(path) as file:
        size = file.size()
        if size > LARGEST_MANIFEST_BYTES:
            raise CheckpointError(f"{path}: {size} bytes are above the limit of {LARGEST_MANIFEST_BYTES}")
        text = bytearray(size)
        read_exactly(file, text, 0)
    raw = load_json(path, text)
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: not an object; pack the model again")
    return raw


def _as_dict(manifest: PackManifest) -> dict[str, Any]:
    m, e = manifest, manifest.experts
    return {
        "format_version": FORMAT_VERSION,
        "source": {
            "name": m.source.name,
            "revision": m.source.revision,
            "model_type": m.source.model_type,
            "fingerprint": m.source.fingerprint,
        },
        "experts": {
            "format": e.format,
            "layout": e.layout,
            "group": e.group,
            "hidden": e.hidden,
            "width": e.width,
            "extent_bytes": e.extent_bytes,
        },
        "dense": {"format": m.dense_format},
        "calibration": None if m.calibration is None else dict(m.calibration),
        "error": {
            "layers": [{"layer": layer, "relative_error": error} for layer, error in m.layer_errors.items()],
            "dense": m.dense_error,
        },
        "checksums": {
            "algorithm": ALGORITHM,
            "tensors": dict(m.tensors),
            "headers": dict(m.headers),
            "files": dict(m.files),
        },
    }


def _own_checksum(raw: Mapping[str, Any]) -> str:
    """Of all that the manifest says, but for this checksum."""
    checksums = {key: value for key, value in raw["checksums"].items() if key != "manifest"}
    text = json.dumps({**raw, "checksums": checksums}, sort_keys=True, separators=(",", ":"))
    return checksum(text.encode())


class _Fields:
    """Checked access to one object of the manifest."""

    def __init__(self, path: Path, raw: Any, where: str = "") -> None:
        self._path, self._where = path, where
        self._raw: dict[str, Any] = raw if isinstance(raw, dict) else self.fail("", raw, "an object")

    def fail(self, key: str, value: Any, needed: str) -> Any:
        name = ".".join(part for part in (self._where, key) if part)
        raise CheckpointError(
            f"{self._path}: {name} is {repr(value)[:60]}, not {needed}; pack the model again"
        )

    def object(self, key: str) -> "_Fields":
        return _Fields(self._path, self._raw.get(key), f"{self._where}.{key}" if self._where else key)

    def text(self, key: str, choices: Mapping[str, Any] | tuple[str, ...] | None = None) -> str:
        value = self._raw.get(key)
        if not isinstance(value, str) or len(value) > 4096:
            return str(self.fail(key, value, "text"))
        if choices is not None and value not in choices:
            return str(self.fail(key, value, f"one of {', '.join(choices)}"))
        return value

    def number(self, key: str, least: int = 0, most: int = LARGEST_NUMBER) -> int:
        value = self._raw.get(key)
        if type(value) is not int or not least <= value <= most:
            self.fail(key, value, f"a whole number from {least} to {most}")
        return int(value)  # type: ignore[arg-type]

    def share(self, key: str) -> float:
        value = self._raw.get(key)
        if type(value) not in (int, float) or not 0 <= value < 1e30:  # type: ignore[operator]
            self.fail(key, value, "a number that is not negative")
        return float(value)  # type: ignore[arg-type]

    def checksums(self, key: str) -> dict[str, str]:
        value = self._raw.get(key)
        if not isinstance(value, dict):
            self.fail(key, value, "an object")
        for name, digits in value.items():  # type: ignore[union-attr]
            if not isinstance(digits, str) or not _CHECKSUM.fullmatch(digits):
                self.fail(f"{key}[{quote(name)}]", digits, "16 hex digits")
        return dict(value)  # type: ignore[arg-type]

    def has(self, key: str) -> bool:
        return self._raw.get(key) is not None

    def list(self, key: str) -> "Iterator[_Fields]":
        value = self._raw.get(key)
        if not isinstance(value, list):
            self.fail(key, value, "a list")
        return (_Fields(self._path, entry, f"{self._where}.{key}") for entry in value)  # type: ignore[union-attr]


def _parse(path: Path, raw: dict[str, Any]) -> PackManifest:
    version = raw.get("format_version")
    if type(version) is not int or version < 1:
        raise CheckpointError(
            f"{path} has no format_version: it is no manifest of ours or damaged; pack the model again"
        )
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format_version {version}; this flashmoe reads {FORMAT_VERSION}: update flashmoe,"
            " or pack the model again"
        )
    root = _Fields(path, raw)
    source, experts, dense = root.object("source"), root.object("experts"), root.object("dense")
    errors, checksums = root.object("error"), root.object("checksums")
    checksums.text("algorithm", (ALGORITHM,))
    format = experts.text("format", LAYOUTS)
    extent_bytes = experts.number("extent_bytes", PAGE_BYTES)
    if extent_bytes % PAGE_BYTES:
        experts.fail("extent_bytes", extent_bytes, f"a multiple of {PAGE_BYTES}")
    return PackManifest(
        source=PackSource(
            source.text("name"),
            source.text("revision") if source.has("revision") else None,
            source.text("model_type"),
            source.text("fingerprint"),
        ),
        experts=PackedExperts(
            format,
            experts.text("layout", (LAYOUTS[format],)),
            experts.number("group"),
            experts.number("hidden", 1),
            experts.number("width", 1),
            extent_bytes,
        ),
        dense_format=dense.text("format", DENSE_FORMATS),
        tensors=checksums.checksums("tensors"),
        headers=checksums.checksums("headers") if checksums.has("headers") else {},
        files=checksums.checksums("files") if checksums.has("files") else {},
        layer_errors={
            entry.number("layer"): entry.share("relative_error") for entry in errors.list("layers")
        },
        dense_error=errors.share("dense") if errors.has("dense") else None,
        calibration=raw["calibration"] if isinstance(raw.get("calibration"), dict) else None,
    )


# Checking what lies on the drive


def verify(folder: Path, progress: Progress | None = None) -> PackManifest:
    """Read every byte of a packed folder and compare it with the manifest, which is returned.

    Raises CheckpointError that names the first thing that differs, and how many more do.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise CheckpointError(f"{folder} has no {MANIFEST_NAME}: it is not a packed model")
    damaged = list(_differences(folder, manifest, progress))
    if damaged:
        more = f" (and {len(damaged) - 1} more)" if len(damaged) > 1 else ""
        raise CheckpointError(f"{damaged[0]}{more}; pack the model again")
    return manifest


def _differences(folder: Path, manifest: PackManifest, progress: Progress | None) -> Iterator[str]:
    """What differs from the manifest, in words."""
    raw = _read_json(folder / MANIFEST_NAME)
    if raw["checksums"].get("manifest") != _own_checksum(raw):
        yield f"{folder / MANIFEST_NAME} was changed after packing"
    for name, expected in manifest.files.items():
        found = _checksum_of_small_file(folder / name) if _is_plain(name) else None
        if found != expected:
            yield f"{folder / name} was changed after packing"
    checkpoint = open_checkpoint(folder)
    missing = manifest.tensors.keys() ^ checkpoint.tensors.keys()
    if missing:
        yield f"{folder}: {describe_tensor(min(missing))} is not both in the manifest and in the shards"
    done, total = 0, sum(checkpoint.shard_bytes)
    for shard, path in enumerate(checkpoint.shards):
        names = [n for n, info in checkpoint.tensors.items() if info.shard == shard and n not in missing]
        for what, begin, nbytes in _parts_of_shard(checkpoint, shard, names):
            expected = manifest.tensors[what] if what else manifest.headers.get(path.name, "")
            found = checksum_of_range(path, begin, nbytes)
            if found != expected:
                yield damage(path, describe_tensor(what) if what else "the header", expected, found)
            done += nbytes
            if progress is not None:
                progress("verifying", done, total)


def _parts_of_shard(checkpoint: Checkpoint, shard: int, names: list[str]) -> Iterator[tuple[str, int, int]]:
    """(tensor name, offset, bytes) in the order of the file; the name of the header is empty."""
    infos = sorted((checkpoint.tensors[name] for name in names), key=lambda info: info.offset)
    header_bytes = min(
        (info.offset for info in checkpoint.tensors.values() if info.shard == shard),
        default=checkpoint.shard_bytes[shard],
    )
    yield "", 0, header_bytes
    for info in infos:
        yield info.name, info.offset, info.nbytes


def checksum_of_range(path: Path, offset: int, nbytes: int) -> str:
    """The checksum of what the drive holds there: past the page cache, where the file system allows that."""
    try:
        with open_shard(path, direct=True) as file:
            return _checksum_of_pages(file, offset, nbytes)
    except (StorageError, OSError):  # no direct reads here, or a drive error that the next read will name
        with open_shard(path) as file:
            file.drop_cache(offset, nbytes)
            return _checksum_of_pages(file, offset, nbytes)


def damage(path: Path, what: str, expected: str, found: str) -> str:
    """One wording for a checksum that is not the manifest's."""
    return f"{path}: {what} is damaged: checksum {found}, the manifest has {expected or 'none'}"


def _checksum_of_pages(file: ReadFile, offset: int, nbytes: int) -> str:
    """In chunks of whole pages, as direct reads must ask for."""
    digest = xxhash.xxh3_64()
    buffer = memoryview(
        allocate_aligned(min(CHUNK_BYTES, nbytes + 2 * PAGE_BYTES) // PAGE_BYTES * PAGE_BYTES)
    )
    end, at = offset + nbytes, offset // PAGE_BYTES * PAGE_BYTES
    while at < end:
        wanted = min(end - at, buffer.nbytes)
        read_exactly(file, buffer[: -(-wanted // PAGE_BYTES) * PAGE_BYTES], at, wanted)
        digest.update(buffer[max(0, offset - at) : wanted])
        at += wanted
    return digest.hexdigest()


def _checksum_of_small_file(path: Path) -> str | None:
    """None if it cannot be read."""
    try:
        return checksum(path.read_bytes())
    except OSError:
        return None


def _is_plain(name: str) -> bool:
    return name == Path(name).name and name not in ("", ".", "..")


class CheckedReader:
    """Any reader, with every packed expert's checksum compared when its views are handed out."""

    def __init__(self, reader: ExpertReader, checkpoint: Checkpoint, manifest: PackManifest) -> None:
        """`checkpoint` is the packed folder's. The reader is closed with this one."""
        self.name, self.in_place = reader.name, reader.in_place
        self._reader = reader
        self._paths = checkpoint.shards
        self._names = {(info.shard, info.offset): name for name, info in checkpoint.tensors.items()}
        self._checksums = manifest.tensors

    def read_run(self, run: Run, slot: memoryview | None, begin: int = 0, nbytes: int | None = None) -> int:
        return self._reader.read_run(run, slot, begin, nbytes)

    def views(self, plan: ReadPlan, slot: memoryview | None) -> tuple[memoryview, ...]:
        """Raises ReadError, naming file and expert, if the bytes are not those that were packed."""
        for run in plan.runs:  # one: an expert is one extent of whole pages
            name = self._names.get((run.shard, run.offset), "")
            whole = ReadPlan(
                (run,), ((run.slot_offset, run.nbytes),), plan.slot_bytes, run.nbytes, run.nbytes
            )
            expected, found = self._checksums.get(name, ""), checksum(self._reader.views(whole, slot)[0])
            if found != expected:
                raise ReadError(
                    f"{damage(self._paths[run.shard], describe_tensor(name), expected, found)};"
                    " `flashmoe pack --verify` finds all that is"
                )
        return self._reader.views(plan, slot)

    def release(self, plan: ReadPlan) -> None:
        self._reader.release(plan)

    def close(self) -> None:
        self._reader.close()
