"""The same function for many arguments, in processes of their own."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from flashmoe.errors import FlashMoEError


def run_side_by_side(
    function: Callable[..., Any],
    cells: Sequence[tuple[Any, ...]],
    jobs: int,
    done: Callable[[int, Any], None],
) -> None:
    """`done(number, function(*cells[number]))` for each cell, whoever finishes first; begun in their order.

    Raises what `function` raises, and FlashMoEError when a process is killed.
    """
    # "spawn" everywhere: forking a process that has threads is a way to hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, _leave_quietly_on_interrupt) as pool:
        futures = {pool.submit(function, *cell): number for number, cell in enumerate(cells)}
        try:
            for future in as_completed(futures):
                done(futures[future], future.result())
        except BrokenProcessPool as error:
            raise FlashMoEError("a process was killed, for want of memory perhaps; try --jobs 1") from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def run_in_order(
    function: Callable[..., Any],
    cells: Sequence[tuple[Any, ...]],
    jobs: int | None,
    progress: Callable[[str, int, int], None] | None = None,
    what: str = "",
) -> list[Any]:
    """[function(*cell)], in order, in as many processes as there are cores."""
    jobs = min(jobs or os.cpu_count() or 1, len(cells))
    results: dict[int, Any] = {}

    def done(number: int, result: Any) -> None:
        results[number] = result
        if progress is not None:
            progress(what, len(results), len(cells))

    if jobs == 1:
        for number, cell in enumerate(cells):
            done(number, function(*cell))
    else:
        run_side_by_side(function, cells, jobs, done)
    return [results[number] for number in range(len(cells))]


def _leave_quietly_on_interrupt() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
