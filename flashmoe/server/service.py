"""What the endpoints share: the LLM once it is loaded, threads that prepare requests, limits, figures."""

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar
from weakref import WeakSet

import flashmoe
from flashmoe.api import LLM
from flashmoe.constraints import Grammars
from flashmoe.sampler import SamplingParams
from flashmoe.server.conversation_ids import ConversationIds
from flashmoe.server.errors import ApiError
from flashmoe.server.generations import Answers, Job
from flashmoe.server.limits import CHARACTERS_PER_TOKEN, Limits
from flashmoe.server.live_stats import LiveStats
from flashmoe.server.metrics import Metrics
from flashmoe.server.schemas import Sampling
from flashmoe.stats import GenerationStats

T = TypeVar("T")
COUNTED_CHARACTERS = 50_000  # at a time: 0.05 s, and 50 MB if each is worth several tokens
MOST_CUT_TOKENS = 64  # more than it has whole: what a text cut in a word may have
FINGERPRINT = f"flashmoe-{flashmoe.__version__}"
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "frequency_penalty",
            "presence_penalty", "seed", "stop")  # fmt: skip


class Opened:
    """A loaded LLM with what requests to it need."""

    def __init__(self, llm: LLM, model_name: str) -> None:
        self.llm = llm
        self.context = llm.engine.context
        self.grammars = Grammars(llm.tokenizer, llm.engine.vocab_size)
        self.chats = ConversationIds(llm.tokenizer, not llm.tokenizer.has_chat_template)
        self.live = LiveStats(llm, model_name)
        self.created = int(time.time())


class Service:
    """One server's state. `open` it with an LLM when that is loaded; until then requests get 503."""

    def __init__(self, model_name: str, limits: Limits | None = None) -> None:
        self.model_name, self.limits = model_name, limits or Limits()
        self.metrics = Metrics()
        self._opened: Opened | None = None
        self._answers: WeakSet[Answers] = WeakSet()
        # Two: tokenising and compiling grammars should not take all cores from the model.
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="prepare")

    @property
    def state(self) -> str:
        """"ok", or why nothing is answered."""
        if self._opened is None:
            return "loading model"
        if not getattr(self._opened.llm.scheduler, "is_alive", True):
            return "the computing thread has died; restart the server"
        return "ok"

    @property
    def opened(self) -> Opened:
        if self._opened is None:
            raise ApiError(503, "the model is still loading; try again later", headers={"Retry-After": "5"})
        return self._opened

    def open(self, llm: LLM, most_waiting: int | None = None) -> None:
        """Serve `llm` from now on; its scheduler gets a thread of its own."""
        if most_waiting is not None:
            llm.scheduler.most_waiting = most_waiting
        opened = Opened(llm, self.model_name)
        self.metrics.watch(llm)
        llm.scheduler.start()
        self._opened = opened

    def cancel_all(self) -> None:
        """End what runs; clients are told that we stop."""
        for answers in list(self._answers):
            answers.cancel()

    def close(self, drain_s: float = 0.0) -> None:
        """No more requests; those that run get so many seconds. The LLM stays the caller's."""
        opened, self._opened = self._opened, None
        if opened is not None:
            opened.llm.scheduler.stop(drain_s)
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def in_thread(self, work: Callable[[], T]) -> T:
        """Run what takes long without holding up other connections."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def answer(self, make: Callable[[Opened], Sequence[Job]]) -> Answers:
        """Submit the jobs that `make` gives, in another thread."""
        opened = self.opened
        opened.llm.scheduler.check_room()  # before any work is done for it
        answers = Answers(self.metrics, self.limits.unread_pieces)
        self._answers.add(answers)
        try:
            await self.in_thread(lambda: answers.submit(opened.llm, make(opened)))
        except BaseException:
            answers.cancel()
            raise
        return answers


def check_length(text: str, opened: Opened, what: str) -> None:
    """A prompt that cannot fit is refused before it is tokenised, which takes 400 bytes a token: a long one
    is counted in pieces. Not for an event loop's thread."""
    most = CHARACTERS_PER_TOKEN * opened.context
    if len(text) > most:
        raise ApiError(
            400, f"{what} have {len(text)} characters; a context of {opened.context} tokens holds less",
            what, "context_length_exceeded",
        )  # fmt: skip
    tokens = 0
    for begin in range(0, len(text), COUNTED_CHARACTERS) if len(text) > COUNTED_CHARACTERS else ():
        piece = text[begin : begin + COUNTED_CHARACTERS]
        tokens += len(opened.llm.tokenizer.encode(piece)) - MOST_CUT_TOKENS
        if tokens > opened.context:
            raise ApiError(
                400, f"{what} have more than {tokens} tokens, the context holds {opened.context}; shorten it",
                what, "context_length_exceeded",
            )  # fmt: skip


def sampling_params(
    request: Sampling, opened: Opened, max_tokens: int | None, logprobs: int | None
) -> list[SamplingParams]:
    """One for each of the request's `n`; with a seed, the next one each."""
    if request.logit_bias:
        raise ApiError(400, "logit_bias is not supported; leave it out", "logit_bias")
    given: dict[str, Any] = {name: getattr(request, name) for name in SAMPLING}
    given |= {"max_tokens": max_tokens and min(max_tokens, opened.context), "logprobs": logprobs}
    if given["stop"] == []:
        given["stop"] = None
    seeds = [None if request.seed is None else request.seed + i for i in range(request.n or 1)]
    return [opened.llm.sampling_params(given | {"seed": seed}) for seed in seeds]


def usage(stats: Sequence[GenerationStats], prompts: int = 1) -> dict[str, Any]:
    """Of a request's generations, of which the first of each of `prompts` equal shares counts the prompt."""
    firsts = stats[:: max(1, len(stats) // prompts)]
    prompt, generated = sum(s.prompt_tokens for s in firsts), sum(len(s.token_ids) for s in stats)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": sum(s.cached_tokens for s in firsts)},
    }


def finish_reason(reason: str) -> str:
    """OpenAI's name: a full context is a length."""
    return "length" if reason == "context" else reason
