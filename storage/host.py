"""Where operating systems differ: opening and reading files, advice, aligned memory, and how much is left.

Everything here has a portable fallback, so that the rest of `storage` never asks which system it runs on.

    run in our tests      Linux, all of it; SeekingFile, which is how Windows reads, on an ordinary Linux file
    only written so far   macOS: F_NOCACHE, peak RSS by getrusage
                          Windows: FILE_FLAG_NO_BUFFERING, ACCESS_COPY mappings, peak RSS by psutil
"""

import contextlib
import ctypes
import errno
import functools
import io
import mmap
import os
import platform
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

import psutil

from storage.cgroup_memory import tightest_limit

# Values that Python's mmap and fcntl modules do not name in every version.
MADV_POPULATE_READ, MADV_POPULATE_WRITE = 22, 23  # Linux 5.14
MAP_NORESERVE = 0x4000 if sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64") else 0
F_NOCACHE = 48  # macOS

# Linux cuts a longer hint off at the drive's read-ahead or request size, whichever is larger, and the rest
# then comes in page by page: 4 MiB pieces at the stock read-ahead of 128 KiB fell from 1.1 GB/s to 0.2.
WILL_NEED_BYTES = 128 << 10

POPULATE_THREADS, POPULATE_BYTES = 8, 256 << 20


# Files


class ReadFile(Protocol):
    """A file open for positioned reads from any thread."""

    path: Path
    direct: bool  # reads pass the page cache by; offset, length and memory must be multiples of 4096

    def read_at(self, buffer: memoryview, offset: int) -> int:
        """Read into `buffer` from byte `offset`; return the bytes read, 0 at the end. Raises OSError."""
        ...

    def size(self) -> int:
        """The file's size now."""
        ...

    def advise_random(self) -> None:
        """Ask the system not to read ahead of what is asked for."""
        ...

    def drop_cache(self, offset: int, nbytes: int) -> None:
        """Ask the system to forget this range's clean, whole pages; a no-op where it can't be asked."""
        ...

    def fileno(self) -> int: ...
    def close(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *_: object) -> None: ...


def open_file(path: Path, *, direct: bool) -> ReadFile:
    """Open `path` for positioned reads. Raises OSError, also where the file system refuses direct reads."""
    return PosixFile(path, direct) if hasattr(os, "preadv") else SeekingFile(path, direct)


class PosixFile:
    """One descriptor for all threads: `preadv` brings its offset, and restarts after a signal (PEP 475)."""

    def __init__(self, path: Path, direct: bool) -> None:
        self.path = path
        self.direct = direct
        self._fd = _open_descriptor(path, direct)

    def read_at(self, buffer: memoryview, offset: int) -> int:
        return os.preadv(self._fd, [buffer], offset)

    def size(self) -> int:
        return os.fstat(self._fd).st_size

    def advise_random(self) -> None:
        self._advise("POSIX_FADV_RANDOM", 0, 0)

    def drop_cache(self, offset: int, nbytes: int) -> None:
        self._advise("POSIX_FADV_DONTNEED", offset, nbytes)

    def fileno(self) -> int:
        return self._fd

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _advise(self, name: str, offset: int, nbytes: int) -> None:
        advice = getattr(os, name, None)
        if advice is not None:
            with contextlib.suppress(OSError):  # a file system may decline advice; the bytes are the same
                os.posix_fadvise(self._fd, offset, nbytes, advice)


class SeekingFile:
    """Seek and read, one handle per thread: threads that share one wait for each other on Windows."""

    def __init__(self, path: Path, direct: bool) -> None:
        self.path = path
        self.direct = direct
        self._of_thread = threading.local()
        self._lock = threading.Lock()
        self._handles: list[io.FileIO] = []
        self._handle()  # so that a file that cannot be opened fails here

    def read_at(self, buffer: memoryview, offset: int) -> int:
        handle = self._handle()
        handle.seek(offset)
        return handle.readinto(buffer) or 0

    def size(self) -> int:
        return os.fstat(self.fileno()).st_size

    def advise_random(self) -> None:
        """Nothing to ask: there is no such advice on a plain handle."""

    def drop_cache(self, offset: int, nbytes: int) -> None:
        """Nothing to ask: the system's cache keeps its own counsel."""

    def fileno(self) -> int:
        return self._handle().fileno()

    def close(self) -> None:
        with self._lock:
            for handle in self._handles:
                handle.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _handle(self) -> io.FileIO:
        handle: io.FileIO | None = getattr(self._of_thread, "handle", None)
        if handle is None:
            handle = self._of_thread.handle = io.FileIO(_open_descriptor(self.path, self.direct), "rb")
            with self._lock:
                self._handles.append(handle)
        return handle


