"""Conversations' keys and values on disk, so that a long system prompt is prefilled once ever.

The files hold conversations: token ids, and keys and values that can be turned back into text. The folder is
its owner's alone (0700), so are the files (0600); they may be deleted at any time.

One folder has one limit, whoever writes to it: several processes, or several models. Files come and go by
renames, so nobody ever sees half of one, and no lock is needed; a file that has vanished, or is damaged, is a
prompt that is computed again. Nothing here is an error for a chat: what fails is logged.

Knows nothing of engines; flashmoe/session_file.py knows what is inside a file. For one thread at a time, but
for `Saving.write`.
"""

import logging
import os
import re
import stat
import time
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from flashmoe.errors import ConfigError
from flashmoe.session_file import file_bytes, fingerprint, read_head, read_rows, session_key, write_session
from flashmoe.sizes import format_bytes
from storage.storage_errors import CheckpointError, StorageError

__all__ = ["SessionStore", "fingerprint"]

log = logging.getLogger(__name__)

FILE_NAME = re.compile(r"session-([0-9a-f]{32})\.safetensors")
PARTIAL_NAME = re.compile(r"\.session-[0-9a-f]{32}\.safetensors\.\d+\.partial")
ABANDONED_S = 3600.0  # a file that nobody has written to for so long was left by a killed process
TOKEN_BYTES = 4
MOST_TOKEN_ID = 2 ** (8 * TOKEN_BYTES) - 1


@dataclass(frozen=True, slots=True)
class _FileOnDisk:
    path: Path
    nbytes: int
    used_ns: int  # the file's time: when it was last written or loaded


@dataclass(slots=True)
class Saving:
    """A session that is to be written: what `SessionStore.begin_save` gives and `end_save` takes."""

    path: Path
    fingerprint: str
    key: str
    ids: NDArray[np.int64]
    layers: Sequence[tuple[Tensor, Tensor]]
    replaced: Sequence[str]
    error: Exception | None = None
    is_written: bool = False

    def write(self) -> None:
        """In any thread; the rows must stay as they are meanwhile. What fails is kept for `end_save`."""
        try:
            write_session(self.path, self.fingerprint, self.ids, self.layers)
            self.is_written = True
        except Exception as error:
            self.error = error


