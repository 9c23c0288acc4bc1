"""POST /v1/chat/completions: what is answered. What is asked is chat_prompt.py's."""

import secrets
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from flashmoe.generation import Piece
from flashmoe.server.answer_parser import MARKERS, Arguments, Call, Content, Part, Reasoning, parser_for
from flashmoe.server.chat_prompt import Reading, prepare
from flashmoe.server.generations import Answers, Job
from flashmoe.server.logprobs import chat_entry
from flashmoe.server.schemas import ChatRequest
from flashmoe.server.service import FINGERPRINT, Opened, Service, finish_reason, usage
from flashmoe.server.sse import DONE, EventStream, event, unless_left
from flashmoe.tokenizer import Tokenizer


async def chat(service: Service, request: ChatRequest, http: Request) -> Response:
    """Answer a conversation, whole or as a stream."""
    readings: list[Reading] = []

    def make(opened: Opened) -> list[Job]:
        jobs, reading = prepare(request, opened)
        readings.append(reading)
        return jobs

    opened = service.opened
    answers = await service.answer(make)
    http.state.generations = answers.stats
    choices = [Choice(opened.llm.tokenizer, readings[0]) for _ in answers.stats]
    head = {
        "id": f"chatcmpl-{secrets.token_hex(12)}",
        "created": int(time.time()),
        "model": service.model_name,
        "system_fingerprint": FINGERPRINT,
    }
    if request.stream:
        with_usage = bool(request.stream_options and request.stream_options.include_usage)
        return EventStream(_stream(head, answers, choices, with_usage), answers.cancel, service.limits)
    body = await unless_left(http.receive, _whole(head, answers, choices), answers.cancel)
    return Response(status_code=499) if body is None else JSONResponse(body)


class Choice:
    """One answer while it comes: pieces in, deltas out, and what they add up to."""

    def __init__(self, tokenizer: Tokenizer, reading: Reading) -> None:
        self._tokenizer, self._style, self._parallel = tokenizer, reading.style, reading.parallel
        self._one_too_many = False
        self._parser = parser_for(reading.style, reading.tools, reading.thinking)
        self._markers = {
            id: text
            for text in MARKERS
            if (id := tokenizer.id_of(text)) is not None and tokenizer.visible_token(id) is None
        }
        self.content, self.reasoning, self.logprobs = "", "", None  # type: str, str, list[Any] | None
        self.calls: list[dict[str, Any]] = []
        self.finish_reason = ""

    def push(self, piece: Piece) -> list[dict[str, Any]]:
        """The deltas that a piece makes."""
        text = piece.text + (self._markers.get(piece.token_id, "") if piece.token_id is not None else "")
        parts = self._parser.push(text) if text else []
        if piece.finish_reason is not None:
            parts += self._parser.finish()
            reason = finish_reason(piece.finish_reason)
            called = any(isinstance(part, Call) for part in parts) or self.calls
            self.finish_reason = "tool_calls" if called and reason == "stop" else reason
        return [self._delta(part) for part in parts if self._is_wanted(part)]

    def _is_wanted(self, part: Part) -> bool:
        """Where calls may not be parallel, only the first one is told."""
        if isinstance(part, Call) and self.calls and not self._parallel:
            self._one_too_many = True
        return not (self._one_too_many and isinstance(part, Call | Arguments))

    def entries(self, piece: Piece) -> list[Any] | None:
        """The log probabilities of a piece, if they were asked for; the end of text has none."""
        if piece.logprob is None:
            return None
        if piece.token_id in self._tokenizer.eos_token_ids:
            return []
        return [chat_entry(self._tokenizer, piece.logprob)]

    def message(self) -> dict[str, Any]:
        """All of it."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content or None, "refusal": None}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.calls:
            message["tool_calls"] = self.calls
        else:
            message["content"] = self.content
        return message

    def _call_id(self) -> str:
        """Mistral's templates refuse any but nine letters and digits."""
        return secrets.token_hex(5)[:9] if self._style == "mistral" else f"call_{secrets.token_hex(12)}"

    def _delta(self, part: Part) -> dict[str, Any]:
        match part:
            case Content(text):
                self.content += text
                return {"content": text}
            case Reasoning(text):
                self.reasoning += text
                return {"reasoning_content": text}
            case Call(name):
                call: dict[str, Any] = {"id": self._call_id(), "type": "function"}
                self.calls.append({**call, "function": {"name": name, "arguments": ""}})
                call |= {"index": len(self.calls) - 1, "function": {"name": name, "arguments": ""}}
                return {"tool_calls": [call]}
            case Arguments(text):
                self.calls[-1]["function"]["arguments"] += text
                return {"tool_calls": [{"index": len(self.calls) - 1, "function": {"arguments": text}}]}


async def _stream(
    head: dict[str, Any], answers: Answers, choices: Sequence[Choice], with_usage: bool
) -> AsyncIterator[bytes]:
    head = {**head, "object": "chat.completion.chunk"}
    extra = {"usage": None} if with_usage else {}

    def chunk(index: int, delta: dict[str, Any], entries: list[Any] | None, reason: str | None) -> bytes:
        logprobs = {"content": entries, "refusal": None} if entries else None
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return event({**head, "choices": [choice], **extra})

    for index in range(len(choices)):
        yield chunk(index, {"role": "assistant", "content": ""}, None, None)
    async for index, piece in answers.pieces():
        choice = choices[index]
        entries = choice.entries(piece)
        deltas = choice.push(piece) or ([{"content": ""}] if entries else [])
        for delta in deltas:
            yield chunk(index, delta, entries, None)
            entries = None
        if piece.finish_reason is not None:
            yield chunk(index, {}, None, choice.finish_reason)
    if with_usage:
        yield event({**head, "choices": [], "usage": usage(answers.stats)})
    yield DONE


async def _whole(head: dict[str, Any], answers: Answers, choices: Sequence[Choice]) -> dict[str, Any]:
    async for index, piece in answers.pieces():
        choice = choices[index]
        entries = choice.entries(piece)
        if entries is not None:
            choice.logprobs = (choice.logprobs or []) + entries
        choice.push(piece)
    told = [
        {
            "index": index,
            "message": choice.message(),
            "logprobs": None if choice.logprobs is None else {"content": choice.logprobs, "refusal": None},
            "finish_reason": choice.finish_reason,
        }
        for index, choice in enumerate(choices)
    ]
    return {**head, "object": "chat.completion", "choices": told, "usage": usage(answers.stats)}
