"""`flashmoe pack`: rewrite a checkpoint so that every expert is one aligned extent, quantised if asked for.

One thread reads ahead, one quantises (on all threads of its context), this one writes, reads back and keeps
the journal. What is in flight is bounded by bytes, so the memory needed does not grow with the model. The
source is only ever read. The folder's layout: storage/expert_file.py; what goes where: flashmoe/pack_plan.py.
"""

import hashlib
import math
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import xxhash

from flashmoe.calibration import CalibrationText, Hessians, calibrate
from flashmoe.errors import ConfigError, ModelError
from flashmoe.loader import OpenedModel, open_model
from flashmoe.model_source import Progress
from flashmoe.pack_experts import ExpertPacker, GptqExperts, RoundedExperts
from flashmoe.pack_plan import PackedTensor, PackPlan, Piece, plan_pack
from flashmoe.sizes import format_bytes
from flashmoe.weights import DTYPES
from kernels import native
from kernels.native import GROUP, Context, Format
from storage import host
from storage.checkpoint import INDEX_NAME, Checkpoint
from storage.expert_file import (
    LAYOUTS,
    MANIFEST_NAME,
    PackedExperts,
    PackManifest,
    PackSource,
    checksum,
    checksum_of_range,
    describe_tensor,
    read_manifest,
    write_manifest,
)
from storage.expert_reader import Extent, SlotReader, open_reader, plan_read
from storage.pack_journal import FinishedShard, PackJournal, Sums, open_journal
from storage.safetensors_header import read_header
from storage.safetensors_writer import header_bytes, write_index, write_safetensors, write_whole
from storage.shard_file import open_shard, read_exactly
from storage.storage_errors import StorageError

FORMATS = {"int4": Format.INT4, "int8": Format.INT8, "bf16": Format.BF16}
IN_FLIGHT_BYTES = 160 << 20  # before and after quantising, each
SMALL_FILES = (".json", ".jinja", ".txt", ".model", ".md", ".tiktoken")
NAMES_OF_TERMS = ("LICENSE", "NOTICE", "USE_POLICY")
SMALL_FILE_BYTES = 64 << 20
SPARE_BYTES = 16 << 20  # of the drive: journal, index, manifest
Result = TypeVar("Result")
Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class PackOptions:
    """`experts` and `dense`: a key of FORMATS; bf16 keeps the source's own dtype."""

    experts: str = "int4"
    dense: str = "bf16"
    threads: int = 1
    calibration: CalibrationText | None = None  # of the experts: GPTQ for int4, weighted errors for int8

    @property
    def method(self) -> str:
        """How the experts' codes are chosen."""
        if self.calibration is None:
            return "rounding"
        return "gptq" if FORMATS[self.experts] is Format.INT4 else "weighted rounding"


@dataclass(frozen=True, slots=True)
class PackReport:
    """What was packed into what."""

    manifest: PackManifest
    source_bytes: int
    packed_bytes: int
    source_expert_bytes: int  # of one expert
    experts: int
    resumed_shards: int
    shards: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        m = self.manifest
        return {
            "source": m.source.name,
            "format": m.experts.format,
            "dense": m.dense_format,
            "source_bytes": self.source_bytes,
            "packed_bytes": self.packed_bytes,
            "source_expert_bytes": self.source_expert_bytes,
            "extent_bytes": m.experts.extent_bytes,
            "experts": self.experts,
            "layer_errors": [{"layer": n, "relative_error": e} for n, e in m.layer_errors.items()],
            "dense_error": m.dense_error,
            "shards": self.shards,
            "resumed_shards": self.resumed_shards,
            "seconds": self.seconds,
        }


