"""From logits to the next token, and from text to the place where it must stop.

The steps and their order are those of transformers: repetition penalty, temperature, top-k, top-p, min-p,
draw. Knows nothing about the model or the tokenizer; end-of-text tokens are the engine's business. V:
vocabulary size.
"""

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flashmoe.errors import ConfigError, ModelError

Ids = NDArray[np.int64]
Floats = NDArray[np.float32]
Allowed = NDArray[np.bool_]

# A temperature below this is greedy: dividing by it would leave the range of float32.
_GREEDY_BELOW = 1e-5
_LARGEST_SEED = 2**63 - 1
MOST_LOGPROBS = 20

# generation_config.json's names for our options.
_FILE_NAMES = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_tokens": "max_new_tokens",
    "stop": "stop_strings",
}


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens and when to stop. Raises ConfigError for a value that makes no sense."""

    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0  # 1: off
    top_k: int = 0  # 0: off
    min_p: float = 0.0  # 0: off; a share of the likeliest token's probability
    repetition_penalty: float = 1.0  # 1: off
    frequency_penalty: float = 0.0  # 0: off; taken from a token's logit for each time it was generated
    presence_penalty: float = 0.0  # 0: off; taken once if it was generated at all
    logprobs: int | None = None  # report each token's log probability, and those of so many likeliest
    seed: int | None = None  # None: a different one for every sampler
    max_tokens: int | None = None  # None: until the model ends or the context is full
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_number("temperature", self.temperature, 0, 100)
        _check_number("top_p", self.top_p, 0, 1, above_lowest=True)
        _check_whole("top_k", self.top_k, 0)
        _check_number("min_p", self.min_p, 0, 1)
        _check_number("repetition_penalty", self.repetition_penalty, 0.01, 100)
        _check_number("frequency_penalty", self.frequency_penalty, -2, 2)
        _check_number("presence_penalty", self.presence_penalty, -2, 2)
        if self.logprobs is not None:
            _check_whole("logprobs", self.logprobs, 0)
            if self.logprobs > MOST_LOGPROBS:
                raise _bad("logprobs", self.logprobs, f"at most {MOST_LOGPROBS}")
        if self.seed is not None:
            _check_whole("seed", self.seed, 0)
        if self.max_tokens is not None:
            _check_whole("max_tokens", self.max_tokens, 1)
        if not isinstance(self.stop, tuple) or not all(isinstance(s, str) and s for s in self.stop):
            raise _bad("stop", self.stop, "a tuple of strings, none of them empty")

    @classmethod
    def from_generation_config(cls, config: Mapping[str, Any], **overrides: Any) -> "SamplingParams":
        """The model's own defaults with the user's `overrides`, of which None means not given.

        `config`: generation_config.json; what we do not know in it is ignored. `do_sample` false means
        greedy, and so does its absence unless the file gives a temperature. A bad value in the file is no
        error when it is overridden. `stop` may be one string or a list.
        """
        known = [field.name for field in fields(cls)]
        for name in overrides:
            if name not in known:
                raise ConfigError(f"unknown sampling option {name!r}; known are {', '.join(known)}")
        values = {ours: config.get(theirs) for ours, theirs in _FILE_NAMES.items()}
        do_sample = config.get("do_sample")
        if do_sample is False:
            values["temperature"] = 0.0
        elif do_sample is True and values["temperature"] is None:
            values["temperature"] = 1.0
        values |= {name: value for name, value in overrides.items() if value is not None}
        stop = values["stop"]
        if isinstance(stop, str | list):
            values["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
        return cls(**{name: value for name, value in values.items() if value is not None})


class Sampler:
    """Chooses tokens for one generation. The same parameters, seed and logits give the same tokens.

    Works in numpy on one thread: for one row of logits that is faster than torch, whose threads would also
    wait for each other on a busy machine.
    """

    def __init__(self, params: SamplingParams, vocab_size: int) -> None:
        self.params = params
        self._vocab_size = vocab_size
        self.seed = secrets.randbits(32) if params.seed is None else params.seed
        self._generator = torch.Generator().manual_seed(self.seed)

    def next_token(
        self, logits: Tensor, history: Sequence[int], prompt_tokens: int = 0, allowed: Allowed | None = None
    ) -> int:
        """Draw a token id; of equally likely ones, greedy takes the lowest.

        `logits` [V], any float dtype, not changed. `history`: ids of the prompt, which has `prompt_tokens`,
        and of what was generated. `allowed` [V]: the tokens that may be drawn, at least one; None: all.
        Raises ModelError for logits that are not numbers.
        """
        ids, probabilities = self.candidates(logits, history, prompt_tokens, allowed)
        if len(ids) == 1:
            return int(ids[0])
        cumulative = probabilities.cumsum(dtype=np.float64)
        draw = torch.rand((), dtype=torch.float64, generator=self._generator).item() * cumulative[-1]
        return int(ids[cumulative.searchsorted(draw, side="right")])  # right: never one of probability 0

    def candidates(
        self, logits: Tensor, history: Sequence[int], prompt_tokens: int = 0, allowed: Allowed | None = None
    ) -> tuple[Ids, Floats]:
        """The tokens that may be drawn: ids [N], ascending, and their probabilities [N], together 1.

        Arguments and errors as in `next_token`.
        """
        params = self.params
        with np.errstate(over="ignore"):  # masked logits may be the lowest float32, and become -inf here
            scores = self._penalized(_checked(logits, self._vocab_size), history, prompt_tokens)  # [V]
            if allowed is not None:
                scores = np.where(allowed, scores, np.float32(-np.inf))
            if params.temperature < _GREEDY_BELOW:
                return np.array([scores.argmax()]), np.ones(1, np.float32)
            if 0 < params.top_k < self._vocab_size:  # comes first, as temperature keeps the order
                ids = _top_k(scores, params.top_k)
                scores = scores[ids]
            else:
                ids = np.arange(self._vocab_size)
            probabilities = np.exp((scores - scores.max()) / np.float32(params.temperature))  # [N]
        probabilities /= probabilities.sum()
        if params.top_p < 1:
            kept = _top_p(probabilities, params.top_p)
            ids, probabilities = ids[kept], probabilities[kept]
        if params.min_p > 0:
            likely = probabilities >= params.min_p * probabilities.max()
            ids, probabilities = ids[likely], probabilities[likely]
        return ids, probabilities / probabilities.sum()

    def _penalized(self, logits: Floats, history: Sequence[int], prompt_tokens: int) -> Floats:
        """Make each token seen so far less likely, once however often it was seen (arXiv 1909.05858, 4.1);
        and each that was generated, as OpenAI's API defines frequency and presence penalties."""
        p = self.params
        generated = history[prompt_tokens:] if p.frequency_penalty or p.presence_penalty else ()
        if not history or (p.repetition_penalty == 1 and not generated):
            return logits
        scores = logits.copy()
        if p.repetition_penalty != 1:
            penalty, seen = np.float32(p.repetition_penalty), np.fromiter(history, np.int64, len(history))
            scores[seen] = np.where(logits[seen] < 0, logits[seen] * penalty, logits[seen] / penalty)
        if generated:
            ids, counts = np.unique(np.fromiter(generated, np.int64, len(generated)), return_counts=True)
            scores[ids] -= np.float32(p.frequency_penalty) * counts + np.float32(p.presence_penalty)
        return scores


