"""A progress bar on stderr while weights are built or loaded, tokens run or traces are replayed."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flashmoe.model_source import Progress


@contextmanager
def progress_bar(counting: bool = False) -> "Iterator[Progress | None]":
    """What to call with (what, bytes done, bytes in all), or with `counting` things instead of bytes, 0 in
    all if that is not known; None where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    amounts = (MofNCompleteColumn(), TimeRemainingColumn()) if counting else (
        DownloadColumn(), TransferSpeedColumn()
    )  # fmt: skip
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), *amounts)
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None, visible=False)

        def advance(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total or None, visible=True)

        yield advance
