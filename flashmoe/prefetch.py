"""Prefetch: guess which experts the next layers will ask for, and read them while the drive is idle.

A `Predictor` names experts with its confidence; the `Prefetcher` asks the expert cache for those that are not
in memory, as many as the drive has time for. What is computed never changes: a guess only makes a miss come
early. `auto` measures whether guessing pays, in turns of a few tokens with and without, and says what it
found. Knows nothing about files or about who is evicted.
"""

import math
import statistics
import time
from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from flashmoe.expert_cache import ExpertCache

# Weight of the newest layer in the running means of idle time and reading time.
NEWEST = 0.05
# Guesses sent beyond those that the idle time is enough for: a right one that is late is partly read by then,
# a wrong one stops between pieces. Without it three times fewer guesses went out, and half the gain was lost.
BEYOND_IDLE = 1
# `auto`: tokens of one turn with or without guesses, turns of each kind before a verdict, tokens until the
# next trial, and the gain that is worth having.
TURN_TOKENS, TURNS, VERDICT_TOKENS, LEAST_GAIN = 8, 4, 512, 0.01
# 2 guesses a layer were as good as 4, and wasted less.
AUTO_GUESSES, MAX_STAGING = 2, 8


class Guess(NamedTuple):
    """An expert that a layer to come will ask for, with a confidence from 0 to 1."""

    layer: int
    expert: int
    confidence: float


class Predictor(Protocol):
    """Guesses the experts of layers that follow. Layers are the model's own."""

    def forward_begins(self, token_ids: Sequence[int]) -> None:
        """Tokens are about to run through the layers: one of them, or a prefill chunk."""

    def predict(self, layer: int, x: Tensor, routed: Sequence[int], scores: Sequence[float]) -> list[Guess]:
        """One token's event, observed: guesses, the surest first. x [1, D] is the residual stream that the
        layer's experts will be added to; `scores` [E] the router's probabilities. Neither may be kept."""


@runtime_checkable
class BatchPredictor(Protocol):
    """Guesses for several tokens at once; it keeps nothing of a sequence."""

    def predict_together(self, layer: int, x: Tensor) -> list[Guess]:
        """One step's event, x [T, D] as in `Predictor.predict`: guesses, the surest first."""


class Trial:
    """Whether something pays, by turns of tokens with and without it. A turn's first token is not counted:
    what the turn before left behind is in it."""

    def __init__(self) -> None:
        self.on = True
        self.gain: float | None = None  # of the last verdict: time saved, as a share
        self._seconds: dict[bool, list[float]] = {True: [], False: []}
        self._token, self._until_trial = 0, 0

    def token_took(self, seconds: float) -> None:
        if self._until_trial > 0:
            self._until_trial -= 1
            if self._until_trial == 0:
                self.on, self._token = True, 0
            return
        if self._token % TURN_TOKENS:
            self._seconds[self.on].append(seconds)
        self._token += 1
        if self._token == 2 * TURNS * TURN_TOKENS:
            with_it, without = (statistics.median(self._seconds[on]) for on in (True, False))
            self.gain = 1 - with_it / without
            self.on = self.gain > LEAST_GAIN
            self._seconds = {True: [], False: []}
            self._until_trial = VERDICT_TOKENS
        elif self._token % TURN_TOKENS == 0:
            self.on = not self.on


class PrefetchSwitch:
    """Whether to guess now, at most `at_most` experts a layer; `automatic`: a `Trial` decides."""

    def __init__(self, at_most: int, automatic: bool = False) -> None:
        self.at_most = at_most
        self.trial = Trial() if automatic else None
        self._token_began_s: float | None = None

    @property
    def is_on(self) -> bool:
        return self.trial is None or self.trial.on

    @property
    def verdict(self) -> str:
        """What is done, for people."""
        if self.trial is None:
            return f"at most {self.at_most} a layer"
        if self.trial.gain is None:
            return "auto, still measuring"
        return f"auto: {'on' if self.trial.on else 'off'}, time a token {-self.trial.gain:+.1%} with it"

    def forward_begins(self, token_ids: Sequence[int]) -> None:
        self._token_began_s = time.perf_counter() if len(token_ids) == 1 else None

    def forward_ends(self) -> None:
        """All layers have run."""
        if self.trial is not None and self._token_began_s is not None:
            self.trial.token_took(time.perf_counter() - self._token_began_s)


class Prefetcher(PrefetchSwitch):
    """Turns a predictor's guesses into reads."""

    def __init__(
        self, predictor: Predictor, at_most: int, automatic: bool = False, least_confidence: float = 0.0
    ) -> None:
        super().__init__(at_most, automatic)
        self.predictor, self.least_confidence = predictor, least_confidence
        self._clock = _IdleClock()

    def forward_begins(self, token_ids: Sequence[int]) -> None:
        super().forward_begins(token_ids)
        self.predictor.forward_begins(token_ids)
        self._clock.pause()

    def routed(
        self, cache: ExpertCache, layer: int, x: Tensor, routed: Sequence[int], scores: Sequence[float]
    ) -> None:
        """A layer's demand reads have been asked for: guess what follows."""
        if not self.is_on:
            return
        room = min(self.at_most, self._clock.reads_that_fit(cache))
        if room > 0:
            guesses = self.predictor.predict(layer, x, routed, scores)
            sure = [(g.layer, g.expert) for g in guesses if g.confidence >= self.least_confidence]
            cache.prefetch(sure, room)

    def routed_together(self, cache: ExpertCache, layer: int, x: Tensor) -> None:
        """As `routed`, for a step of several sequences. A prompt in the background has the idle drive."""
        if isinstance(self.predictor, BatchPredictor) and cache.in_wait is None:
            room = min(2 * self.at_most, self._clock.reads_that_fit(cache))
            if room > 0:
                cache.prefetch([(g.layer, g.expert) for g in self.predictor.predict_together(layer, x)], room)


class _IdleClock:
    """How many guesses are worth sending: what the drive could read, from one layer to the next, while no
    demand read needs it."""

    def __init__(self) -> None:
        self._then: tuple[float, float] | None = None
        self._idle_s = 0.0  # a layer

    def pause(self) -> None:
        """The time until the next layer is not a layer's."""
        self._then = None

    def reads_that_fit(self, cache: ExpertCache) -> int:
        now = time.perf_counter(), cache.demand_busy_s
        if self._then is not None:
            elapsed_s, busy_s = now[0] - self._then[0], now[1] - self._then[1]
            self._idle_s += NEWEST * (max(0.0, elapsed_s - busy_s) - self._idle_s)
        self._then = now
        read_s = cache.seconds_per_read
        return math.ceil(self._idle_s / read_s - 0.1) + BEYOND_IDLE if read_s > 0 else 0
