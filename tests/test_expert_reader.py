"""Reading experts: the plan, the same bytes from every back-end, what goes wrong, and whose memory it is."""

import ctypes
import errno
import functools
import mmap
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from storage import expert_reader, host
from storage.expert_reader import ExpertReader, Extent, ReadPlan, Run, open_reader, plan_read
from storage.storage_errors import CheckpointError, ReadError, StorageError

PAGE = 4096
SIZES = (10 * PAGE + 123, 7 * PAGE, 50)
READERS = ("direct", "buffered", "mmap")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    """Three shards of random bytes, on the drive and not only in memory."""
    folder = tmp_path_factory.mktemp("shards")
    return tuple(write_shard(folder / f"{number}.bin", size) for number, size in enumerate(SIZES))


def write_shard(path: Path, nbytes: int) -> Path:
    with open(path, "wb") as file:
        file.write(random.Random(nbytes).randbytes(nbytes))
        file.flush()
        os.fsync(file.fileno())
    return path


@functools.cache
def direct_reads_work(folder: Path) -> bool:
    path = write_shard(folder / "direct_probe", PAGE)
    try:
        with host.open_file(path, direct=True) as file:
            return file.read_at(memoryview(host.allocate_aligned(PAGE)), 0) == PAGE
    except OSError:
        return False


@pytest.fixture(params=READERS)
def open_as(
    request: pytest.FixtureRequest, shards: tuple[Path, ...]
) -> Iterator[Callable[..., ExpertReader]]:
    """Open shards with one back-end after the other; closed at the end."""
    if request.param == "direct" and not direct_reads_work(shards[0].parent):
        pytest.skip("this file system does not allow direct reads")
    opened = []

    def open_shards(paths: tuple[Path, ...], sizes: tuple[int, ...]) -> ExpertReader:
        opened.append(open_reader(request.param, paths, sizes))
        return opened[-1]

    yield open_shards
    for reader in opened:
        reader.close()


def make_slot(plan: ReadPlan) -> memoryview:
    return memoryview(host.allocate_aligned(plan.slot_bytes))


def read_expert(reader: ExpertReader, plan: ReadPlan, slot: memoryview | None = None) -> list[bytes]:
    slot = None if reader.in_place else slot or make_slot(plan)
    for run in plan.runs:
        reader.read_run(run, slot)
    return [bytes(view) for view in reader.views(plan, slot)]


# The plan


def test_neighbours_in_any_order_become_one_read() -> None:
    plan = plan_read([Extent(0, 3100, 2000), Extent(0, 100, 1000), Extent(0, 1100, 2000)], SIZES)
    assert plan.runs == (Run(0, 0, 2 * PAGE, 0),)
    assert plan.parts == ((3100, 2000), (100, 1000), (1100, 2000))
    assert (plan.slot_bytes, plan.read_bytes, plan.expert_bytes) == (2 * PAGE, 2 * PAGE, 5000)


def test_extents_on_pages_that_touch_become_one_read_and_a_page_between_them_makes_two() -> None:
    touching = plan_read([Extent(0, 0, 100), Extent(0, PAGE + 50, 100)], SIZES)
    assert touching.runs == (Run(0, 0, 2 * PAGE, 0),)
    apart = plan_read([Extent(0, 2 * PAGE + 50, 100), Extent(0, 0, 100)], SIZES)
    assert apart.runs == (Run(0, 0, PAGE, 0), Run(0, 2 * PAGE, PAGE, PAGE))
    assert apart.parts == ((PAGE + 50, 100), (0, 100))


def test_the_last_run_ends_where_the_file_ends() -> None:
    plan = plan_read([Extent(0, 10 * PAGE + 23, 100), Extent(2, 0, 50)], SIZES)
    assert plan.runs == (Run(0, 10 * PAGE, 123, 0), Run(2, 0, 50, PAGE))
    assert (plan.slot_bytes, plan.read_bytes) == (2 * PAGE, 173)


def test_equal_offsets_in_different_shards_stay_apart() -> None:
    plan = plan_read([Extent(1, 0, 10), Extent(0, 0, 10)], SIZES)
    assert plan.runs == (Run(0, 0, PAGE, 0), Run(1, 0, PAGE, PAGE))
    assert plan.parts == ((PAGE, 10), (0, 10))


