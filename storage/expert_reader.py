"""Read one expert: from the places of its tensors to the bytes in memory, in one of three ways.

`plan_read` turns an expert's extents into as few reads as possible, each on page boundaries, so that one plan
serves every back-end. `direct` passes the page cache by, `buffered` reads through it and drops what it read,
`mmap` lends views of the mapped shards themselves. All three deliver identical bytes; they differ in speed
and in who holds the memory. Knows nothing of models: an expert is a list of extents. Does not cover threads
(read_queue) or which way is best (drive_probe).
"""

import errno
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from storage import host
from storage.shard_file import PAGE_BYTES, open_shard, read_exactly
from storage.storage_errors import ReadError, StorageError

SCRATCH_BYTES = 1 << 20


class Extent(NamedTuple):
    """Where one tensor's bytes lie."""

    shard: int
    offset: int
    nbytes: int


class Run(NamedTuple):
    """One read. Both offsets are multiples of 4096, and so is the length, except at a file's end."""

    shard: int
    offset: int
    nbytes: int
    slot_offset: int


@dataclass(frozen=True, slots=True)
class ReadPlan:
    """How to read one expert into one slot."""

    runs: tuple[Run, ...]
    parts: tuple[tuple[int, int], ...]  # (slot offset, nbytes) of each extent, in the order given
    slot_bytes: int  # room that the runs need, a multiple of 4096
    read_bytes: int  # what the drive delivers
    expert_bytes: int  # what the extents hold


def plan_read(extents: Sequence[Extent], shard_bytes: Sequence[int]) -> ReadPlan:
    """Join the extents of one expert, in whatever order given, into runs of whole pages.

    Extents whose pages touch or coincide become one run. Raises StorageError for an extent that is empty
    or outside its shard.
    """
    for extent in extents:
        _check_extent(extent, shard_bytes)
    runs: list[Run] = []
    slot_bytes = 0
    for shard, begin, end in _join_pages(extents):
        runs.append(Run(shard, begin, min(end, shard_bytes[shard]) - begin, slot_bytes))
        slot_bytes += end - begin
    parts = tuple((_slot_offset(runs, extent), extent.nbytes) for extent in extents)
    read_bytes = sum(run.nbytes for run in runs)
    return ReadPlan(tuple(runs), parts, slot_bytes, read_bytes, sum(extent.nbytes for extent in extents))


def _check_extent(extent: Extent, shard_bytes: Sequence[int]) -> None:
    inside = 0 <= extent.shard < len(shard_bytes) and extent.offset >= 0
    if not inside or extent.nbytes <= 0 or extent.offset + extent.nbytes > shard_bytes[extent.shard]:
        raise StorageError(f"{extent} is empty or outside its shard; shard sizes are {list(shard_bytes)[:8]}")


def _join_pages(extents: Sequence[Extent]) -> list[tuple[int, int, int]]:
    """(shard, begin, end) of the page ranges that hold the extents, sorted, neighbours joined."""
    joined: list[tuple[int, int, int]] = []
    for shard, offset, nbytes in sorted(extents):
        begin = offset // PAGE_BYTES * PAGE_BYTES
        end = _round_up(offset + nbytes)
        if joined and joined[-1][0] == shard and begin <= joined[-1][2]:
            begin, end = joined[-1][1], max(joined.pop()[2], end)
        joined.append((shard, begin, end))
    return joined


def _slot_offset(runs: Sequence[Run], extent: Extent) -> int:
    run = next(run for run in runs if _holds(run, extent.shard, extent.offset))
    return run.slot_offset + extent.offset - run.offset


def _holds(run: Run, shard: int, offset: int) -> bool:
    return run.shard == shard and run.offset <= offset < run.offset + run.nbytes