def pack(folder: Path, output: Path, options: PackOptions, progress: Progress | None = None) -> PackReport:
    """Pack the model in `folder` into `output`, or go on where the same command was stopped.

    Raises ConfigError, ModelError or StorageError; what is finished then stays, as after Ctrl-C.
    """
    begin_s = time.perf_counter()
    if read_manifest(folder) is not None:
        raise ConfigError(f"{folder} is packed already; pack from the checkpoint it was made of")
    model = open_model(folder)
    _check_places(folder, output)
    checkpoint = model.layout.checkpoint
    plan = plan_pack(model.layout, FORMATS[options.experts], FORMATS[options.dense])
    source = _describe_source(model)
    if options.calibration is not None and not plan.expert_format.is_packed:
        raise ConfigError("--calibration weighs the errors of int4 and int8; --format bf16 has none")
    small_files = list(_small_files(folder))
    job = {
        "source": source.fingerprint,
        "times": _digest(str(path.stat().st_mtime_ns) for path in checkpoint.shards),
        "--format": options.experts,
        "--dense": options.dense,
        "--calibration": options.calibration.describe() if options.calibration else "none",
        "method": options.method,
        # torch's matrix products differ in the last bits from one number of threads to another
        "--threads": str(options.threads) if options.method == "gptq" else "any",
        "layout": plan.digest(),
    }
    journal = open_journal(output, job)
    _require_room(output, plan, journal, sum(path.stat().st_size for path in small_files))
    with journal:
        journal.start()
        resumed = len(journal.shards)
        files = {path.name: _copy(path, output / path.name) for path in small_files}
        _write_shards(model, plan, journal, options, progress)
        write_index(output, {name: [t.spec for t in tensors] for name, tensors in plan.shards.items()})
        files[INDEX_NAME] = checksum((output / INDEX_NAME).read_bytes())
        manifest = _manifest(model, plan, source, options, journal, files)
        write_manifest(output, manifest, write_whole)
        journal.remove()
    return PackReport(
        manifest=manifest,
        source_bytes=model.model_bytes,
        packed_bytes=sum(shard.nbytes for shard in journal.shards.values()),
        source_expert_bytes=max(p.expert_bytes for p in model.read_plans.values()),
        experts=len(model.read_plans),
        resumed_shards=resumed,
        shards=len(plan.shards),
        seconds=time.perf_counter() - begin_s,
    )


# Shards


def _write_shards(
    model: OpenedModel, plan: PackPlan, journal: PackJournal, options: PackOptions, progress: Progress | None
) -> None:
    """Write what the journal does not have yet."""
    checkpoint = model.layout.checkpoint
    todo = {name: tensors for name, tensors in plan.shards.items() if name not in journal.shards}
    counter = _Counter(progress, sum(t.spec.nbytes for t in plan.tensors()))
    counter.add(sum(t.spec.nbytes for name in journal.shards for t in plan.shards[name]))
    pieces = (piece for tensors in todo.values() for tensor in tensors for piece in tensor.pieces)
    with ExitStack() as stack:
        source = stack.enter_context(_Source(checkpoint))
        context = native.make_context(options.threads)
        experts = _expert_packer(stack, model, context, options, progress)
        reading = stack.enter_context(_OneThread(1, "pack-read"))
        packing = stack.enter_context(_OneThread(1, "pack-quantise"))
        packer = _Packer(context, checkpoint, experts)
        raw = _ahead(reading, source.read, pieces, lambda piece: piece.source_bytes)
        packed = _ahead(packing, packer.pack, raw, lambda raw: raw.piece.source_bytes + raw.piece.nbytes)
        for name, tensors in todo.items():
            journal.record(name, _write_shard(journal.folder / name, tensors, packed, counter))


def _expert_packer(
    stack: ExitStack, model: OpenedModel, context: Context, options: PackOptions, progress: Progress | None
) -> ExpertPacker:
    text, format = options.calibration, FORMATS[options.experts]
    if text is not None and format is Format.INT4:
        return GptqExperts(context, stack.enter_context(Hessians(model, text, options.threads)))
    calibration = None if text is None else calibrate(model, text, options.threads, progress)
    return RoundedExperts(context, format, calibration)