@pytest.mark.parametrize(
    "extent",
    [
        Extent(3, 0, 1),
        Extent(-1, 0, 1),
        Extent(0, -1, 2),
        Extent(0, 0, 0),
        Extent(2, 50, 1),
        Extent(2, 1, 50),
    ],
)
def test_an_extent_outside_its_shard_is_refused(extent: Extent) -> None:
    with pytest.raises(StorageError, match="empty or outside its shard"):
        plan_read([extent], SIZES)


# The bytes


@st.composite
def experts(draw: st.DrawFn) -> list[Extent]:
    """One to six extents anywhere in the shards, neighbours and overlaps included."""
    extents = []
    for _ in range(draw(st.integers(1, 6))):
        shard = draw(st.integers(0, len(SIZES) - 1))
        begin = draw(st.integers(0, SIZES[shard] - 1))
        extents.append(Extent(shard, begin, draw(st.integers(1, SIZES[shard] - begin))))
        if draw(st.booleans()) and extents[-1].offset > 0:
            nbytes = draw(st.integers(1, extents[-1].offset))
            extents.append(Extent(shard, extents[-1].offset - nbytes, nbytes))
    return extents


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(extents=experts())
def test_every_reader_delivers_the_files_bytes(
    shards: tuple[Path, ...], open_as: Callable[..., ExpertReader], extents: list[Extent]
) -> None:
    plan = plan_read(extents, SIZES)
    assert all(run.offset % PAGE == run.slot_offset % PAGE == 0 for run in plan.runs)
    assert plan.slot_bytes % PAGE == 0 and sum(run.nbytes for run in plan.runs) == plan.read_bytes
    reader = open_as(shards, SIZES)
    files = [path.read_bytes() for path in shards]
    expected = [files[shard][offset : offset + nbytes] for shard, offset, nbytes in extents]
    assert read_expert(reader, plan) == expected
    reader.release(plan)
    assert read_expert(reader, plan) == expected
    reader.close()


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pages=st.integers(1, 10))
def test_a_run_may_be_read_in_pieces_in_any_order(
    shards: tuple[Path, ...], open_as: Callable[..., ExpertReader], pages: int
) -> None:
    plan = plan_read([Extent(0, 77, SIZES[0] - 77)], SIZES)
    (run,) = plan.runs
    reader = open_as(shards, SIZES)
    slot = None if reader.in_place else make_slot(plan)
    step = pages * PAGE
    for begin in reversed(range(0, run.nbytes, step)):
        nbytes = min(step, run.nbytes - begin)
        assert reader.read_run(run, slot, begin, nbytes) == nbytes
    assert bytes(reader.views(plan, slot)[0]) == shards[0].read_bytes()[77:]
    reader.close()


def test_views_outlive_the_reader(shards: tuple[Path, ...], open_as: Callable[..., ExpertReader]) -> None:
    reader = open_as(shards, SIZES)
    plan = plan_read([Extent(1, 5, 20)], SIZES)
    slot = None if reader.in_place else make_slot(plan)
    reader.read_run(plan.runs[0], slot)
    views = reader.views(plan, slot)
    reader.close()
    reader.close()
    assert bytes(views[0]) == shards[1].read_bytes()[5:25]


def test_views_are_writable_because_torch_warns_otherwise(
    shards: tuple[Path, ...], open_as: Callable[..., ExpertReader]
) -> None:
    torch = pytest.importorskip("torch")
    reader = open_as(shards, SIZES)
    plan = plan_read([Extent(1, 8, 20)], SIZES)
    slot = None if reader.in_place else make_slot(plan)
    reader.read_run(plan.runs[0], slot)
    tensor = torch.frombuffer(reader.views(plan, slot)[0], dtype=torch.uint8)  # a warning would fail the test
    assert tensor.numpy().tobytes() == shards[1].read_bytes()[8:28]


# What goes wrong


def test_a_file_cut_off_after_opening_is_a_read_error_that_names_it(
    tmp_path: Path, open_as: Callable[..., ExpertReader]
) -> None:
    """Through the mapping this would be a SIGBUS, which no Python code survives."""
    path = write_shard(tmp_path / "cut.bin", 8 * PAGE)
    reader = open_as((path,), (8 * PAGE,))
    plan = plan_read([Extent(0, 0, 8 * PAGE)], (8 * PAGE,))
    read_expert(reader, plan)
    reader.release(plan)
    os.truncate(path, 5 * PAGE + 100)
    with pytest.raises(ReadError, match=rf"cut\.bin.*({5 * PAGE + 100})"):
        read_expert(reader, plan)


@pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux can populate a mapping and report the failure"
)
def test_a_file_cut_off_between_check_and_populate_is_a_read_error_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_shard(tmp_path / "cut.bin", 8 * PAGE)
    reader = open_reader("mmap", (path,), (8 * PAGE,))
    os.truncate(path, 2 * PAGE)
    monkeypatch.setattr(expert_reader, "_check_size", lambda file, needed: None)
    with pytest.raises(
        ReadError, match=r"cut\.bin: reading 32768 bytes at offset 0 failed: drive error or file cut"
    ):
        reader.read_run(Run(0, 0, 8 * PAGE, 0), None)
    reader.close()


class BrokenFile(host.PosixFile):
    """A file on a drive that fails from its third page on."""

    def read_at(self, buffer: memoryview, offset: int) -> int:
        if offset + buffer.nbytes > 2 * PAGE:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return super().read_at(buffer, offset)


@pytest.mark.parametrize("name", ["direct", "buffered"])
def test_a_drive_error_is_a_read_error_with_shard_offset_and_size(
    shards: tuple[Path, ...], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(host, "open_file", lambda path, direct: BrokenFile(path, False))
    reader = open_reader(name, shards, SIZES)
    plan = plan_read([Extent(0, PAGE, 3 * PAGE)], SIZES)
    with pytest.raises(
        ReadError, match=r"0\.bin: reading 12288 bytes at offset 4096 failed after 0: Input/output"
    ):
        read_expert(reader, plan)
    reader.close()


def test_a_drive_error_while_populating_a_mapping_is_a_read_error(
    shards: tuple[Path, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing_madvise(address: int, nbytes: int, advice: int) -> int:
        ctypes.set_errno(errno.EFAULT)
        return -1

    reader = open_reader("mmap", shards, SIZES)
    monkeypatch.setattr(host, "_libc_madvise", lambda: failing_madvise)
    monkeypatch.setattr(host.sys, "platform", "linux")
    with pytest.raises(ReadError, match=r"0\.bin: reading 4096 bytes at offset 8192 failed: drive error"):
        reader.read_run(Run(0, 2 * PAGE, PAGE, 0), None)
    reader.close()


class StutteringFile(host.PosixFile):
    """Delivers at most 5000 bytes a call, as reads interrupted by signals or some network drives do."""

    def read_at(self, buffer: memoryview, offset: int) -> int:
        return super().read_at(buffer[:5000], offset)


@pytest.mark.parametrize("direct", [False, True])
def test_reads_that_stop_early_are_continued(
    shards: tuple[Path, ...], monkeypatch: pytest.MonkeyPatch, direct: bool
) -> None:
    """A direct read that stopped inside a page goes on from that page's beginning."""
    offsets = []

    def open_stuttering(path: Path, direct: bool) -> host.ReadFile:
        file = StutteringFile(path, False)
        file.direct = direct
        read_at = file.read_at
        file.read_at = lambda buffer, offset: offsets.append(offset) or read_at(buffer, offset)
        return file

    monkeypatch.setattr(host, "open_file", open_stuttering)
    reader = open_reader("direct" if direct else "buffered", shards, SIZES)
    assert read_expert(reader, plan_read([Extent(0, 1, SIZES[0] - 1)], SIZES)) == [shards[0].read_bytes()[1:]]
    assert not direct or all(offset % PAGE == 0 for offset in offsets)
    reader.close()


def test_the_mapping_works_where_the_system_can_not_populate(
    shards: tuple[Path, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then the file is read too, outside the GIL, so that touching the pages finds them in memory."""
    offsets = []
    read_at = host.PosixFile.read_at

    def record(self: host.PosixFile, buffer: memoryview, offset: int) -> int:
        offsets.append(offset)
        return read_at(self, buffer, offset)

    monkeypatch.setattr(host.MappedFile, "populate", lambda self, offset, nbytes: False)
    monkeypatch.setattr(host.PosixFile, "read_at", record)
    monkeypatch.setattr(expert_reader, "SCRATCH_BYTES", 4 * PAGE)
    reader = open_reader("mmap", shards, SIZES)
    assert read_expert(reader, plan_read([Extent(0, 9, SIZES[0] - 9)], SIZES)) == [shards[0].read_bytes()[9:]]
    assert offsets == [0, 4 * PAGE, 8 * PAGE]
    reader.close()


def test_a_missing_shard_and_an_unknown_reader_are_named(shards: tuple[Path, ...]) -> None:
    for name in READERS:
        with pytest.raises(CheckpointError, match=r"gone\.bin is missing"):
            open_reader(name, (shards[0], shards[0].with_name("gone.bin")), SIZES[:2])
    with pytest.raises(
        StorageError, match="unknown reader 'carrier pigeon'; choose direct, buffered or mmap"
    ):
        open_reader("carrier pigeon", shards, SIZES)


def test_a_shard_that_shrank_before_opening_can_not_be_mapped(tmp_path: Path) -> None:
    with pytest.raises(ReadError, match="has shrunk: 8192 bytes expected, 4096 are left"):
        open_reader("mmap", (write_shard(tmp_path / "small.bin", PAGE),), (2 * PAGE,))


def test_a_file_system_that_refuses_to_open_for_direct_reads_is_a_storage_error(
    shards: tuple[Path, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, direct: bool) -> host.ReadFile:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(host, "open_file", refuse)
    with pytest.raises(StorageError, match=r"cannot be opened for direct reads \(try the buffered reader\)"):
        open_reader("direct", shards, SIZES)


# Whose memory it is


def cached_pages(path: Path) -> int:
    """How many of the file's pages are in the page cache; asking does not bring any in."""
    if sys.platform != "linux":
        pytest.skip("asks Linux's mincore what is cached")
    nbytes = path.stat().st_size
    cached = (ctypes.c_ubyte * (nbytes // PAGE))()
    with open(path, "rb") as file, mmap.mmap(file.fileno(), nbytes, access=mmap.ACCESS_COPY) as mapping:
        address = ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(mapping)))
        assert ctypes.CDLL(None).mincore(address, ctypes.c_size_t(nbytes), cached) == 0
    return sum(flags & 1 for flags in cached)


@pytest.fixture
def cold_shard(tmp_path: Path) -> Path:
    """Four MiB of which nothing is in the page cache."""
    path = write_shard(tmp_path / "cold.bin", 4 << 20)
    with host.open_file(path, direct=False) as file:
        file.drop_cache(0, 0)
    if cached_pages(path):
        pytest.skip("this file system keeps its files in memory")
    return path


@pytest.mark.parametrize("name", READERS)
def test_no_reader_leaves_an_expert_in_the_page_cache(cold_shard: Path, name: str) -> None:
    """Page cache counts against the process's memory cgroup, and so against the budget."""
    if name == "direct" and not direct_reads_work(cold_shard.parent):
        pytest.skip("this file system does not allow direct reads")
    sizes = (4 << 20,)
    reader = open_reader(name, (cold_shard,), sizes)
    plan = plan_read([Extent(0, 100, 1 << 20), Extent(0, 2 << 20, 1 << 20)], sizes)
    read_expert(reader, plan)
    if name == "mmap":
        assert cached_pages(cold_shard) == plan.read_bytes // PAGE, (
            "exactly the expert's pages, no read-ahead"
        )
    reader.release(plan)
    assert cached_pages(cold_shard) == 0
    reader.close()


def test_touching_a_mapped_page_that_was_taken_back_reads_that_page_alone(cold_shard: Path) -> None:
    sizes = (4 << 20,)
    reader = open_reader("mmap", (cold_shard,), sizes)
    (view,) = reader.views(plan_read([Extent(0, 1 << 20, 1 << 20)], sizes), None)
    view[:1].tobytes()
    assert cached_pages(cold_shard) == 1
    reader.close()


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's smaps")
def test_a_released_mapping_is_no_longer_resident(cold_shard: Path) -> None:
    def resident_bytes() -> int:
        lines = iter(Path("/proc/self/smaps").read_text().splitlines())
        assert any(line.endswith(str(cold_shard)) for line in lines)
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Rss:"))

    sizes = (4 << 20,)
    reader = open_reader("mmap", (cold_shard,), sizes)
    plan = plan_read([Extent(0, 0, 1 << 20)], sizes)
    read_expert(reader, plan)
    assert resident_bytes() == 1 << 20
    reader.release(plan)
    assert resident_bytes() == 0
    reader.close()


@settings(max_examples=50, deadline=None)
@given(extents=experts())
def test_a_plan_never_reads_a_page_twice(extents: list[Extent]) -> None:
    plan = plan_read(extents, SIZES)
    pages = [
        (run.shard, page) for run in plan.runs for page in range(run.offset, run.offset + run.nbytes, PAGE)
    ]
    assert len(pages) == len(set(pages))
    assume(len(plan.runs) > 1)
    for first, second in zip(plan.runs, plan.runs[1:], strict=False):
        assert first.shard != second.shard or first.offset + first.nbytes < second.offset