class SessionStore:
    """Stored sessions of one model. Tokens that begin with the same ids have the same first rows."""

    def __init__(self, folder: Path, limit_bytes: int, fingerprint: str) -> None:
        """Make the folder, or read what is there. Raises ConfigError for a folder that cannot be used."""
        self.folder, self.limit_bytes, self.fingerprint = folder, limit_bytes, fingerprint
        # Token ids as big-endian bytes, sorted: whoever shares most with a prompt is a neighbour of it.
        self._sorted: list[tuple[bytes, str]] = []
        self._tokens: dict[str, bytes] = {}
        self._useless: set[tuple[str, int, int]] = set()  # name, size and time of files that were told of
        self._has_failed = False  # the last one that was to be written
        self._folder_ns = -1
        self._last_used_ns = 0
        _open_folder(folder)
        self._refresh()

    def __len__(self) -> int:
        return len(self._sorted)

    def longest_prefix(self, tokens: Sequence[int]) -> tuple[str, int]:
        """The key of the session that shares most first tokens with these, and how many; ("", 0) if none
        does. Sees what other processes have stored."""
        self._refresh()
        prompt = _as_bytes(np.asarray(tokens, np.int64))
        at = bisect_left(self._sorted, (prompt, ""))
        key, shared = "", 0
        for stored, of in self._sorted[max(0, at - 1) : at + 1]:
            count = _shared_tokens(stored, prompt)
            if count > shared:
                key, shared = of, count
        return key, shared

    def save(self, tokens: Sequence[int], layers: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Store keys and values [n, G, d] float32 of n tokens, a pair a layer.

        A stored session that these tokens go on from is replaced; if a stored one goes on from these, nothing
        is written. The least recently used ones go where the folder's limit asks for it.
        """
        saving = self.begin_save(tokens, layers)
        if saving is not None:
            saving.write()
            self.end_save(saving)

    def begin_save(
        self, tokens: Sequence[int], layers: Sequence[tuple[Tensor, Tensor]]
    ) -> Saving | None:
        """As `save`, up to the writing, for which there is room then; None if nothing is to be written."""
        ids = np.asarray(tokens, np.int64)
        stored = _as_bytes(ids)
        if not len(ids):
            return None
        self._refresh()
        longer = self._that_goes_on(stored)
        if longer is not None:
            self._touch(longer)
            return None
        _, heads, head_dim = layers[0][0].shape
        nbytes = file_bytes(len(ids), len(layers), heads, head_dim)
        if nbytes > self.limit_bytes:
            log.info(
                "a session of %d tokens is not stored: it needs %s, --session-cache-size is %s",
                len(ids), format_bytes(nbytes), format_bytes(self.limit_bytes),
            )  # fmt: skip
            return None
        key = session_key(self.fingerprint, ids)
        replaced = [of for shorter, of in self._sorted if stored.startswith(shorter)]
        self._make_room(nbytes, {self._path(of) for of in replaced})
        return Saving(self._path(key), self.fingerprint, key, ids, layers, replaced)

    def end_save(self, saving: Saving) -> None:
        """Take in what was written, or log why it was not."""
        if saving.error is not None:  # a full disk stays full for a while: one line says so
            level = logging.DEBUG if self._has_failed else logging.WARNING
            log.log(level, "a session of %d tokens is not stored: %s", len(saving.ids), saving.error)
        self._has_failed = not saving.is_written
        if not saving.is_written:
            return
        self._add(saving.key, _as_bytes(saving.ids))
        self._touch(saving.key)
        for of in saving.replaced:
            self._remove(self._path(of))
        self._make_room(0, set())  # what others have written meanwhile counts, too

    def load(self, key: str, tokens: int, layers: Sequence[tuple[Tensor, Tensor]]) -> int:
        """Copy the first `tokens` rows of a session into the tensors given, [at least so many, G, d] each.

        Returns how many are usable: `tokens`, or 0 where the file has vanished or is damaged; some rows may
        have been overwritten then. A damaged file is removed.
        """
        known, path = self._tokens.get(key), self._path(key)
        if known is None:
            return 0
        try:
            head = read_head(path)
            if head.fingerprint.hex() != self.fingerprint or _as_bytes(head.tokens) != known:
                raise CheckpointError(f"{path} is damaged: it is another session than before")
            read_rows(path, head, tokens, layers)
        except StorageError as error:
            if _status(path) is None:
                log.info("a stored session is gone, so its tokens are computed again: %s", path)
            else:
                log.warning("a stored session is not used: %s", error)
            self._remove(path)
            return 0
        self._touch(key)
        return tokens

    # What is in the folder

    def _refresh(self) -> None:
        """Take in what has come and gone since last time; a look at the folder's time if nothing has."""
        changed_ns = _modified_ns(self.folder)
        if changed_ns == self._folder_ns:
            return
        self._folder_ns = changed_ns
        there = {file.path.name: file for file in self._files()}
        for key in [key for key in self._tokens if self._path(key).name not in there]:
            self._forget(key)
        for name, file in there.items():
            match = FILE_NAME.fullmatch(name)
            if match is not None and match[1] not in self._tokens:
                self._take_in(match[1], file)

    def _take_in(self, key: str, file: _FileOnDisk) -> None:
        seen = (file.path.name, file.nbytes, file.used_ns)
        if seen in self._useless:
            return
        try:
            head = read_head(file.path)
            if head.fingerprint.hex() != self.fingerprint:
                raise CheckpointError(f"{file.path} is of another model, or of other options")
            if session_key(self.fingerprint, head.tokens) != key:
                raise CheckpointError(f"{file.path} is damaged: its name is not the one of its tokens")
            self._add(key, _as_bytes(head.tokens))
        except StorageError as error:
            self._useless.add(seen)
            log.warning("a stored session is skipped: %s", error)

    def _files(self) -> list[_FileOnDisk]:
        """Whole and half files of ours, of whatever model; never a link, nor anything of another name."""
        files = []
        try:
            with os.scandir(self.folder) as entries:
                for entry in entries:
                    if FILE_NAME.fullmatch(entry.name) or PARTIAL_NAME.fullmatch(entry.name):
                        status = _status(Path(entry.path))
                        if status is not None and stat.S_ISREG(status.st_mode):
                            files.append(_FileOnDisk(Path(entry.path), status.st_size, status.st_mtime_ns))
        except OSError as error:
            log.warning("stored sessions cannot be listed: %s: %s", self.folder, error.strerror)
        return files

    def _make_room(self, nbytes: int, replaced: set[Path]) -> None:
        """Remove the least recently used files until so many bytes more fit, once `replaced` are gone."""
        files = [file for file in self._files() if file.path not in replaced]
        left = sum(file.nbytes for file in files)
        for file in sorted(files, key=lambda file: (file.used_ns, file.path.name)):
            if left + nbytes <= self.limit_bytes:
                return
            if FILE_NAME.fullmatch(file.path.name) or _is_abandoned(file):
                self._remove(file.path)
                left -= file.nbytes

    def _remove(self, path: Path) -> None:
        match = FILE_NAME.fullmatch(path.name)
        if match is not None:
            self._forget(match[1])
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            log.warning("%s cannot be removed: %s", path, error.strerror)

    def _touch(self, key: str) -> None:
        """Used now; strictly later than whatever this process used before."""
        self._last_used_ns = max(self._last_used_ns + 1, time.time_ns())
        try:
            os.utime(self._path(key), ns=(self._last_used_ns, self._last_used_ns))
        except OSError:  # another process has removed it; the next refresh will notice
            log.debug("%s has been removed", self._path(key))

    # The index

    def _add(self, key: str, stored: bytes) -> None:
        if key not in self._tokens:
            self._tokens[key] = stored
            at = bisect_left(self._sorted, (stored, key))
            self._sorted.insert(at, (stored, key))

    def _forget(self, key: str) -> None:
        stored = self._tokens.pop(key, None)
        if stored is not None:
            del self._sorted[bisect_left(self._sorted, (stored, key))]

    def _that_goes_on(self, stored: bytes) -> str | None:
        """A session that begins with these tokens."""
        at = bisect_left(self._sorted, (stored, ""))
        if at < len(self._sorted) and self._sorted[at][0].startswith(stored):
            return self._sorted[at][1]
        return None

    def _path(self, key: str) -> Path:
        return self.folder / f"session-{key}.safetensors"


def _open_folder(folder: Path) -> None:
    """Make it, private; refuse one in which others could plant files."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
        if not any(folder.iterdir()) and status.st_mode & 0o077:
            folder.chmod(0o700)
            status = folder.stat()
    except OSError as error:
        raise ConfigError(f"--session-cache {folder} cannot be used: {error.strerror or error}") from error
    if not hasattr(os, "geteuid"):
        return  # Windows: who may write is not in the mode
    if status.st_uid not in (0, os.geteuid()) or status.st_mode & 0o022:
        raise ConfigError(
            f"--session-cache {folder} is not yours alone: it belongs to user {status.st_uid} and has mode "
            f"{stat.S_IMODE(status.st_mode):o}; name another folder, or chmod 700 this one"
        )


def _as_bytes(ids: NDArray[np.int64]) -> bytes:
    """Big-endian: the order of the bytes is the order of the ids."""
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) <= MOST_TOKEN_ID:
        raise CheckpointError(f"token ids from {ids.min()} to {ids.max()} are no ids")
    return ids.astype(">u4").tobytes()


def _shared_tokens(first: bytes, second: bytes) -> int:
    length = min(len(first), len(second))
    differ = np.frombuffer(first, np.uint8, length) != np.frombuffer(second, np.uint8, length)
    at = int(differ.argmax()) if length else 0
    return (at if length and differ[at] else length) // TOKEN_BYTES


def _is_abandoned(file: _FileOnDisk) -> bool:
    return time.time_ns() - file.used_ns > ABANDONED_S * 1e9


def _modified_ns(folder: Path) -> int:
    status = _status(folder)
    return -1 if status is None else status.st_mtime_ns


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.lstat()
    except OSError:
        return None
