"""The system's side: files, mappings and advice on a real system, cgroup trees on a made-up one."""

import ctypes
import errno
import mmap
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from storage import host

GIB = 2**30
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc")


@pytest.fixture
def letters(tmp_path: Path) -> Path:
    """A file of four pages: A, B, C, D."""
    path = tmp_path / "letters"
    path.write_bytes(b"".join(letter * 4096 for letter in (b"A", b"B", b"C", b"D")))
    return path


def test_aligned_memory_is_zeroed_writable_and_page_aligned() -> None:
    memory = host.allocate_aligned(3 * 4096)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert address % 4096 == 0 and len(memory) == 3 * 4096
    assert memory[:] == bytes(3 * 4096)
    memory[4096] = 7
    assert memory[4096] == 7


@linux_only
def test_aligned_memory_is_private_so_that_it_counts_and_huge_pages_like_ordinary_memory() -> None:
    """Python's default for anonymous mappings is shared memory, which is neither."""
    memory = host.allocate_aligned(4 << 20)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(part, 16) for part in line.split()[0].split("-"))
        if begin <= address < end:
            assert line.split()[1] == "rw-p"
            return
    pytest.fail("the mapping is not listed")


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(
            host.PosixFile, marks=pytest.mark.skipif(not hasattr(os, "preadv"), reason="no preadv here")
        ),
        host.SeekingFile,
    ],
)
def test_both_kinds_of_file_read_the_same_bytes_from_many_threads(kind: type, letters: Path) -> None:
    def read_page(page: int) -> tuple[int, bytes]:
        room = bytearray(4096)
        return file.read_at(memoryview(room), page * 4096), bytes(room)

    with kind(letters, False) as file, ThreadPoolExecutor(4) as pool:
        file.advise_random()
        file.drop_cache(0, 4096)
        pages = list(pool.map(read_page, [3, 0, 2, 1] * 25))
        assert pages == [(4096, letter * 4096) for letter in (b"D", b"A", b"C", b"B")] * 25
        assert file.read_at(memoryview(bytearray(10)), 4 * 4096) == 0
        assert file.size() == 4 * 4096


def test_every_thread_that_seeks_has_a_handle_of_its_own(letters: Path) -> None:
    """With a shared one, another thread could seek away between this one's seek and its read."""
    with host.SeekingFile(letters, False) as file, ThreadPoolExecutor(1) as pool:
        assert file.fileno() == file.fileno() != pool.submit(file.fileno).result()


def test_a_file_that_is_not_there_fails_at_opening(tmp_path: Path) -> None:
    for kind in (host.PosixFile, host.SeekingFile):
        with pytest.raises(FileNotFoundError):
            kind(tmp_path / "gone", False)


def test_without_preadv_files_are_read_by_seeking(letters: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "preadv", raising=False)
    with host.open_file(letters, direct=False) as file:
        assert isinstance(file, host.SeekingFile)


def test_a_mapped_file_can_be_closed_while_views_of_it_live_on(letters: Path) -> None:
    with host.open_file(letters, direct=False) as file:
        mapped = host.MappedFile(file, file.size())
    view = mapped.view[4096:8192]
    mapped.close()
    mapped.close()
    assert view.tobytes() == b"B" * 4096


def test_a_mapped_file_is_writable_in_memory_and_unchanged_on_disk(letters: Path) -> None:
    """Writable, because torch.frombuffer warns about read-only memory."""
    with host.open_file(letters, direct=False) as file:
        mapped = host.MappedFile(file, file.size())
    mapped.view[0:1] = b"x"
    mapped.close()
    assert letters.read_bytes()[:1] == b"A"


def test_advice_is_repeated_after_a_signal_and_unknown_advice_is_no_error() -> None:
    answers = [errno.EINTR, errno.EAGAIN, 0, errno.EINVAL, errno.EFAULT]

    def madvise(address: int, nbytes: int, advice: int) -> int:
        ctypes.set_errno(answers.pop(0))
        return -1 if ctypes.get_errno() else 0

    assert host.call_madvise(madvise, 0, 4096, 22) is True
    assert answers == [errno.EINVAL, errno.EFAULT]
    assert host.call_madvise(madvise, 0, 4096, 22) is False
    with pytest.raises(OSError, match="Bad address"):
        host.call_madvise(madvise, 0, 4096, 22)


