"""The journal of a pack under way: which shards are finished, so that the same command goes on after a kill.

It is replaced by one rename after each shard and removed at the end. It belongs to one source and one set of
options; another command does not touch the folder. A lock keeps a second process out meanwhile.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from storage import host
from storage.expert_file import JOURNAL_NAME, MANIFEST_NAME
from storage.safetensors_header import load_json
from storage.safetensors_writer import write_whole
from storage.storage_errors import CheckpointError, StorageError

Sums = tuple[float, float]  # of squared errors, of squares


@dataclass(frozen=True, slots=True)
class FinishedShard:
    """What the manifest will say of a shard that was written and read back."""

    nbytes: int
    header: str  # checksum
    tensors: Mapping[str, str]  # name -> checksum
    layer_sums: Mapping[int, Sums] = field(default_factory=dict)
    dense_sums: Sums = (0.0, 0.0)


class PackJournal:
    """Open with `open_journal`, close when done; the folder is locked meanwhile."""

    def __init__(self, folder: Path, job: Mapping[str, str], shards: dict[str, FinishedShard]) -> None:
        self.folder, self.job, self.shards = folder, dict(job), shards
        self._lock: int | None = None

    def start(self) -> None:
        """Make the folder, lock it, write the journal, and remove what a killed process left half written."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = host.lock_folder(self.folder)
            for partial in self.folder.glob(".*.partial"):
                partial.unlink()
        except BlockingIOError:
            raise StorageError(f"another process is packing into {self.folder}") from None
        except OSError as error:
            raise StorageError(f"{self.folder} cannot be written: {error.strerror}") from error
        self._write()

    def record(self, name: str, shard: FinishedShard) -> None:
        """A shard is on the drive and has been read back."""
        self.shards[name] = shard
        self._write()

    def remove(self) -> None:
        """The manifest is written: nothing is left to go on with."""
        (self.folder / JOURNAL_NAME).unlink(missing_ok=True)

    def close(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self) -> None:
        shards = {name: asdict(shard) for name, shard in self.shards.items()}
        text = json.dumps({"job": self.job, "shards": shards}).encode()
        write_whole(self.folder / JOURNAL_NAME, text)


def open_journal(folder: Path, job: Mapping[str, str]) -> PackJournal:
    """What is finished of `job` in `folder`, which need not exist; nothing is written yet.

    `job` names what makes two commands the same one: in words, since a difference is shown. Raises
    StorageError where the folder holds a complete pack, another job, or files that are none of ours.
    """
    if (folder / MANIFEST_NAME).exists():
        raise StorageError(
            f"{folder} holds a packed model already; choose another --output, or remove it first"
        )
    path = folder / JOURNAL_NAME
    if not path.exists():
        if folder.is_dir() and any(not _is_left_over(found) for found in folder.iterdir()):
            raise StorageError(f"{folder} is not empty and no pack was begun in it; choose a new --output")
        if folder.exists() and not folder.is_dir():
            raise StorageError(f"{folder} is a file; --output takes a folder to be made")
        return PackJournal(folder, job, {})
    begun, shards = _read(path)
    for name, value in job.items():
        if begun.get(name) != value:
            raise StorageError(
                f"{folder} holds the beginning of another pack: {name} was {begun.get(name)}, now {value};"
                " run the same command again, or remove the folder"
            )
    whole = {name: shard for name, shard in shards.items() if _size(folder / name) == shard.nbytes}
    return PackJournal(folder, job, whole)


def _is_left_over(path: Path) -> bool:
    """Of a process that was killed while it wrote its first journal."""
    return path.name.startswith(JOURNAL_NAME) or path.name.endswith(".partial")


def _read(path: Path) -> tuple[dict[str, Any], dict[str, FinishedShard]]:
    try:
        raw = load_json(path, path.read_bytes())
        shards = {
            name: FinishedShard(
                shard["nbytes"],
                shard["header"],
                dict(shard["tensors"]),
                {int(layer): _sums(sums) for layer, sums in shard["layer_sums"].items()},
                _sums(shard["dense_sums"]),
            )
            for name, shard in raw["shards"].items()
        }
        return dict(raw["job"]), shards
    except (OSError, CheckpointError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise StorageError(f"{path} cannot be used ({error}); remove the folder and pack again") from error


def _sums(raw: Any) -> Sums:
    first, second = raw
    return float(first), float(second)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1
