"""Compare policies and prefetch on a running model: the same conversations under each, in rounds, so that a
drive or a neighbour that gets slower does so for all of them.

A policy begins every round with empty slots and no knowledge. Answers are greedy, and must be the same tokens
under every policy. Prints nothing.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from flashmoe.api import LLM
from flashmoe.bench import BenchResult, Repetition
from flashmoe.documents import Document, in_turn
from flashmoe.errors import ConfigError, ContextError, FlashMoEError
from flashmoe.expert_slots import CacheCounters
from storage import host

COLUMNS = ("policy", "t/s", "min–max", "hit rate", "MB/token", "MB/s", "stall", "bound t/s", "of bound")
_FIGURES = ("tokens_per_s", "hit_rate", "mb_per_token", "stall_share", "read_mb_per_s", "bound_tokens_per_s",
            "share_of_bound")  # fmt: skip


class Contender(NamedTuple):
    """A policy, and how many guesses are read ahead under it: "off", "auto" or a number."""

    policy: str
    prefetch: str

    def __str__(self) -> str:
        return self.policy if self.prefetch == "off" else f"{self.policy}, prefetch {self.prefetch}"


@dataclass(frozen=True, slots=True)
class LiveOptions:
    """`answer_tokens`: at most, for each turn. `max_tokens`: of one contender in one round, None: no end."""

    answer_tokens: int
    max_tokens: int | None
    repeat: int


@dataclass(frozen=True, slots=True)
class LiveComparison:
    """One result a contender, its rounds as repetitions. All figures are of decoding."""

    results: dict[Contender, BenchResult]
    prompts: int
    tokens: int  # of one round
    too_long: int  # conversations that ended where the context did

    def table(self) -> list[tuple[str, ...]]:
        return [COLUMNS, *map(_cells, self.results.values())]

    def as_dict(self) -> dict[str, Any]:
        """For programs: a row a contender, medians with the least and most of the speed, and every round."""
        return {
            "rows": [_row(contender, result) for contender, result in self.results.items()],
            "prompts": self.prompts,
            "tokens": self.tokens,
            "identical_tokens": True,  # or there would have been an error
            "peak_rss_bytes": host.peak_rss_bytes(),
        }


def compare_live(
    llm: LLM,
    documents: Sequence[Document],
    contenders: Sequence[Contender],
    options: LiveOptions,
    progress: Callable[[str], None] = lambda what: None,
) -> LiveComparison:
    """Answer the conversations of `documents`, categories in turn, under each contender, `repeat` times.

    Raises ConfigError for an unknown policy or prompts that decode nothing, FlashMoEError if the tokens of
    two contenders differ.
    """
    chats = list(in_turn((d.dataset, d.turns or (d.text,)) for d in documents))
    contenders = list(dict.fromkeys(contenders))
    rounds: dict[Contender, list[Repetition]] = {contender: [] for contender in contenders}
    expected: _Answers | None = None
    for number in range(options.repeat):
        # Who begins changes: whatever follows a pause or the first reads of a file is nobody's habit.
        begin = number % len(contenders)
        for contender in contenders[begin:] + contenders[:begin]:
            progress(f"{contender}, round {number + 1} of {options.repeat}")
            llm.use_policy(contender.policy, contender.prefetch)
            answers = _answer(llm, chats, options)
            rounds[contender].append(answers.repetition(llm.probed.read_mb_per_s))
            if expected is not None and answers.token_ids != expected.token_ids:
                raise FlashMoEError(
                    f"under {contender} the model gave other tokens than under {contenders[0]}: neither"
                    " policy nor prefetch may ever change them; please report this"
                )
            expected = expected or answers
    assert expected is not None
    results = {each: BenchResult(str(each), tuple(repetitions)) for each, repetitions in rounds.items()}
    tokens = sum(map(len, expected.token_ids))
    return LiveComparison(results, len(expected.token_ids), tokens, expected.too_long)


class _Answers:
    """What one contender did in one round: ids of each conversation, and what its decode steps took."""

    def __init__(self) -> None:
        self.token_ids: list[list[int]] = []
        self.too_long = 0
        self._steps, self._seconds, self._spent = 0, 0.0, CacheCounters()

    def add(self, steps: int, seconds: float, spent: CacheCounters) -> None:
        self._steps += steps
        self._seconds += seconds
        sums = (getattr(self._spent, f.name) + getattr(spent, f.name) for f in fields(self._spent))
        self._spent = CacheCounters(*sums)

    def repetition(self, drive_mb_per_s: float) -> Repetition:
        if not self._steps:
            raise ConfigError("nothing was decoded: every answer ended at its first token; try other prompts")
        s = self._spent
        return Repetition(
            self._steps, self._seconds, s.hits, s.misses, s.bytes_read, s.stall_s, s.read_s, drive_mb_per_s
        )


def _answer(llm: LLM, chats: Iterable[tuple[str, Sequence[str]]], options: LiveOptions) -> _Answers:
    answers, left = _Answers(), options.max_tokens
    for _, turns in chats:
        if left is not None and left <= 0:
            break
        llm.reset()
        chat = llm.chat(temperature=0.0)
        ids: list[int] = []
        answers.token_ids.append(ids)
        try:
            for turn in turns:
                limit = options.answer_tokens if left is None else min(options.answer_tokens, left)
                if limit <= 0:
                    break
                _stream(llm, chat.stream(turn, max_tokens=limit), answers)
                ids += chat.stats.token_ids
                left = None if left is None else left - len(chat.stats.token_ids)
        except ContextError:
            answers.too_long += 1
    return answers


def _stream(llm: LLM, pieces: Iterable[object], answers: _Answers) -> None:
    """Run one answer; what comes before its first token is prefill, and not counted."""
    counters = llm.expert_cache.counters
    begin, before, steps = 0.0, counters.snapshot(), -1
    for _ in pieces:
        steps += 1
        if not steps:
            begin, before = time.perf_counter(), counters.snapshot()
    if steps > 0:
        answers.add(steps, time.perf_counter() - begin, counters - before)


def _cells(result: BenchResult) -> tuple[str, ...]:
    least, most = result.spread("tokens_per_s")
    return (
        result.name,
        f"{result.median('tokens_per_s'):.2f}",
        f"{least:.2f}–{most:.2f}",
        f"{result.median('hit_rate'):.1%}",
        f"{result.median('mb_per_token'):.2f}",
        f"{result.median('read_mb_per_s'):.0f}",
        f"{result.median('stall_share'):.0%}",
        f"{result.median('bound_tokens_per_s'):.2f}",
        f"{result.median('share_of_bound'):.0%}",
    )


def _row(contender: Contender, result: BenchResult) -> dict[str, Any]:
    least, most = result.spread("tokens_per_s")
    return {
        "policy": contender.policy,
        "prefetch": contender.prefetch,
        **{figure: result.median(figure) for figure in _FIGURES},
        "least_tokens_per_s": least,
        "most_tokens_per_s": most,
        "rounds": [repetition.as_dict() for repetition in result.repetitions],
    }
