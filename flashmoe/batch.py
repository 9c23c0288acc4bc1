"""Requests as the scheduler holds them, and which of a prompt's tokens come next."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flashmoe.generation import GenerationRequest
from flashmoe.recorder import Recorder


@dataclass(eq=False, slots=True)
class Waiting:
    """A request that has no keys and values; `has_run`: it had some, and gave them up for others."""

    request: GenerationRequest
    recorder: Recorder
    has_run: bool = False


@dataclass(eq=False, slots=True)
class Running:
    """A request with keys and values of its tokens so far, or of some of them."""

    request: GenerationRequest
    recorder: Recorder
    kv_cache: Any  # what the pool gave

    @property
    def missing(self) -> int:
        """How many of its tokens are not in the KV cache yet."""
        known: int = self.kv_cache.length
        return len(self.request.tokens) - known

    @property
    def pending(self) -> list[int]:
        """Those tokens."""
        return self.request.tokens[self.kv_cache.length :]

    @property
    def is_decoding(self) -> bool:
        return self.missing == 1 and self.request.generated > 0


@dataclass(slots=True)
class Totals:
    """What a scheduler has done so far."""

    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    preempted: int = 0  # requests that gave their KV cache up for others, and ran again


def next_tokens(prompts: Sequence[Running], most: int) -> list[tuple[Running, list[int]]]:
    """The next tokens of prompts, `most` in all.

    The oldest has half of them, so that it comes to an end; then the shortest go first, so that none waits
    for a long one.
    """
    counts = {running: 0 for running in prompts}

    def give(running: Running, at_most: int) -> None:
        room = most - sum(counts.values())
        counts[running] += max(0, min(at_most, running.missing - counts[running], room))

    if prompts:
        give(prompts[0], most // 2 if len(prompts) > 1 else most)
    for running in sorted(prompts, key=lambda running: running.missing):
        give(running, most)
    return [(running, running.pending[:count]) for running, count in counts.items() if count]
