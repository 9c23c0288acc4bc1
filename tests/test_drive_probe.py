"""Probing the drive: real reads, the choice among readers, and drives that refuse or take too long."""

import errno
import os
from itertools import count, islice
from pathlib import Path
from types import SimpleNamespace

import pytest

from storage import drive_probe, host
from storage.drive_probe import EXPERT_BYTES, choose_reader, probe
from storage.expert_reader import Extent, ReadPlan, open_reader, plan_read
from storage.storage_errors import ReadError, StorageError

EXPERT = 300_000


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """Forty experts of 300 kB, on the drive."""
    path = tmp_path_factory.mktemp("probe") / "shard.bin"
    with open(path, "wb") as file:
        file.write(os.urandom(40 * EXPERT))
        file.flush()
        os.fsync(file.fileno())
    return path, 40 * EXPERT


@pytest.fixture
def even_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe's own clock, a millisecond a look: a busy machine must not change what is measured."""
    looks = count()
    monkeypatch.setattr(drive_probe, "time", SimpleNamespace(perf_counter=lambda: next(looks) / 1000))


def plans_of(nbytes: int) -> list[ReadPlan]:
    return [plan_read([Extent(0, offset, EXPERT)], [nbytes]) for offset in range(0, nbytes, EXPERT)]


class RefusingFile(host.PosixFile):
    """Opens for direct reads and refuses the first one, as some file systems do."""

    def read_at(self, buffer: memoryview, offset: int) -> int:
        if self.direct:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return super().read_at(buffer, offset)


def refusing_open(path: Path, *, direct: bool) -> host.ReadFile:
    file = RefusingFile(path, False)
    file.direct = direct
    return file


def test_the_fastest_reader_is_chosen_and_direct_if_it_is_nearly_as_fast() -> None:
    assert choose_reader({"direct": 1000.0, "buffered": 900.0, "mmap": 500.0}) == "direct"
    assert choose_reader({"direct": 905.0, "buffered": 1000.0, "mmap": 500.0}) == "direct"
    assert choose_reader({"direct": 895.0, "buffered": 1000.0, "mmap": 500.0}) == "buffered"
    assert choose_reader({"buffered": 400.0, "mmap": 500.0}) == "mmap"


@pytest.mark.usefixtures("even_clock")
def test_every_reader_is_measured_and_the_chosen_ones_speed_is_reported(shard: tuple[Path, int]) -> None:
    path, nbytes = shard
    result = probe([path], [nbytes], plans_of(nbytes), readers=("buffered", "mmap"))
    assert set(result.measurements) == {"buffered", "mmap"} and result.notes == ()
    assert all(speed > 0 for speed in result.measurements.values())
    assert result.read_mb_per_s == result.measurements[result.reader]
    assert result.reader == choose_reader(result.measurements)


@pytest.mark.usefixtures("even_clock")
def test_direct_reads_refused_at_the_first_read_are_noted_and_passed_over(
    shard: tuple[Path, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, nbytes = shard
    monkeypatch.setattr(host, "open_file", refusing_open)
    result = probe([path], [nbytes], plans_of(nbytes))
    assert result.reader in ("buffered", "mmap") and "direct" not in result.measurements
    (note,) = result.notes
    assert note.startswith("direct: not usable here:") and "direct reads are not possible here" in note


def test_a_drive_that_no_reader_can_read_is_an_error(
    shard: tuple[Path, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, nbytes = shard
    monkeypatch.setattr(host, "open_file", refusing_open)
    with pytest.raises(ReadError, match=r"shard\.bin: reading \d+ bytes at offset \d+ failed"):
        probe([path], [nbytes], plans_of(nbytes), readers=("direct",))
    with pytest.raises(StorageError, match=r"gone\.bin is missing"):
        probe([path.with_name("gone.bin")], [nbytes], plans_of(nbytes))


def test_a_drive_that_takes_all_the_time_is_measured_with_the_first_reader_only(
    shard: tuple[Path, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, nbytes = shard
    monkeypatch.setattr(drive_probe, "PROBE_S", 0.0)
    result = probe([path], [nbytes], plans_of(nbytes), readers=("buffered", "mmap"))
    assert set(result.measurements) == {"buffered"} and result.read_mb_per_s > 0
    assert result.notes == ("mmap: not measured, the drive took all the time before",)


def test_of_a_very_large_expert_only_the_beginning_is_read(tmp_path: Path) -> None:
    path = tmp_path / "large.bin"
    path.touch()
    os.truncate(path, 1 << 30)
    plan = plan_read([Extent(0, 10, 20 << 20), Extent(0, 1 << 29, 1 << 29)], [1 << 30])
    short = drive_probe._shorten(plan)
    assert (short.read_bytes, short.slot_bytes, len(short.runs)) == (EXPERT_BYTES, EXPERT_BYTES, 1)
    assert probe([path], [1 << 30], [plan], readers=("buffered",)).read_mb_per_s > 0


def test_a_freshly_written_file_is_measured_on_the_drive_and_not_in_memory(tmp_path: Path) -> None:
    """The probe once said 4.3 GB/s of a drive of 2: Linux drops whole folios only, up to 2 MiB each."""
    if host.drive_read_bytes() is None:
        pytest.skip("this system does not count what a drive reads")
    path = tmp_path / "fresh.bin"
    with open(path, "wb") as file:
        file.write(os.urandom(16 << 20))
        file.flush()
        os.fsync(file.fileno())
    plans = [plan_read([Extent(0, (n << 20) + 300_000, 600_000)], [16 << 20]) for n in range(16)]
    with host.open_file(path, direct=False) as file:
        file.drop_cache(0, 0)
        before = host.drive_read_bytes()
        file.read_at(memoryview(bytearray(4096)), 0)
        if host.drive_read_bytes() == before:
            pytest.skip("this file system keeps its files in memory")
    path.read_bytes()  # warm again
    reader = open_reader("buffered", [path], [16 << 20])
    slot = memoryview(host.allocate_aligned(plans[0].slot_bytes))
    before = host.drive_read_bytes()
    with host.open_file(path, direct=False) as file:
        for plan in islice(drive_probe._cold([file], plans), len(plans)):
            reader.read_run(plan.runs[0], slot)
    assert host.drive_read_bytes() - before >= sum(plan.read_bytes for plan in plans)
    reader.close()