def test_hints_to_read_ahead_are_short_because_linux_cuts_long_ones_off(
    letters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rest of a hint longer than the drive's read-ahead came in page by page, five times slower."""
    hints: list[tuple[int, int]] = []
    monkeypatch.setattr(host.MappedFile, "_advise", lambda self, name, *hint: hints.append(hint))
    monkeypatch.setattr(host, "WILL_NEED_BYTES", 2 * 4096)
    with host.open_file(letters, direct=False) as file:
        mapped = host.MappedFile(file, file.size())
    mapped.will_need(4096, 3 * 4096)
    assert hints == [(4096, 2 * 4096), (3 * 4096, 4096)]
    mapped.close()


def test_memory_in_use_is_counted() -> None:
    memory = host.allocate_aligned(32 << 20)
    memory[:] = bytes(32 << 20)
    assert 32 << 20 < host.rss_bytes() <= host.peak_rss_bytes() + (4 << 20)


def test_counters_have_fallbacks_where_there_is_no_proc(tmp_path: Path) -> None:
    assert host.drive_read_bytes(tmp_path) is None
    assert host.peak_rss_bytes(tmp_path) > 1 << 20
    assert host.memory_limit(tmp_path).limit_source == "system"


@linux_only
def test_the_drive_counter_is_the_processs_own(tmp_path: Path) -> None:
    (tmp_path / "self").mkdir()
    (tmp_path / "self/io").write_text("rchar: 5\nread_bytes: 1234\nwrite_bytes: 9\n")
    assert host.drive_read_bytes(tmp_path) == 1234
    assert host.drive_read_bytes() is not None


class FakeSystem:
    """A /proc with this process's cgroups and mounts, and the cgroup folders themselves."""

    def __init__(self, folder: Path) -> None:
        self.proc = folder / "proc"
        self.mount = folder / "cgroup"
        (self.proc / "self").mkdir(parents=True)
        (self.proc / "self/cgroup").touch()
        (self.proc / "self/mountinfo").write_text("22 27 0:21 / /proc rw,relatime - proc proc rw\n")

    def join(self, line: str) -> None:
        with open(self.proc / "self/cgroup", "a") as file:
            file.write(line + "\n")

    def mount_v1(self, root: str = "/") -> None:
        self._mount(root, "rw - cgroup cgroup rw,memory")

    def mount_v2(self, root: str = "/") -> None:
        self._mount(root, "rw shared:9 - cgroup2 cgroup2 rw")

    def _mount(self, root: str, rest: str) -> None:
        mount_point = str(self.mount).replace(" ", "\\040")
        with open(self.proc / "self/mountinfo", "a") as file:
            file.write(f"35 31 0:32 {root} {mount_point} {rest}\n")

    def v1(self, path: str, limit: int, usage: int, cache: int = 0) -> None:
        self._write(path, {
            "memory.limit_in_bytes": limit, "memory.usage_in_bytes": usage,
            "memory.stat": f"inactive_file 7\ntotal_inactive_file {cache}\ntotal_active_file {cache}",
        })  # fmt: skip

    def v2(self, path: str, limit: int | str, usage: int, cache: int = 0, high: int | str = "max") -> None:
        self._write(path, {
            "memory.max": limit, "memory.high": high, "memory.current": usage,
            "memory.stat": f"anon 5\ninactive_file {cache}\nactive_file {cache}",
        })  # fmt: skip

    def _write(self, path: str, files: dict[str, object]) -> None:
        folder = self.mount / path
        folder.mkdir(parents=True, exist_ok=True)
        for name, value in files.items():
            (folder / name).write_text(f"{value}\n")

    def limit(self) -> host.MemoryLimit:
        return host.memory_limit(self.proc)


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSystem:
    """A system of 64 GiB with 48 GiB available."""
    memory = psutil.virtual_memory()._replace(total=64 * GIB, available=48 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    return FakeSystem(tmp_path)


def test_version_2_limits_leave_what_is_unused_or_reclaimable(system: FakeSystem) -> None:
    system.join("0::/user/chat")
    system.mount_v2()
    system.v2("user/chat", 8 * GIB, usage=5 * GIB, cache=1 * GIB)
    limit = system.limit()
    assert (limit.total_bytes, limit.available_bytes) == (8 * GIB, 5 * GIB)
    assert limit.limit_source == str(system.mount / "user/chat/memory.max")


def test_version_1_limits_count_the_cache_of_the_whole_subtree(system: FakeSystem) -> None:
    system.join("5:cpu,memory:/chat")
    system.join("1:name=systemd:/chat")
    system.mount_v1()
    system.v1("chat", 4 * GIB, usage=3 * GIB, cache=GIB // 2)
    assert system.limit().available_bytes == 2 * GIB
    assert system.limit().limit_source.endswith("chat/memory.limit_in_bytes")


def test_the_level_with_the_least_room_binds_wherever_it_is(system: FakeSystem) -> None:
    system.join("0::/a/b/c")
    system.mount_v2()
    system.v2("a/b/c", 16 * GIB, usage=1 * GIB)
    system.v2("a/b", "max", usage=2 * GIB)
    system.v2("a", 20 * GIB, usage=19 * GIB)
    limit = system.limit()
    assert (limit.total_bytes, limit.available_bytes) == (16 * GIB, 1 * GIB)
    assert limit.limit_source == str(system.mount / "a/memory.max")


def test_memory_high_is_a_limit_too(system: FakeSystem) -> None:
    """Above it the process is not killed but throttled, which is no place to plan for."""
    system.join("0::/chat")
    system.mount_v2()
    system.v2("chat", 8 * GIB, usage=1 * GIB, high=6 * GIB)
    assert system.limit().total_bytes == 6 * GIB
    assert system.limit().available_bytes == 5 * GIB


def test_max_and_huge_numbers_are_no_limits(system: FakeSystem) -> None:
    system.join("0::/chat")
    system.join("4:memory:/chat")
    system.mount_v2()
    system.v2("chat", "max", usage=1)
    system.mount_v1()
    system.v1("chat", 9223372036854771712, usage=1)
    assert system.limit() == host.MemoryLimit(64 * GIB, 48 * GIB, "system")


def test_a_container_sees_its_own_cgroup_at_the_mount_point(system: FakeSystem) -> None:
    """Version 1 without a cgroup namespace: the path begins at the host's root, the mount below it."""
    system.join("4:memory:/docker/0a1b")
    system.mount_v1(root="/docker/0a1b")
    system.v1(".", 2 * GIB, usage=1 * GIB)
    assert system.limit().available_bytes == 1 * GIB


def test_a_cgroup_inside_a_container_is_found_below_the_mount_point(system: FakeSystem) -> None:
    system.join("4:memory:/docker/0a1b/chat")
    system.mount_v1(root="/docker/0a1b")
    system.v1("chat", 3 * GIB, usage=1 * GIB)
    assert system.limit().available_bytes == 2 * GIB


def test_a_cgroup_outside_the_mount_falls_back_to_the_mount_point(system: FakeSystem) -> None:
    system.join("0::/../other")
    system.mount_v2()
    system.v2(".", 2 * GIB, usage=1 * GIB)
    assert system.limit().available_bytes == 1 * GIB


def test_a_limit_above_what_the_system_has_left_does_not_bind(system: FakeSystem) -> None:
    system.join("0::/chat")
    system.mount_v2()
    system.v2("chat", 100 * GIB, usage=10 * GIB)
    assert system.limit() == host.MemoryLimit(64 * GIB, 48 * GIB, "system")


def test_an_overdrawn_cgroup_has_nothing_left_rather_than_less(system: FakeSystem) -> None:
    system.join("0::/chat")
    system.mount_v2()
    system.v2("chat", 2 * GIB, usage=3 * GIB)
    assert system.limit().available_bytes == 0


def test_a_mount_point_with_a_space_is_found(tmp_path: Path, system: FakeSystem) -> None:
    system.mount = tmp_path / "cgroup with space"
    system.join("0::/")
    system.mount_v2()
    system.v2(".", 2 * GIB, usage=1 * GIB)
    assert system.limit().available_bytes == 1 * GIB


def test_mmap_constants_are_those_of_the_system() -> None:
    """Values written down by hand agree with Python's, where Python has them."""
    for name, ours in (
        ("MADV_POPULATE_READ", host.MADV_POPULATE_READ),
        ("MAP_NORESERVE", host.MAP_NORESERVE),
    ):
        assert getattr(mmap, name, ours) == ours
