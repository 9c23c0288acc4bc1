"""The prompts that run beside those that decode: one chunk at a time, and how much of their time it may take.

On the CPU a chunk is cut into pieces; on a GPU it is not, and then it is its turn that is rationed.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from flashmoe.background_prefill import BackgroundPrefill
from flashmoe.batch import Running
from flashmoe.decoder import Stretch

# A step may take so much longer with a prompt beside it, and a prompt always gets so much of one.
SLOWDOWN, LEAST_SLICE = 1.3, 0.05
NEWEST = 0.2  # weight of the newest step in the running mean of how long one takes
FINISHING_S = 0.5  # of work on a chunk, nobody decoding, before anything else is looked at


class PromptLane:
    """One chunk of prompts. `members` are the requests whose tokens are in it."""

    def __init__(self, background: BackgroundPrefill) -> None:
        self.background = background
        self.members: list[Running] = []
        self._left_behind: list[Any] = []  # KV caches of requests that are gone, which the chunk still uses
        self._alone_s: dict[int, float] = {}  # time of a step, by the number of requests that decode

    @property
    def is_active(self) -> bool:
        return self.background.is_active

    @property
    def is_done(self) -> bool:
        return self.background.is_done

    def begin(self, work: list[tuple[Running, list[int]]]) -> None:
        """Start a chunk."""
        self.members = [running for running, _ in work]
        for running in self.members:
            running.recorder.step_begins()
        self.background.begin([Stretch(running.kv_cache, tokens) for running, tokens in work])

    def leaves(self, running: Running) -> bool:
        """A member's request has ended: True if the chunk goes on using its keys and values."""
        if running not in self.members:
            return False
        self._left_behind.append(running.kv_cache)
        return True

    def note_step(self, decoding: int, seconds: float) -> None:
        """A step took so long with no chunk beside it."""
        before = self._alone_s.get(decoding, seconds)
        self._alone_s[decoding] = before + NEWEST * (seconds - before)

    def run_beside(self, decoding: int, step: Callable[[], float]) -> None:
        """A step of those that decode, which returns its seconds: the chunk has its waits, and a slice
        behind it."""
        self.background.hurry(False)
        with self.background.in_waits():
            seconds = step()
        alone_s = self._alone_s.get(decoding, seconds / SLOWDOWN)
        self.background.run_for(max(LEAST_SLICE * alone_s, SLOWDOWN * alone_s - seconds))

    def run_alone(self, check: Callable[[], None]) -> None:
        """Nobody decodes: the drive and the processor are the chunk's. `check` may raise to stop."""
        self.background.hurry(True)
        self.background.run_for(FINISHING_S, check)

    def end(self) -> tuple[list[Running], Tensor | None, Exception | None, list[Any]]:
        """Through, failed or given up -> (members, logits [B, V] of each one's last token if through, error,
        KV caches that nobody uses any more)."""
        background, members, free = self.background, self.members, self._left_behind
        background.end()
        self.members, self._left_behind = [], []
        return members, background.result, background.error, free


class ChunkPace:
    """When a whole chunk may run between two steps of those that decode: when they have had their time."""

    def __init__(self) -> None:
        self._owed_s = 0.0  # of the time that chunks took, what those that decode have not had yet

    @property
    def is_due(self) -> bool:
        return self._owed_s <= 0

    def chunk_ran(self, seconds: float, decoding: int, prompts: int) -> None:
        """Those that decode get so much time now that chunks have their share: what a step may be longer with
        a prompt beside it, or the prompts' share of all, whichever is more."""
        share = max(1 - 1 / SLOWDOWN, prompts / (prompts + decoding))
        self._owed_s = seconds * (1 - share) / share

    def step_ran(self, seconds: float) -> None:
        self._owed_s -= seconds
