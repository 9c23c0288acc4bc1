"""The same function for many arguments, in processes of their own."""

import multiprocessing
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


def _leave_quietly_on_interrupt() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
