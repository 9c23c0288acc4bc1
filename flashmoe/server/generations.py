"""From the event loop to the computing thread and back: submitting, and the answers' pieces as they come."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

from flashmoe.api import LLM
from flashmoe.generation import Constraint, GenerationRequest, Piece
from flashmoe.sampler import SamplingParams
from flashmoe.server.errors import ApiError, api_error
from flashmoe.server.metrics import Metrics
from flashmoe.stats import GenerationStats


class SlowReaderError(Exception):
    """More of an answer waits than a reader may leave unread."""


@dataclass(frozen=True, slots=True)
class Job:
    """One generation to be. `ended` is called in the event loop with its figures."""

    prompt: Sequence[int]
    params: SamplingParams
    constraint: Constraint | None = None
    ended: Callable[[GenerationStats], None] | None = None


class Answers:
    """The generations of one request. Belongs to the event loop it was made in."""

    def __init__(self, metrics: Metrics, most_unread: int) -> None:
        self.stats: list[GenerationStats] = []
        self._loop, self._metrics, self._most_unread = asyncio.get_running_loop(), metrics, most_unread
        self._requests: list[GenerationRequest] = []
        self._arrived: deque[tuple[int, Piece]] = deque()
        self._some = asyncio.Event()
        self._cancelled = self._overran = False
        self._begin_s = time.perf_counter()

    def submit(self, llm: LLM, jobs: Sequence[Job]) -> None:
        """All or none; from any thread. Raises what the scheduler raises."""
        try:
            for index, job in enumerate(jobs):
                stats = GenerationStats()
                sink = self._sink(index, stats, job.ended)
                self._requests.append(
                    llm.scheduler.submit(job.prompt, job.params, sink, stats, job.constraint)
                )
                self.stats.append(stats)
        except BaseException:
            self.cancel()
            raise
        if self._cancelled:  # meanwhile
            self.cancel()

    def cancel(self) -> None:
        """Nobody wants the rest. Safe to call at any time."""
        self._cancelled = True
        for request in self._requests:
            request.cancel()

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """(number of the generation, piece) until all have ended. A piece that is an error is raised as
        ApiError, and the others are cancelled."""
        running = len(self._requests)
        while running:
            while not self._arrived:
                self._some.clear()
                await self._some.wait()
            if self._overran:
                raise SlowReaderError
            index, piece = self._arrived.popleft()
            if piece.error is not None:
                self.cancel()
                raise api_error(piece.error)
            if piece.finish_reason == "cancelled":  # by us: who asked for it is still there
                raise ApiError(503, "the server is stopping; try again later", headers={"Retry-After": "30"})
            yield index, piece
            running -= piece.finish_reason is not None

    def _sink(
        self, index: int, stats: GenerationStats, ended: Callable[[GenerationStats], None] | None
    ) -> Callable[[Piece], None]:
        last_s, tokens = self._begin_s, 0

        def take(piece: Piece) -> None:  # in the computing thread
            nonlocal last_s, tokens
            if piece.token_id is not None:
                now = time.perf_counter()
                self._metrics.token(now - last_s, first=not tokens)
                last_s, tokens = now, tokens + 1
            try:
                self._loop.call_soon_threadsafe(self._arrive, index, piece, stats, ended)
            except RuntimeError:  # the loop is closed: the server has gone
                self.cancel()

        return take

    def _arrive(
        self, index: int, piece: Piece, stats: GenerationStats,
        ended: Callable[[GenerationStats], None] | None,
    ) -> None:  # fmt: skip
        if len(self._arrived) >= self._most_unread * max(1, len(self._requests)):
            self._overran = True
            self._arrived.clear()
            self.cancel()
        self._arrived.append((index, piece))
        self._some.set()
        if piece.finish_reason is not None:
            self._metrics.finished(stats, piece.finish_reason)
            if ended is not None:
                ended(stats)