def _round_up(nbytes: int) -> int:
    return -(-nbytes // PAGE_BYTES) * PAGE_BYTES


class ExpertReader(Protocol):
    """One way to get an expert's bytes. Safe to call from many threads, except `close`."""

    name: str
    in_place: bool  # True: views lie in the reader's own memory and no slot is needed

    def read_run(self, run: Run, slot: memoryview | None, begin: int = 0, nbytes: int | None = None) -> int:
        """Bring in the piece [begin, begin + nbytes) of a run (default: all of it); return its bytes.

        `begin` is a multiple of 4096, and so is `nbytes` unless the piece ends the run. `slot` is
        page-aligned memory of at least the plan's slot_bytes, or None for a reader that works in place.
        Raises ReadError.
        """
        ...

    def views(self, plan: ReadPlan, slot: memoryview | None) -> tuple[memoryview, ...]:
        """The bytes of each extent, in the plan's order, once all its runs are in."""
        ...

    def release(self, plan: ReadPlan) -> None:
        """Give back what the reader itself holds for this expert, whose views must no longer be used."""
        ...

    def close(self) -> None:
        """Close the files. No read may be under way; views stay valid."""
        ...


def open_reader(name: str, paths: Sequence[Path], shard_bytes: Sequence[int]) -> ExpertReader:
    """Open the shards with the back-end `direct`, `buffered` or `mmap`.

    Raises StorageError where a shard cannot be opened this way; a file system may still refuse the first
    direct read.
    """
    match name:
        case "direct" | "buffered":
            return SlotReader(name, paths, direct=name == "direct")
        case "mmap":
            return MmapReader(paths, shard_bytes)
    raise StorageError(f"unknown reader {name!r}; choose direct, buffered or mmap")


class SlotReader:
    """Read runs into slots; hold no expert's memory.

    Direct: from the drive into the slot, past the page cache, so that the budget holds by itself. Buffered:
    through the page cache, which is told not to read ahead and to drop each piece once it is copied.
    """

    in_place = False

    def __init__(self, name: str, paths: Sequence[Path], *, direct: bool) -> None:
        self.name = name
        self._direct = direct
        self._files = _open_files(paths, direct)
        for file in self._files:
            file.advise_random()

    def read_run(self, run: Run, slot: memoryview | None, begin: int = 0, nbytes: int | None = None) -> int:
        assert slot is not None, "this reader reads into slots"
        nbytes = run.nbytes - begin if nbytes is None else nbytes
        file, offset, to = self._files[run.shard], run.offset + begin, run.slot_offset + begin
        # Whole pages, as direct reads must ask for; of a file's last one only `nbytes` arrive.
        read_exactly(file, slot[to : to + _round_up(nbytes)], offset, nbytes)
        if not self._direct:
            file.drop_cache(offset, _round_up(nbytes))
        return nbytes

    def views(self, plan: ReadPlan, slot: memoryview | None) -> tuple[memoryview, ...]:
        assert slot is not None, "this reader reads into slots"
        return tuple(slot[offset : offset + nbytes] for offset, nbytes in plan.parts)

    def release(self, plan: ReadPlan) -> None:
        """Nothing to give back: the slot is the caller's."""

    def close(self) -> None:
        _close_files(self._files)


class MmapReader:
    """Views of the mapped shards; a "read" populates their pages, `release` gives these back to the system.

    The pages are page cache: the system may take them back under pressure and read them again when they are
    touched. If the file is cut short in between, that touch ends the process (SIGBUS); checked before each
    populate, not after.
    """

    name = "mmap"
    in_place = True

    def __init__(self, paths: Sequence[Path], shard_bytes: Sequence[int]) -> None:
        self._files = _open_files(paths, direct=False)
        self._maps: list[host.MappedFile] = []
        try:
            for file, nbytes in zip(self._files, shard_bytes, strict=True):
                self._maps.append(_map_file(file, nbytes))
        except StorageError:
            self.close()
            raise

    def read_run(self, run: Run, slot: memoryview | None, begin: int = 0, nbytes: int | None = None) -> int:
        nbytes = run.nbytes - begin if nbytes is None else nbytes
        file, mapped, offset = self._files[run.shard], self._maps[run.shard], run.offset + begin
        _check_size(file, offset + nbytes)
        try:
            mapped.will_need(offset, nbytes)  # the whole piece in flight; populating alone goes page by page
            populated = mapped.populate(offset, nbytes)
        except OSError as error:
            cause = "drive error or file cut off" if error.errno == errno.EFAULT else error.strerror
            raise ReadError(
                f"{file.path}: reading {nbytes} bytes at offset {offset} failed: {cause}"
            ) from error
        if not populated:
            _touch_pages(file, mapped.view[offset : offset + nbytes], offset)
        return nbytes

    def views(self, plan: ReadPlan, slot: memoryview | None) -> tuple[memoryview, ...]:
        return tuple(self._view(plan, offset, nbytes) for offset, nbytes in plan.parts)

    def release(self, plan: ReadPlan) -> None:
        # An edge page may belong to a resident neighbour too; it is read again when that is next touched.
        for run in plan.runs:
            self._maps[run.shard].forget(run.offset, run.nbytes)
            self._files[run.shard].drop_cache(run.offset, _round_up(run.nbytes))

    def close(self) -> None:
        for mapped in self._maps:
            mapped.close()
        _close_files(self._files)

    def _view(self, plan: ReadPlan, slot_offset: int, nbytes: int) -> memoryview:
        run = next(run for run in reversed(plan.runs) if run.slot_offset <= slot_offset)
        offset = run.offset + slot_offset - run.slot_offset
        return self._maps[run.shard].view[offset : offset + nbytes]


def _map_file(file: host.ReadFile, nbytes: int) -> host.MappedFile:
    _check_size(file, nbytes)  # before mapping: a page beyond the end is a SIGBUS
    file.advise_random()
    try:
        mapped = host.MappedFile(file, nbytes)
    except OSError as error:
        raise StorageError(
            f"{file.path} cannot be mapped: {error.strerror}; try the direct reader"
        ) from error
    mapped.advise_random()
    return mapped


def _touch_pages(file: host.ReadFile, view: memoryview, offset: int) -> None:
    """Map the pages of a range without a system call for it.

    Reading them through the file first waits for the drive outside the GIL and turns a drive error into
    ReadError; the touches then find the pages in memory.
    """
    scratch = memoryview(bytearray(min(SCRATCH_BYTES, view.nbytes)))
    for begin in range(0, view.nbytes, SCRATCH_BYTES):
        read_exactly(file, scratch[: view.nbytes - begin], offset + begin)
    view[::PAGE_BYTES].tobytes()


def _check_size(file: host.ReadFile, needed: int) -> None:
    size = file.size()
    if size < needed:
        raise ReadError(
            f"{file.path} has shrunk: {needed} bytes expected, {size} are left; download it again"
        )


def _open_files(paths: Sequence[Path], direct: bool) -> list[host.ReadFile]:
    files: list[host.ReadFile] = []
    for path in paths:
        try:
            files.append(open_shard(path, direct=direct))
        except StorageError:
            _close_files(files)
            raise
    return files


def _close_files(files: Sequence[host.ReadFile]) -> None:
    for file in files:
        file.close()