def _write_shard(
    path: Path, tensors: Sequence[PackedTensor], packed: "Iterator[_Packed]", counter: "_Counter"
) -> FinishedShard:
    """Write one shard, read it back from the drive, and say what it is."""
    checksums: dict[str, str] = {}
    layer_sums: dict[int, Sums] = {}
    dense_sums = (0.0, 0.0)

    def data(tensor: PackedTensor) -> Iterator[memoryview]:
        nonlocal dense_sums
        digest = xxhash.xxh3_64()
        for _ in tensor.pieces:
            done = next(packed)
            digest.update(done.data)
            if tensor.layer is not None:
                layer_sums[tensor.layer] = _plus(layer_sums.get(tensor.layer, (0.0, 0.0)), done.sums)
            else:
                dense_sums = _plus(dense_sums, done.sums)
            counter.add(done.data.nbytes)
            yield done.data
        checksums[tensor.spec.name] = digest.hexdigest()

    specs = [tensor.spec for tensor in tensors]
    write_safetensors(path, specs, map(data, tensors))
    header = checksum(header_bytes(specs))
    _check_written(path, header, checksums)
    return FinishedShard(path.stat().st_size, header, checksums, layer_sums, dense_sums)


def _check_written(path: Path, header: str, checksums: dict[str, str]) -> None:
    """Read all of a shard from the drive; a drive that lies is found now and not months later."""
    size, infos = read_header(path)
    if checksum_of_range(path, 0, infos[0].offset if infos else size) != header:
        raise StorageError(f"{path}: the drive did not keep the header that was written; check the drive")
    for info in infos:
        if checksum_of_range(path, info.offset, info.nbytes) != checksums[info.name]:
            raise StorageError(
                f"{path}: the drive did not keep what was written for {describe_tensor(info.name)};"
                " check the drive"
            )
    with open_shard(path) as file:
        file.drop_cache(0, size)


def _plus(a: Sums, b: Sums) -> Sums:
    return a[0] + b[0], a[1] + b[1]


class _Counter:
    """Adds up for the progress bar."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def add(self, nbytes: int) -> None:
        self._done += nbytes
        if self._progress is not None:
            self._progress("packing", self._done, self._total)


# Reading and quantising


class _Raw(NamedTuple):
    """A piece and its source bytes, an extent each."""

    piece: Piece
    views: tuple[memoryview, ...]


class _Packed(NamedTuple):
    data: memoryview
    sums: Sums


class _Source:
    """Reads the source's extents: past the page cache where its file system allows that."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._readers = [
            reader for name in ("direct", "buffered") if (reader := self._open(name)) is not None
        ]

    def _open(self, name: str) -> SlotReader | None:
        try:
            return open_reader(name, self._checkpoint.shards, self._checkpoint.shard_bytes)  # type: ignore[return-value]
        except StorageError:
            if name == "buffered":
                raise
            return None  # not on this file system

    def read(self, piece: Piece) -> _Raw:
        plan = plan_read(piece.extents, self._checkpoint.shard_bytes) if piece.extents else None
        if plan is None or not piece.source_bytes:
            return _Raw(piece, ())
        slot = memoryview(host.allocate_aligned(plan.slot_bytes))
        while True:
            try:
                for run in plan.runs:
                    self._readers[0].read_run(run, slot)
                return _Raw(piece, self._readers[0].views(plan, slot))
            except StorageError:
                if len(self._readers) == 1:
                    raise
                self._readers.pop(0).close()  # opened for direct reads, and refuses them

    def __enter__(self) -> "_Source":
        return self

    def __exit__(self, *_: object) -> None:
        for reader in self._readers:
            reader.close()


