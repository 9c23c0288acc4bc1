"""A folder that appears whole or not at all.

Its files are written into a temporary sibling, which gets the real name by one rename. A process that is
killed leaves the sibling behind; the next one removes it. Two processes may write the same folder at once:
the first rename wins.
"""

import os
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from storage.host import sync_folder


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Give an empty temporary folder beside `target`, which becomes `target` at the end.

    On any exception, Ctrl-C too, it is removed. Raises OSError; FileExistsError where `target` has meanwhile
    come to be and is not empty.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(target)
    temporary = target.with_name(f"{_prefix(target)}{os.getpid()}.{secrets.token_hex(4)}")
    temporary.mkdir()
    try:
        yield temporary
        _rename(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_synced(path: Path, content: bytes) -> None:
    """Write a small file and wait until the drive has it: a rename must not outlive what it names."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _rename(temporary: Path, target: Path) -> None:
    sync_folder(temporary)
    with suppress(OSError):
        target.rmdir()  # only an empty folder goes; Windows renames onto none at all
    try:
        temporary.rename(target)
    except OSError as error:
        if target.exists():
            raise FileExistsError(error.errno, "already exists", str(target)) from error
        raise
    sync_folder(target.parent)


def _prefix(target: Path) -> str:
    """Names the host, or container: process ids mean nothing on another one."""
    return f".{target.name}.building.{socket.gethostname()}."


def _remove_abandoned(target: Path) -> None:
    """Remove the temporary siblings of processes of this host that are no more."""
    for folder in target.parent.iterdir():
        if folder.name.startswith(prefix := _prefix(target)):
            pid = folder.name.removeprefix(prefix).split(".")[0]
            if pid.isdecimal() and not _may_be_writing(int(pid), folder):
                shutil.rmtree(folder, ignore_errors=True)


def _may_be_writing(pid: int, folder: Path) -> bool:
    """Whether the process lives and already did when the folder last changed: process ids are used again."""
    try:
        started = psutil.Process(pid).create_time()
        return started < folder.stat().st_mtime + 60  # start times are known to a second or so
    except (psutil.NoSuchProcess, FileNotFoundError):
        return False
    except psutil.Error:
        return True
