"""Fills a generation's figures from clocks and cache counters while tokens come."""

import time
from collections.abc import Callable

from flashmoe.expert_slots import CacheCounters
from flashmoe.stats import GenerationStats, TokenStats
from storage import host


class Recorder:
    """One generation's. Hits, misses, bytes and stalls are those of all steps from its first to its last:
    whose they are cannot be told apart."""

    def __init__(
        self, stats: GenerationStats, counters: Callable[[], CacheCounters],
        finish: Callable[[GenerationStats], None],
    ) -> None:  # fmt: skip
        """`counters`: the cache's, now. `finish` adds what only the whole knows: policy, prefetch."""
        self._stats, self._counters, self._finish = stats, counters, finish
        self._submitted = self._begin = self._step_begin = time.perf_counter()
        self._start: CacheCounters | None = None
        self._step_start = counters().snapshot()

    def starts(self) -> None:
        """It waits no longer."""
        self._begin = time.perf_counter()
        self._start = self._counters().snapshot()

    def step_begins(self) -> None:
        self._step_begin = time.perf_counter()
        self._step_start = self._counters().snapshot()

    def token(self, token_id: int, text: str) -> None:
        """Account for the step that produced `token_id`; the first one is prefill."""
        s, now = self._stats, time.perf_counter()
        spent = now - self._step_begin
        step = self._counters() - self._step_start
        if not s.token_ids:
            s.prefill_s, s.time_to_first_token_s = now - self._begin, now - self._submitted
        else:
            s.decode_steps += 1
            s.decode_s += spent
            s.decode_hits += step.hits
            s.decode_misses += step.misses
            s.decode_bytes_read += step.bytes_read
            s.decode_stall_s += step.stall_s
        s.token_ids.append(token_id)
        s.decode_tokens = len(s.token_ids)
        s.text += text
        s.tokens.append(
            TokenStats(token_id, text, spent, step.stall_s, step.hits, step.misses, step.bytes_read)
        )

    def finish(self) -> None:
        """The generation is over."""
        self._finish(self._stats)
        s, now = self._stats, self._counters()
        total = now - (self._start or now)
        s.hits, s.misses, s.expert_bytes_read = total.hits, total.misses, total.bytes_read
        s.stall_s, s.read_s = total.stall_s, total.read_s
        s.prefetch_issued, s.prefetch_hits, s.prefetch_late = (
            total.prefetch_issued, total.prefetch_hits, total.prefetch_late,
        )  # fmt: skip
        s.prefetch_wasted, s.prefetch_cancelled = total.prefetch_wasted, total.prefetch_cancelled
        s.prefetch_failed, s.prefetch_bytes_wasted = total.prefetch_failed, total.prefetch_bytes_wasted
        s.rss_bytes, s.peak_rss_bytes = host.rss_bytes(), host.peak_rss_bytes()