class _Packer:
    """Turns source bytes into what is written."""

    def __init__(self, context: Context, checkpoint: Checkpoint, experts: ExpertPacker) -> None:
        self._context, self._checkpoint, self._experts = context, checkpoint, experts

    def pack(self, raw: _Raw) -> _Packed:
        """Raises ModelError for weights that are not numbers."""
        piece = raw.piece
        if piece.target is None:
            return _Packed(self._copied(raw), (0.0, 0.0))
        out = torch.zeros(piece.nbytes, dtype=torch.uint8)
        tensors = [torch.frombuffer(view, dtype=DTYPES[piece.source]) for view in raw.views]
        if piece.expert is None:
            weight = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
            matrix = weight.view(piece.rows, piece.columns)
            sums = native.pack_matrix(self._context, matrix, piece.target, out)
        else:
            gate, up, down = tensors
            width, hidden = piece.rows, piece.columns
            size = native.expert_bytes(piece.target, hidden, width)
            sums = self._experts.pack(
                piece.expert, gate.view(width, hidden), up.view(width, hidden), down.view(hidden, width),
                out[:size],
            )  # fmt: skip
        if not math.isfinite(sums[0]) or not math.isfinite(sums[1]):
            self._refuse(raw)
        return _Packed(memoryview(out.numpy()), sums)  # type: ignore[arg-type]

    def _copied(self, raw: _Raw) -> memoryview:
        """The bytes one behind the other, then zeros."""
        if raw.piece.source in DTYPES:
            for view in raw.views:
                least, most = torch.aminmax(torch.frombuffer(view, dtype=DTYPES[raw.piece.source]))
                if not math.isfinite(float(least)) or not math.isfinite(float(most)):
                    self._refuse(raw)
        if len(raw.views) == 1 and raw.views[0].nbytes == raw.piece.nbytes:
            return raw.views[0]
        out = bytearray(raw.piece.nbytes)
        begin = 0
        for view in raw.views:
            out[begin : begin + view.nbytes] = view
            begin += view.nbytes
        return memoryview(out)

    def _refuse(self, raw: _Raw) -> None:
        """Find which of the piece's tensors is not all finite numbers that can be squared."""
        for extent, view in zip(raw.piece.extents, raw.views, strict=True):
            values = torch.frombuffer(view, dtype=DTYPES[raw.piece.source]).float()
            if not torch.isfinite(values.square()).all():
                kind = "a number too large to quantise" if torch.isfinite(values).all() else "NaN or infinity"
                raise ModelError(
                    f"{self._checkpoint.shards[extent.shard]}: tensor {self._name_at(extent)} holds {kind};"
                    " is the download complete?"
                )
        raise ModelError(f"{self._checkpoint.folder}: weights too large to quantise in {raw.piece.extents}")

    def _name_at(self, extent: Extent) -> str:
        return next(
            name
            for name, info in self._checkpoint.tensors.items()
            if info.shard == extent.shard and info.offset <= extent.offset < info.offset + info.nbytes
        )


class _OneThread(ThreadPoolExecutor):
    """A pool of one whose waiting work is given up at the end, as after Ctrl-C."""

    def __exit__(self, *_: object) -> None:
        self.shutdown(wait=True, cancel_futures=True)


def _ahead(
    pool: ThreadPoolExecutor,
    function: Callable[[Item], Result],
    items: Iterable[Item],
    nbytes: Callable[[Item], int],
) -> Iterator[Result]:
    """Results in order, worked out in the background as long as less than IN_FLIGHT_BYTES wait."""
    waiting: deque[tuple[int, Future[Result]]] = deque()
    held = 0
    for item in items:
        size = nbytes(item)
        waiting.append((size, pool.submit(function, item)))
        del item  # its memory is the worker's now
        held += size
        while held > IN_FLIGHT_BYTES and waiting:
            size, future = waiting.popleft()
            held -= size
            result = future.result()
            del future
            yield result
            del result
    while waiting:
        yield waiting.popleft()[1].result()


# Before and after


def _check_places(folder: Path, output: Path) -> None:
    source, target = folder.resolve(), output.expanduser().resolve()
    if target == source or source in target.parents:
        raise ConfigError(
            f"--output {output} lies in the source {folder}, which stays as it is; choose another"
        )


def _require_room(output: Path, plan: PackPlan, journal: PackJournal, small_bytes: int) -> None:
    """Before the first byte is written."""
    todo = [tensors for name, tensors in plan.shards.items() if name not in journal.shards]
    headers = sum(len(header_bytes([t.spec for t in tensors])) for tensors in todo)
    needed = sum(t.spec.nbytes for tensors in todo for t in tensors) + headers + small_bytes + SPARE_BYTES
    existing = next(place for place in (output, *output.absolute().parents) if place.is_dir())
    try:
        free = shutil.disk_usage(existing).free
    except OSError as error:
        raise StorageError(f"{existing} cannot be looked at: {error.strerror}") from error
    if free < needed:
        raise StorageError(
            f"{output} needs {format_bytes(needed)} more, its drive has {format_bytes(free)} free;"
            " free some, or choose another --output"
        )