def _open_descriptor(path: Path, direct: bool) -> int:
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0)
    if not direct:
        return os.open(path, flags)
    if sys.platform == "win32":
        return _open_unbuffered_on_windows(path)
    if hasattr(os, "O_DIRECT"):
        return os.open(path, flags | os.O_DIRECT)
    fd = os.open(path, flags)
    if sys.platform == "darwin":
        import fcntl

        fcntl.fcntl(fd, F_NOCACHE, 1)
    return fd


if sys.platform == "win32":

    def _open_unbuffered_on_windows(path: Path) -> int:
        import msvcrt

        generic_read, share_read_write_delete, open_existing, no_buffering = 0x80000000, 7, 3, 0x20000000
        create_file = ctypes.WinDLL("kernel32", use_last_error=True).CreateFileW
        create_file.restype = ctypes.c_void_p
        create_file.argtypes = (
            ctypes.c_wchar_p, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_void_p,
            ctypes.c_uint32, ctypes.c_uint32, ctypes.c_void_p,
        )  # fmt: skip
        handle = create_file(
            str(path), generic_read, share_read_write_delete, None, open_existing, no_buffering, None
        )
        if handle in (None, ctypes.c_void_p(-1).value):
            raise ctypes.WinError(ctypes.get_last_error())
        return msvcrt.open_osfhandle(handle, os.O_RDONLY | os.O_BINARY)


def sync_folder(folder: Path) -> None:
    """Make a rename inside `folder` durable, where the system needs to be asked for that."""
    if sys.platform == "win32":
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems sync files but not folders
            os.fsync(fd)
    finally:
        os.close(fd)


def lock_folder(folder: Path) -> int | None:
    """Keep other processes that ask for it out of `folder` until the descriptor returned is closed.

    None where the system has no such locks (Windows, some network file systems). Raises BlockingIOError where
    another process has it.
    """
    try:
        import fcntl
    except ImportError:
        return None
    fd = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise
    except OSError:
        os.close(fd)
        return None
    return fd


# Memory


def allocate_aligned(nbytes: int) -> mmap.mmap:
    """Zeroed, page-aligned memory of this process alone, in huge pages where the system offers them.

    Private, because Python's default, shared memory, is neither counted nor given huge pages as ordinary
    memory is.
    """
    if sys.platform == "win32":
        return mmap.mmap(-1, nbytes)
    mapping = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without transparent huge pages: ordinary ones do
            mapping.madvise(mmap.MADV_HUGEPAGE)
    return mapping


def reserve(nbytes: int) -> mmap.mmap:
    """Private memory that takes pages as it is touched, and no huge ones: much of it may never be."""
    if sys.platform == "win32":
        return mmap.mmap(-1, nbytes)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    mapping = mmap.mmap(-1, nbytes, flags=flags)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages
            mapping.madvise(mmap.MADV_NOHUGEPAGE)
    return mapping


