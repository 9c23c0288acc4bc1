"""A file system on a loop device of its own, whose read-ahead can be set without touching the real drive.

    with LoopFilesystem(Path("/var/tmp"), nbytes) as filesystem:
        filesystem.copy(Path("model.gguf"), "model.gguf")
        filesystem.set_read_ahead(128)

Everything it made is gone afterwards, after an exception or a Ctrl-C too. Linux, root and free disk space for
the image are needed; LoopUnavailable says what is missing. Direct I/O between the loop device and its image
keeps the image out of the page cache, so that a file's pages are counted once, as on a plain drive.
"""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

# ext4's own tables, and room to write: an inode for each 4 MiB and no journal need little.
OVERHEAD_BYTES, OVERHEAD_SHARE = 128 << 20, 0.01
MKFS = ("mkfs.ext4", "-q", "-F", "-m", "0", "-T", "largefile4", "-O", "^has_journal",
        "-E", "nodiscard,lazy_itable_init=0")  # fmt: skip
BLOCK_BYTES = 4096


class LoopUnavailable(Exception):
    """No loop device can be made here; the text says why."""


class LoopFilesystem:
    """An ext4 of at least `nbytes` for files, mounted at `path` while the context lasts."""

    def __init__(self, scratch: Path, nbytes: int) -> None:
        self._scratch, self._nbytes = scratch, image_bytes(nbytes)
        self._undo = ExitStack()
        self.path = self._device = Path()

    def __enter__(self) -> "LoopFilesystem":
        if os.geteuid() != 0:
            raise LoopUnavailable("loop devices and memory limits need root")
        if (free := shutil.disk_usage(self._scratch).free) < self._nbytes:
            raise LoopUnavailable(
                f"{self._scratch} has {free / 1e9:.1f} GB free; the image needs {self._nbytes / 1e9:.1f} GB"
            )
        with ExitStack() as undo:
            folder = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix="loop-", dir=self._scratch)))
            image, self.path = folder / "image", folder / "mounted"
            self.path.mkdir()
            with image.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, self._nbytes)
            _run([*MKFS, str(image)])
            self._device = Path(_run(["losetup", "--direct-io=on", "--show", "-f", str(image)]).strip())
            undo.callback(_run, ["losetup", "-d", str(self._device)])
            _run(["mount", "-o", "noatime", str(self._device), str(self.path)])
            undo.callback(_run, ["umount", str(self.path)])
            self._undo = undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._undo.close()

    def copy(self, source: Path, name: str) -> Path:
        """Copy a file or a folder of files; returns where it now is."""
        target = self.path / name
        if source.is_dir():
            shutil.copytree(source, target)
        else:
            shutil.copyfile(source, target)
        return target

    def set_read_ahead(self, kib: int) -> None:
        """Of the loop device; files opened from now on follow it."""
        self._read_ahead_file().write_text(str(kib))

    def read_ahead(self) -> int:
        """KiB."""
        return int(self._read_ahead_file().read_text())

    def _read_ahead_file(self) -> Path:
        return Path("/sys/block") / self._device.name / "queue/read_ahead_kb"


def image_bytes(nbytes: int) -> int:
    """How large an image must be to hold `nbytes` of files, in whole blocks."""
    return -(-int(nbytes * (1 + OVERHEAD_SHARE) + OVERHEAD_BYTES) // BLOCK_BYTES) * BLOCK_BYTES


def bytes_of(path: Path) -> int:
    """The size of a file, or of all files in a folder."""
    files = path.rglob("*") if path.is_dir() else (path,)
    return sum(file.stat().st_size for file in files if file.is_file())


def _run(command: Sequence[str]) -> str:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except FileNotFoundError as error:
        raise LoopUnavailable(f"{command[0]} is not installed") from error
    except subprocess.CalledProcessError as error:
        raise LoopUnavailable(f"{' '.join(command)}: {error.stderr.strip()}") from error
