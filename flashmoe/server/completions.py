"""POST /v1/completions: text continued, without a chat template."""

import secrets
import time
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from flashmoe.generation import Piece, TokenLogprob
from flashmoe.server.errors import ApiError
from flashmoe.server.generations import Answers, Job
from flashmoe.server.limits import MOST_ANSWERS
from flashmoe.server.logprobs import completion_logprobs
from flashmoe.server.schemas import CompletionRequest
from flashmoe.server.service import (
    FINGERPRINT,
    Opened,
    Service,
    check_length,
    finish_reason,
    sampling_params,
    usage,
)
from flashmoe.server.sse import DONE, EventStream, event, unless_left
from flashmoe.tokenizer import Tokenizer


async def complete(service: Service, request: CompletionRequest, http: Request) -> Response:
    """Continue one or several prompts, whole or as a stream."""
    _check(request)
    prompts = _prompts(request)
    opened = service.opened
    answers = await service.answer(partial(_prepare, request, prompts))
    http.state.generations = answers.stats
    tokenizer = opened.llm.tokenizer
    echoed = [_text(prompt, tokenizer) if request.echo else "" for prompt in prompts]
    choices = [
        _Choice(tokenizer, echo, request.logprobs is not None)
        for echo in echoed
        for _ in range(request.n or 1)
    ]
    head = {
        "id": f"cmpl-{secrets.token_hex(12)}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": service.model_name,
        "system_fingerprint": FINGERPRINT,
    }
    if request.stream:
        with_usage = bool(request.stream_options and request.stream_options.include_usage)
        events = _stream(head, answers, choices, len(prompts), with_usage)
        return EventStream(events, answers.cancel, service.limits)
    body = await unless_left(http.receive, _whole(head, answers, choices, len(prompts)), answers.cancel)
    return Response(status_code=499) if body is None else JSONResponse(body)


def _check(request: CompletionRequest) -> None:
    if request.suffix:
        raise ApiError(400, "suffix is not supported; leave it out", "suffix")
    if request.best_of not in (None, 1):
        raise ApiError(400, "best_of is not supported; use n", "best_of")
    if request.echo and request.logprobs is not None:
        raise ApiError(400, "logprobs of the prompt are not supported; leave out echo", "logprobs")


def _prompts(request: CompletionRequest) -> list[str | list[int]]:
    """One or several, as text or ids."""
    prompt: Any = request.prompt
    single = isinstance(prompt, str) or isinstance(prompt[0], int)
    prompts: list[str | list[int]] = [prompt] if single else list(prompt)
    answers = len(prompts) * (request.n or 1)
    if answers > MOST_ANSWERS:
        raise ApiError(
            400, f"prompts times n are {answers} answers, one request may have {MOST_ANSWERS}; send several",
            "prompt",
        )  # fmt: skip
    return prompts


def _prepare(
    request: CompletionRequest, prompts: Sequence[str | list[int]], opened: Opened
) -> list[Job]:
    """In a thread: tokens."""
    params = sampling_params(request, opened, request.max_tokens, request.logprobs)
    jobs = []
    for prompt in prompts:
        if isinstance(prompt, str):
            check_length(prompt, opened, "prompt")
            ids = opened.llm.tokenizer.encode(prompt, add_special_tokens=True)
        else:
            ids = prompt
        jobs += [Job(ids, p) for p in params]
    return jobs


def _text(prompt: str | list[int], tokenizer: Tokenizer) -> str:
    return prompt if isinstance(prompt, str) else tokenizer.decode(prompt)


class _Choice:
    """One text while it comes."""

    def __init__(self, tokenizer: Tokenizer, echo: str, with_logprobs: bool) -> None:
        self._tokenizer, self._with_logprobs = tokenizer, with_logprobs
        self.text, self.finish_reason = echo, ""
        self._new = echo  # not yet streamed
        self._offset = len(echo)
        self._logprobs: list[TokenLogprob] = []

    def push(self, piece: Piece) -> None:
        self.text += piece.text
        self._new += piece.text
        if piece.logprob is not None and piece.token_id not in self._tokenizer.eos_token_ids:
            self._logprobs.append(piece.logprob)
        if piece.finish_reason is not None:
            self.finish_reason = finish_reason(piece.finish_reason)

    def news(self) -> tuple[str, dict[str, Any] | None]:
        """What came since the last call: text and log probabilities."""
        logprobs = self.logprobs()
        if logprobs is not None:
            self._offset += sum(map(len, logprobs["tokens"]))
        self._logprobs = []
        text, self._new = self._new, ""
        return text, logprobs

    def logprobs(self) -> dict[str, Any] | None:
        if not self._with_logprobs:
            return None
        return completion_logprobs(self._tokenizer, self._logprobs, self._offset)


async def _stream(
    head: dict[str, Any], answers: Answers, choices: Sequence[_Choice], prompts: int, with_usage: bool
) -> AsyncIterator[bytes]:
    extra = {"usage": None} if with_usage else {}
    async for index, piece in answers.pieces():
        choice = choices[index]
        choice.push(piece)
        if piece.text or piece.finish_reason is not None or piece.logprob is not None:
            text, logprobs = choice.news()
            reason = choice.finish_reason or None
            told = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
            yield event({**head, "choices": [told], **extra})
    if with_usage:
        yield event({**head, "choices": [], "usage": usage(answers.stats, prompts)})
    yield DONE


async def _whole(
    head: dict[str, Any], answers: Answers, choices: Sequence[_Choice], prompts: int
) -> dict[str, Any]:
    async for index, piece in answers.pieces():
        choices[index].push(piece)
    told = [
        {"index": i, "text": c.text, "logprobs": c.logprobs(), "finish_reason": c.finish_reason}
        for i, c in enumerate(choices)
    ]
    return {**head, "choices": told, "usage": usage(answers.stats, prompts)}