def give_back(mapping: mmap.mmap, begin: int, nbytes: int) -> None:
    """Return the whole pages of a stretch of `reserve`d memory to the system; they read as zeros then."""
    first = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
    last = (begin + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if last > first and hasattr(mmap, "MADV_DONTNEED"):
        mapping.madvise(mmap.MADV_DONTNEED, first, last - first)


def populate(address: int, nbytes: int) -> bool:
    """Have the system give page-aligned memory its pages now, from several threads, outside the GIL; False
    where it has no call for that. Raises OSError."""
    if sys.platform != "linux":
        return False
    pieces = range(0, nbytes, POPULATE_BYTES)
    with ThreadPoolExecutor(POPULATE_THREADS) as pool:
        done = pool.map(
            lambda begin: call_madvise(
                _libc_madvise(), address + begin, min(POPULATE_BYTES, nbytes - begin), MADV_POPULATE_WRITE
            ),
            pieces,
        )
        return all(list(done))


class MappedFile:
    """A whole file as private, writable memory; nothing is ever written to it.

    Writable, since torch.frombuffer warns about read-only buffers; without reserving memory, since Linux
    refuses a private writable mapping larger than RAM otherwise.
    """

    def __init__(self, file: ReadFile, nbytes: int) -> None:
        if sys.platform == "win32":
            self._mapping = mmap.mmap(file.fileno(), nbytes, access=mmap.ACCESS_COPY)
        else:
            flags, protection = mmap.MAP_PRIVATE | MAP_NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE
            self._mapping = mmap.mmap(file.fileno(), nbytes, flags=flags, prot=protection)
        self.view = memoryview(self._mapping)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._mapping))
        self._nbytes = nbytes

    def advise_random(self) -> None:
        """A page fault then reads its page and not the neighbourhood."""
        self._advise("MADV_RANDOM", 0, self._nbytes)

    def will_need(self, offset: int, nbytes: int) -> None:
        """Start reading a range in the background, if the system takes the hint."""
        for begin in range(offset, offset + nbytes, WILL_NEED_BYTES):
            self._advise("MADV_WILLNEED", begin, min(WILL_NEED_BYTES, offset + nbytes - begin))

    def populate(self, offset: int, nbytes: int) -> bool:
        """Read a range and map it, outside the GIL; False where the system has no call for that.

        Raises OSError: EFAULT is what would have been a SIGBUS, that is a drive error or a file cut short.
        """
        if sys.platform != "linux":
            return False
        return self._call_madvise(MADV_POPULATE_READ, offset, nbytes)

    def forget(self, offset: int, nbytes: int) -> None:
        """Unmap a range's pages from this process; they come back from the file when touched."""
        self._advise("MADV_DONTNEED", offset, nbytes)

    def close(self) -> None:
        """Unmap the file, or leave that to the last view of it: views handed out stay valid."""
        self.view.release()
        with contextlib.suppress(BufferError):  # still in use: the mapping dies with its last view
            self._mapping.close()

    def _advise(self, name: str, offset: int, nbytes: int) -> None:
        advice = getattr(mmap, name, None)
        if advice is not None:
            self._call_madvise(advice, offset, nbytes)

    def _call_madvise(self, advice: int, offset: int, nbytes: int) -> bool:
        """madvise over the pages that hold the range; False if the system does not know this advice.

        Through ctypes, because mmap.madvise keeps the GIL: a populating read would stop the computing thread.
        """
        begin = offset // mmap.PAGESIZE * mmap.PAGESIZE
        return call_madvise(_libc_madvise(), self._address + begin, offset + nbytes - begin, advice)


Madvise = Callable[[int, int, int], int]


def call_madvise(madvise: Madvise, address: int, nbytes: int, advice: int) -> bool:
    """Call madvise until no signal interrupts it; False for advice the kernel does not know, else OSError."""
    while madvise(address, nbytes, advice) != 0:
        code = ctypes.get_errno()
        if code == errno.EINVAL:
            return False
        if code not in (errno.EINTR, errno.EAGAIN):
            raise OSError(code, os.strerror(code))
    return True


@functools.cache
def _libc_madvise() -> Madvise:
    function = ctypes.CDLL(None, use_errno=True).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    function.restype = ctypes.c_int
    return function


# What this process uses, and what is left for it


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """What this process could use in all, and could still allocate beyond what it holds now."""

    total_bytes: int
    available_bytes: int
    limit_source: str  # what sets available_bytes: "system", or the path of a cgroup's limit


def memory_limit(proc: Path = Path("/proc")) -> MemoryLimit:
    """The smaller of what the system has left and what every memory cgroup above this process leaves.

    Page cache that can be reclaimed counts as left. The mount points of the cgroup file systems are read from
    `proc`/self/mountinfo, so a test needs no other path.
    """
    system = psutil.virtual_memory()
    limit = tightest_limit(proc)
    if limit is None:
        return MemoryLimit(system.total, system.available, "system")
    source = limit.source if limit.left_bytes < system.available else "system"
    return MemoryLimit(min(system.total, limit.limit_bytes), min(system.available, limit.left_bytes), source)


def rss_bytes() -> int:
    """The memory of this process that is resident now."""
    return int(psutil.Process().memory_info().rss)


def peak_rss_bytes(proc: Path = Path("/proc")) -> int:
    """The most memory this process has had resident so far."""
    try:
        for line in (proc / "self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, KiB elsewhere


def drive_read_bytes(proc: Path = Path("/proc")) -> int | None:
    """The bytes that this process has made drives read so far; None where the system does not count them."""
    try:
        for line in (proc / "self/io").read_text().splitlines():
            if line.startswith("read_bytes:"):
                return int(line.split()[1])
    except OSError:
        pass  # not Linux, or not allowed
    return None
