"""`--stats-json`: one JSON object a line for each generation."""

import json
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from storage.storage_errors import StorageError

if TYPE_CHECKING:
    from flashmoe.stats import GenerationStats


class StatsFile:
    """Opened, and so emptied, at once: a path that cannot be written is an error before a model is loaded.

    Without a path it takes everything and keeps nothing. Raises StorageError.
    """

    def __init__(self, path: Path | None, per_token: bool) -> None:
        self._path, self._per_token = path, per_token
        try:
            self._file = None if path is None else path.open("w", encoding="utf-8", newline="\n")
        except OSError as error:
            raise StorageError(f"cannot write statistics to {path}: {error.strerror}") from error

    def write(self, stats: "GenerationStats", error: Exception | None = None) -> None:
        """Add a generation, and the `error` that ended it if one did; on the drive when this returns."""
        if self._file is None:
            return
        values = stats.as_dict(self._per_token)
        if error is not None:
            values["error"] = str(error)
        try:
            self._file.write(json.dumps(values) + "\n")
            self._file.flush()
        except OSError as problem:
            raise StorageError(f"cannot write statistics to {self._path}: {problem.strerror}") from problem

    def __enter__(self) -> "StatsFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            with suppress(OSError):  # what could not be written has been reported by `write`
                self._file.close()
