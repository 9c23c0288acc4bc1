"""Open a shard and read exactly so many bytes of it, or say where and why not."""

import errno
import os
import stat
from pathlib import Path

from storage import host
from storage.storage_errors import CheckpointError, ReadError, StorageError

PAGE_BYTES = 4096  # offset, length and memory of a direct read are multiples of this


def open_shard(path: Path, *, direct: bool = False) -> host.ReadFile:
    """Open a regular file for reading; symlinks are followed, since the Hugging Face cache is made of them.

    Raises CheckpointError for a missing file or one that would block or never end (a pipe, a device),
    StorageError where the system refuses to open it, as some file systems do for direct reads.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise CheckpointError(f"{path} is not a regular file")
        return host.open_file(path, direct=direct)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; download the model again") from None
    except OSError as error:
        way = "for direct reads (try the buffered reader)" if direct else "for reading"
        raise StorageError(f"{path} cannot be opened {way}: {error.strerror}") from error


def read_exactly(
    file: host.ReadFile, buffer: bytearray | memoryview, offset: int, needed: int | None = None
) -> None:
    """Fill `buffer` from byte `offset` on; at least its first `needed` bytes (default: all) must arrive.

    A direct file is asked for whole pages; a file's last page may come back short, which is what `needed` is
    for. Raises ReadError on a drive error and when the file ends too early.
    """
    view = memoryview(buffer)
    needed = view.nbytes if needed is None else needed
    done = 0
    while done < needed:
        try:
            arrived = done + file.read_at(view[done:], offset + done)
        except OSError as error:
            raise ReadError(
                f"{file.path}: reading {needed} bytes at offset {offset} failed after {done}: "
                f"{_reason(error, file)}"
            ) from error
        # A direct read that stopped inside a page can only go on from that page's beginning.
        go_on = arrived // PAGE_BYTES * PAGE_BYTES if file.direct and arrived < needed else arrived
        if go_on == done:
            raise ReadError(
                f"{file.path}: short read: {arrived} of {needed} bytes at offset {offset}; the file has "
                f"{file.size()} bytes now, has it been cut off or replaced?"
            )
        done = go_on


def _reason(error: OSError, file: host.ReadFile) -> str:
    if file.direct and error.errno == errno.EINVAL:
        return f"{error.strerror} (direct reads are not possible here; try the buffered reader)"
    return error.strerror or str(error)
