"""Record a routing trace: run texts and conversations through a model while a `TraceRecorder` looks on.

A text is teacher-forced, every token alone, since that is how a model decodes and what a policy is there for;
or in prefill chunks. A conversation is answered greedily. Prints nothing.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flashmoe
from flashmoe.api import LLM
from flashmoe.documents import Document, in_turn
from flashmoe.errors import ContextError
from flashmoe.tokenizer import Tokenizer
from flashmoe.trace import TraceRecorder

DEFAULT_SEQUENCE, DEFAULT_ANSWER = 512, 128  # tokens
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class RecordOptions:
    """`max_tokens` in all, None: everything. `sequence_tokens`: a text is cut into sequences so long, each
    with a KV cache of its own. `answer_tokens`: at most, for each turn of a conversation."""

    max_tokens: int | None = None
    sequence_tokens: int = DEFAULT_SEQUENCE
    answer_tokens: int = DEFAULT_ANSWER
    prefill: bool = False  # texts in chunks instead of token by token


@dataclass(slots=True)
class Recorded:
    """What came of it. `too_long`: conversations that ended where the context did."""

    sequences: int = 0
    too_long: int = 0


def recorder_for(llm: LLM, name: str, spool_folder: Path | None = None) -> TraceRecorder:
    """A recorder for this model; the file will say what it was recorded from."""
    c = llm.config
    meta: dict[str, Any] = {
        "flashmoe": flashmoe.__version__,
        "model": name,
        "model_type": c.model_type,
        "top_k": c.num_experts_per_tok,
        "policy": llm.expert_cache.policy.name,
        "slots": llm.plan.slots,
        "scope": llm.run_config.scope,
        "prefetch": llm.run_config.prefetch,
    }
    return TraceRecorder(c.num_moe_layers, c.num_experts, c.num_experts_per_tok, meta, spool_folder)


def record(
    llm: LLM,
    documents: Sequence[Document],
    options: RecordOptions,
    recorder: TraceRecorder,
    progress: Progress | None = None,
) -> Recorded:
    """Run `documents`, the data sets in turn, until there are `max_tokens`.

    An exception, Ctrl-C included, leaves in `recorder` what has run. Raises what running a model raises.
    """
    texts = [document for document in documents if not document.turns]
    chats = [(document.dataset, document.turns) for document in documents if document.turns]
    run = _Run(llm, options, recorder, progress)
    llm.engine.decoder.observer = recorder
    try:
        for dataset, tokens in windows(llm.tokenizer, texts, options.sequence_tokens):
            if run.is_done:
                break
            run.text(dataset, tokens)
        for dataset, turns in in_turn(chats):
            if run.is_done:
                break
            run.conversation(dataset, turns)
    finally:
        llm.engine.decoder.observer = None
    return run.recorded


def windows(
    tokenizer: Tokenizer, texts: Sequence[Document], sequence_tokens: int
) -> Iterator[tuple[str, list[int]]]:
    """(data set, token ids) of all texts, cut to length: the data sets in turn, and of each the beginnings of
    all its texts before any goes on. Every one begins as the model expects a text to begin."""
    begin = tokenizer.encode("", add_special_tokens=True)[: sequence_tokens - 1]
    body = sequence_tokens - len(begin)
    waiting: dict[str, deque[str | list[int]]] = {}
    for text in texts:
        waiting.setdefault(text.dataset, deque()).append(text.text)
    while waiting:
        for dataset in list(waiting):
            first = waiting[dataset].popleft()
            ids = tokenizer.encode(first) if isinstance(first, str) else first
            if len(ids) > body:
                waiting[dataset].append(ids[body:])
            if ids:
                yield dataset, begin + ids[:body]
            if not waiting[dataset]:
                del waiting[dataset]


class _Run:
    def __init__(
        self, llm: LLM, options: RecordOptions, recorder: TraceRecorder, progress: Progress | None
    ) -> None:
        self._llm, self._options, self._recorder, self._progress = llm, options, recorder, progress
        self.recorded = Recorded()

    @property
    def is_done(self) -> bool:
        limit = self._options.max_tokens
        return limit is not None and len(self._recorder) >= limit

    def text(self, dataset: str, tokens: list[int]) -> None:
        engine, limit = self._llm.engine, self._options.max_tokens
        if limit is not None:
            tokens = tokens[: limit - len(self._recorder)]
        self._begin(dataset)
        engine.reuse(tokens)  # checks the ids and the length
        if self._options.prefill:
            engine.prefill(tokens)
            self._advance()
            return
        for token in tokens:
            engine.decode_one_token(token)
            self._advance()

    def conversation(self, dataset: str, turns: Sequence[str]) -> None:
        self._begin(dataset)
        chat = self._llm.chat(temperature=0.0, max_tokens=self._options.answer_tokens)
        try:
            for turn in turns:
                for _ in chat.stream(turn, cancel=lambda: self.is_done):
                    self._advance()
                if chat.stats.finish_reason == "cancelled":
                    break
        except ContextError:
            self.recorded.too_long += 1

    def _begin(self, dataset: str) -> None:
        self._llm.reset()  # a prefix that is in the KV cache would not run, and not be seen
        self._recorder.begin_sequence(dataset)
        self.recorded.sequences += 1

    def _advance(self) -> None:
        if self._progress is not None:
            self._progress("recording", len(self._recorder), self._options.max_tokens or 0)
