"""One generation: from logits to tokens, text and the reason to stop, whoever computes the logits.

Knows the tokenizer and the sampler, neither model nor cache; the scheduler decides when a request runs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from flashmoe.sampler import Allowed, Sampler, SamplingParams, StopStrings, log_probabilities
from flashmoe.stats import GenerationStats
from flashmoe.tokenizer import StreamDecoder, Tokenizer


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's log probability before penalties and temperature, and those of the likeliest, as (id, log
    probability)."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """A bit of an answer. `text` may be empty while a character or a stop string is incomplete.

    `finish_reason` is set on the last piece: "stop", "length" (max_tokens), "context" (the context is full),
    "cancelled" or "error", and then `error` says which. `logprob` is there if it was asked for.
    """

    text: str
    token_id: int | None = None
    finish_reason: str | None = None
    logprob: TokenLogprob | None = None
    error: Exception | None = None


@dataclass(frozen=True, slots=True)
class Generation:
    """A finished answer."""

    text: str
    token_ids: list[int]
    finish_reason: str
    stats: GenerationStats

    @classmethod
    def of(cls, stats: GenerationStats) -> "Generation":
        """What a generation that has ended left behind."""
        return cls(stats.text, stats.token_ids, stats.finish_reason or "stop", stats)


class Constraint(Protocol):
    """What a generation may say: a JSON schema, a grammar. One object a generation."""

    def allowed(self) -> Allowed | None:
        """The tokens that may come now, [V]; None: all of them."""

    def accept(self, token_id: int) -> None:
        """A token was chosen."""

    @property
    def is_complete(self) -> bool:
        """Nothing more may come: the answer ends here."""


class GenerationRequest:
    """A generation under way. `sink` is called with each piece, in the thread that computes; it must be quick
    and must not raise.

    `tokens` are the prompt's and those generated so far.
    """

    def __init__(
        self, number: int, prompt: Sequence[int], params: SamplingParams, tokenizer: Tokenizer,
        vocab_size: int, context: int, sink: Callable[[Piece], None], stats: GenerationStats,
        constraint: Constraint | None = None, cancelled: Callable[[], bool] | None = None,
    ) -> None:  # fmt: skip
        self.number, self.params, self.stats = number, params, stats
        self.tokens, self.prompt_tokens = list(prompt), len(prompt)
        self._sampler = Sampler(params, vocab_size)
        self._text, self._stops = StreamDecoder(tokenizer), StopStrings(params.stop)
        self._eos_token_ids, self._context = tokenizer.eos_token_ids, context
        self._sink, self._constraint, self._asked = sink, constraint, cancelled
        self._cancelled = False
        stats.prompt_tokens = len(prompt)

    def cancel(self) -> None:
        """Stop as soon as may be; from any thread. The last piece says "cancelled"."""
        self._cancelled = True

    @property
    def is_cancelled(self) -> bool:
        """Whether `cancel` was called, or `poll` found that it should be."""
        return self._cancelled

    def poll(self) -> bool:
        """Ask whoever may want it cancelled -> whether it is."""
        if not self._cancelled and self._asked is not None and self._asked():
            self._cancelled = True
        return self._cancelled

    @property
    def is_finished(self) -> bool:
        return self.stats.finish_reason is not None

    @property
    def generated(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - self.prompt_tokens

    def deliver(self, piece: Piece) -> None:
        """Give a piece to whoever asked."""
        self._sink(piece)

    def take(self, logits: Tensor, record: Callable[[int, str], None]) -> Piece:
        """Choose the next token from logits [V]; `record(token, text)` is told.

        Raises ModelError for logits that are not numbers, and what the constraint raises.
        """
        allowed = self._constraint.allowed() if self._constraint is not None else None
        token = self._sampler.next_token(logits, self.tokens, self.prompt_tokens, allowed)
        logprob = self._logprob(logits, token)
        self.tokens.append(token)
        if self._constraint is not None:
            self._constraint.accept(token)
        ended = token in self._eos_token_ids
        text = self._stops.push("" if ended else self._text.push(token))
        complete = self._constraint is not None and self._constraint.is_complete
        reason = self._finish_reason(ended or complete or self._stops.stopped)
        if reason is not None:
            text += self._rest()
        record(token, text)
        self.stats.finish_reason = reason
        return Piece(text, token, reason, logprob)

    def end(self, reason: str, error: Exception | None = None) -> Piece:
        """End it from outside: "cancelled" or "error"."""
        rest = self._rest()
        self.stats.text += rest
        self.stats.finish_reason = reason
        return Piece(rest, None, reason, None, error)

    def _rest(self) -> str:
        return self._stops.push(self._text.finish()) + self._stops.flush()

    def _finish_reason(self, stopped: bool) -> str | None:
        if stopped:
            return "stop"
        if self.params.max_tokens is not None and self.generated >= self.params.max_tokens:
            return "length"
        return "context" if len(self.tokens) > self._context else None

    def _logprob(self, logits: Tensor, token: int) -> TokenLogprob | None:
        if self.params.logprobs is None:
            return None
        values, top = log_probabilities(logits, min(self.params.logprobs, len(logits)))
        return TokenLogprob(token, float(values[token]), tuple((int(i), float(values[i])) for i in top))
