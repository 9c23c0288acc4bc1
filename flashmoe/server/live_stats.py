"""What the server is doing right now, for the page at `/` and whoever asks for /v1/stats.

Who is resident changes while a step computes, so that is looked at between steps, in the computing thread;
any thread may ask for the last look. Knows nothing about HTTP.
"""

import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from flashmoe.weights import ExpertId
from storage import host

if TYPE_CHECKING:
    from flashmoe.api import LLM

# A look at 12,000 residents takes 4 ms (2 cores, others at work): 1.6 % of the time while somebody watches,
# else 0.2 %.
LOOK_EVERY_S = 0.25
UNWATCHED_S = 2.0
WATCHED_S = 5.0  # behind a question, before the next is no longer expected
STEPS = 120  # kept
RATE_S = 3.0  # of the last steps, for tokens a second


@dataclass(frozen=True, slots=True)
class Step:
    """One step of the batch: experts found and not found in memory, bytes read, tokens generated."""

    hits: int
    misses: int
    bytes: int
    tokens: int
    stall_s: float
    step_s: float


class LiveStats:
    """Looks at an LLM after its steps. Create it before the scheduler's thread starts."""

    def __init__(self, llm: "LLM", model: str | None = None) -> None:
        """`model`: the name to show; None: the model's type. Follows whoever has `after_step` already."""
        self._llm, self._model = llm, model or llm.config.model_type
        self._opened_s, self._asked_s = time.monotonic(), float("-inf")
        self._lock = threading.Lock()
        self._layers = [layer for layer, is_moe in enumerate(llm.config.moe_layers) if is_moe]
        self._steps: deque[tuple[float, Step]] = deque(maxlen=STEPS)  # when it ended, and what it did
        self._counters = llm.expert_cache.counters.snapshot()
        self._tokens = llm.scheduler.totals.generated_tokens
        self._follows, llm.scheduler.after_step = llm.scheduler.after_step, self.note_step
        self._look()

    def note_step(self) -> None:
        """A step has ended; called in the computing thread."""
        if self._follows is not None:
            self._follows()
        scheduler, now = self._llm.scheduler, time.perf_counter()
        counters, tokens = self._llm.expert_cache.counters.snapshot(), scheduler.totals.generated_tokens
        did, new = counters - self._counters, tokens - self._tokens
        step = Step(did.hits, did.misses, did.bytes_read, new, did.stall_s, now - scheduler.step_began_s)
        with self._lock:
            if step.hits or step.misses:  # not one that only saw somebody off
                self._steps.append((now, step))
            self._counters, self._tokens = counters, tokens
        pace_s = LOOK_EVERY_S if now - self._asked_s < WATCHED_S else UNWATCHED_S
        if now - self._looked_s >= pace_s or not scheduler.running:
            self._look()  # also when nobody is left: no step may come for hours

    def snapshot(self) -> dict[str, Any]:
        """All figures, as JSON can have them; from any thread.

        Rates: tokens a second over the last 3 s of steps, kept while nothing runs; the drive's over the last
        3 s of the clock; hits among the experts asked for in the last 120 steps.
        """
        llm, plan = self._llm, self._llm.plan
        self._asked_s = time.perf_counter()
        with self._lock:
            steps, counters, resident = list(self._steps), self._counters, self._resident
        recent = [step for _, step in steps]
        lately = [step for end, step in steps if end > time.perf_counter() - RATE_S]
        asked = sum(step.hits + step.misses for step in recent)
        totals = llm.scheduler.totals
        return {
            "model": self._model,
            "policy": llm.expert_cache.policy.name,
            "uptime_s": time.monotonic() - self._opened_s,
            "requests": {
                "running": llm.scheduler.running,
                "waiting": llm.scheduler.waiting,
                "queue_limit": llm.scheduler.most_waiting,
                "finished": totals.finished,
                "cancelled": totals.cancelled,
                "failed": totals.failed,
            },
            "tokens": {
                "prompt": totals.prompt_tokens,
                "cached": totals.cached_tokens,
                "generated": totals.generated_tokens,
                "per_s": _per_second((s.tokens for s in _last_seconds(recent)), _last_seconds(recent)),
            },
            "cache": {
                "tier": "RAM" if plan.vram is None else "VRAM",
                "layers": self._layers,
                "experts": llm.config.num_experts,
                "top_k": llm.config.num_experts_per_tok,
                "slots": llm.expert_cache.slots,
                "resident": resident,
                "hits": counters.hits,
                "misses": counters.misses,
                "hit_rate": sum(step.hits for step in recent) / asked if asked else 0.0,
                "recent": [asdict(step) for step in recent],
            },
            "drive": {
                "mb_per_s": _per_second((s.bytes for s in lately), lately) / 1e6,
                "probed_mb_per_s": llm.probed.read_mb_per_s,
                "bytes_read": counters.bytes_read,
                "stall_s": counters.stall_s,
            },
            "memory": {
                "rss_bytes": host.rss_bytes(),
                "peak_rss_bytes": host.peak_rss_bytes(),
                "ram_budget_bytes": plan.budget_bytes,
                "parts": _parts(llm),
            },
            "kv": {"tokens_used": llm.kv_pool.used_tokens, "tokens_total": llm.kv_pool.total_tokens},
        }

    def _look(self) -> None:
        resident = bitmaps(self._llm.expert_cache.resident, len(self._layers), self._llm.config.num_experts)
        with self._lock:
            self._resident, self._looked_s = resident, time.perf_counter()


def bitmaps(resident: Iterable[ExpertId], layers: int, experts: int) -> list[str]:
    """One hexadecimal number a layer, of as many digits as its experts need; expert 0 is the lowest bit."""
    keys = np.fromiter(chain.from_iterable(resident), np.intp).reshape(-1, 2)
    grid = np.zeros((layers, experts), bool)  # [layers, E]
    grid[keys[:, 0], keys[:, 1]] = True
    rows = np.packbits(grid, axis=1, bitorder="little")[:, ::-1]
    digits = (experts + 3) // 4
    return [row.tobytes().hex()[-digits:] for row in rows]


def _last_seconds(steps: Sequence[Step]) -> list[Step]:
    """The last steps that took RATE_S together, or the one that took longer."""
    kept: list[Step] = []
    spent = 0.0
    for step in reversed(steps):
        if spent >= RATE_S or (kept and spent + step.step_s > RATE_S):
            break
        kept.append(step)
        spent += step.step_s
    return kept


def _per_second(amounts: Iterable[int], steps: Sequence[Step]) -> float:
    spent = sum(step.step_s for step in steps)
    return sum(amounts) / spent if spent else 0.0


def _parts(llm: "LLM") -> list[list[str | int]]:
    """What the RAM budget was divided into, in bytes."""
    plan = llm.plan
    parts = {
        "process": plan.process_bytes,
        "dense weights": plan.dense_bytes,
        "KV cache": plan.kv_cache_bytes,
        "workspace": plan.workspace_bytes,
        "expert slots": plan.slots_bytes,
    }
    return [[name, nbytes] for name, nbytes in parts.items() if nbytes]