def _describe_source(model: OpenedModel) -> PackSource:
    name, revision = _name_and_revision(model.folder)
    return PackSource(name, revision, model.config.model_type, _fingerprint(model.layout.checkpoint))


def _name_and_revision(folder: Path) -> tuple[str, str | None]:
    """Of a Hugging Face cache path, models--owner--name/snapshots/revision; else the folder's name."""
    path = folder.expanduser().resolve()
    cache = path.parent.parent.name
    if path.parent.name == "snapshots" and cache.startswith("models--"):
        return cache.removeprefix("models--").replace("--", "/"), path.name
    return path.name, None


def _fingerprint(checkpoint: Checkpoint) -> str:
    """sha256 over the shards' names, sizes and headers."""
    digest = hashlib.sha256()
    for shard, path in enumerate(checkpoint.shards):
        begins = [info.offset for info in checkpoint.tensors.values() if info.shard == shard]
        header = bytearray(min(begins, default=checkpoint.shard_bytes[shard]))
        with open_shard(path) as file:
            read_exactly(file, header, 0)
        digest.update(f"{path.name} {checkpoint.shard_bytes[shard]}\n".encode() + header)
    return digest.hexdigest()


def _digest(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _small_files(folder: Path) -> Iterator[Path]:
    """Config, tokenizer and terms: what travels with the weights."""
    for path in sorted(folder.iterdir()):
        wanted = path.suffix in SMALL_FILES or path.name.startswith(NAMES_OF_TERMS)
        hidden = path.name.startswith(".") or path.name in (INDEX_NAME, MANIFEST_NAME)
        if wanted and not hidden and path.is_file() and path.stat().st_size <= SMALL_FILE_BYTES:
            yield path


def _copy(source: Path, target: Path) -> str:
    """Copy a small file and return its checksum."""
    try:
        content = source.read_bytes()
    except OSError as error:
        raise StorageError(f"{source} cannot be read: {error.strerror}") from error
    write_whole(target, content)
    return checksum(content)


def _manifest(
    model: OpenedModel,
    plan: PackPlan,
    source: PackSource,
    options: PackOptions,
    journal: PackJournal,
    files: dict[str, str],
) -> PackManifest:
    c, format = model.config, plan.expert_format.name.lower()
    layer_sums: dict[int, Sums] = {}
    dense_sums: Sums = (0.0, 0.0)
    for shard in journal.shards.values():
        for layer, sums in shard.layer_sums.items():
            layer_sums[layer] = _plus(layer_sums.get(layer, (0.0, 0.0)), sums)
        dense_sums = _plus(dense_sums, shard.dense_sums)
    quantised = plan.expert_format.is_packed
    return PackManifest(
        source=source,
        experts=PackedExperts(
            format,
            LAYOUTS[format],
            GROUP if quantised else 0,
            c.hidden_size,
            c.moe_intermediate_size,
            plan.extent_bytes,
        ),
        dense_format=options.dense,
        tensors={name: digits for shard in journal.shards.values() for name, digits in shard.tensors.items()},
        headers={name: shard.header for name, shard in journal.shards.items()},
        files=files,
        layer_errors={n: _relative(layer_sums[n]) for n in sorted(layer_sums)} if quantised else {},
        dense_error=_relative(dense_sums) if FORMATS[options.dense].is_packed else None,
        calibration=None
        if options.calibration is None
        else {
            "method": options.method,
            "text": options.calibration.path.name,
            "sha256": options.calibration.digest(),
            "tokens": options.calibration.tokens,
        },
    )


def _relative(sums: Sums) -> float:
    """Relative rms error."""
    return math.sqrt(sums[0] / sums[1]) if sums[1] > 0 else 0.0