def log_probabilities(logits: Tensor, most: int) -> tuple[Floats, Ids]:
    """Of logits [V], before penalties and temperature: log probabilities [V], and the ids of the `most`
    likeliest, the likeliest first. Raises ModelError for logits that are not numbers."""
    values = _checked(logits, len(logits)).astype(np.float64)
    values -= values.max()
    values -= np.log(np.exp(values).sum())
    top = np.argpartition(-values, most - 1)[:most] if most else np.zeros(0, np.int64)
    return values.astype(np.float32), top[np.lexsort((top, -values[top]))]


def _checked(logits: Tensor, vocab_size: int) -> Floats:
    if logits.shape != (vocab_size,):
        raise ModelError(f"logits of shape {tuple(logits.shape)} for a vocabulary of {vocab_size}")
    values: Floats = logits.detach().to("cpu", torch.float32).numpy()
    highest = values.max()  # nan if any is nan; -inf, for tokens ruled out, may be there
    if not math.isfinite(highest):
        raise ModelError(
            f"the model's logits are not numbers (the largest is {highest}): a damaged checkpoint or a"
            " broken kernel; check the files and try another back-end"
        )
    return values


def _top_k(scores: Floats, k: int) -> Ids:
    """Indices of the `k` highest scores and of those equal to the last of them, ascending."""
    return np.flatnonzero(scores >= np.partition(scores, -k)[-k])


def _top_p(probabilities: Floats, top_p: float) -> Ids:
    """Indices of the likeliest tokens, as few as reach `top_p` together, ascending; equals by index."""
    # All tokens below (1 - top_p) / N together stay below 1 - top_p, so none of them is kept: only the rest
    # needs sorting, which takes 15 ms for 150,000. Half of it, to be safe from rounding.
    likely = np.flatnonzero(probabilities >= (1 - top_p) / len(probabilities) / 2)
    order = likely[np.argsort(-probabilities[likely], kind="stable")]
    ordered = probabilities[order].astype(np.float64)
    before = ordered.cumsum() - ordered  # what the likelier ones reach without this one
    return np.sort(order[before < top_p])


class StopStrings:
    """Cuts streamed text at the first stop string, without ever letting a part of it out.

    The first is the one that ends first, so it does not matter how the text is cut into pieces.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self.stopped = False
        self._stop = tuple(stop)
        self._held = ""  # the longest end of the text that may be the beginning of a stop string

    def push(self, text: str) -> str:
        """The text that is safe to show now; nothing once stopped."""
        if self.stopped:
            return ""
        text = self._held + text
        found = [(text.find(stop) + len(stop), -len(stop)) for stop in self._stop if stop in text]
        if found:
            self.stopped, self._held = True, ""
            end, minus_length = min(found)
            return text[: end + minus_length]
        safe = self._safe_length(text)
        self._held = text[safe:]
        return text[:safe]

    def flush(self) -> str:
        """What was held back; call it at the end."""
        held, self._held = self._held, ""
        return held

    def _safe_length(self, text: str) -> int:
        longest = max(map(len, self._stop), default=1) - 1
        for start in range(max(0, len(text) - longest), len(text)):
            tail = text[start:]
            if any(stop.startswith(tail) for stop in self._stop):
                return start
        return len(text)


def _check_number(name: str, value: Any, lowest: float, highest: float, above_lowest: bool = False) -> None:
    """Refuse what is not a number from `lowest` (itself excluded if so asked) to `highest`."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not lowest <= value <= highest or (above_lowest and value == lowest):
        start = f"above {lowest}" if above_lowest else f"from {lowest}"
        raise _bad(name, value, f"a number {start} to {highest}")


def _check_whole(name: str, value: Any, lowest: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not lowest <= value <= _LARGEST_SEED:
        raise _bad(name, value, f"a whole number from {lowest}")


def _bad(name: str, value: Any, wanted: str) -> ConfigError:
    shown = repr(value)
    return ConfigError(f"{name} {shown if len(shown) <= 80 else shown[:77] + '...'} should be {wanted}")
