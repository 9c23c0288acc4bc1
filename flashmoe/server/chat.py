"""POST /v1/chat/completions."""

import json
import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Receive

from flashmoe.constraints import GrammarConstraint, check_schema, depth_of
from flashmoe.generation import Piece
from flashmoe.sampler import SamplingParams
from flashmoe.server.answer_parser import (
    MARKERS,
    THINK,
    Arguments,
    Call,
    Content,
    Part,
    Reasoning,
    Style,
    parser_for,
)
from flashmoe.server.errors import ApiError, blaming
from flashmoe.server.generations import Answers, Job
from flashmoe.server.logprobs import chat_entry
from flashmoe.server.schemas import ChatRequest, Message, NamedTool
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
from flashmoe.server.tools import call_grammar, introduce, json_grammar_behind_thought, style_of
from flashmoe.stats import GenerationStats
from flashmoe.tokenizer import Tokenizer

DEEPEST_VALUE = 64


@dataclass(frozen=True, slots=True)
class Reading:
    """How a request's answers are read; `style` None: there are no tools to call."""

    style: Style | None
    tools: tuple[str, ...]
    thinking: bool


async def chat(service: Service, request: ChatRequest, receive: Receive) -> Response:
    """Answer a conversation, whole or as a stream."""
    readings: list[Reading] = []

    def make(opened: Opened) -> list[Job]:
        jobs, reading = _prepare(request, opened)
        readings.append(reading)
        return jobs

    opened = service.opened
    answers = await service.answer(make)
    choices = [_Choice(opened.llm.tokenizer, readings[0]) for _ in answers.stats]
    head = {
        "id": f"chatcmpl-{secrets.token_hex(12)}",
        "created": int(time.time()),
        "model": service.model_name,
        "system_fingerprint": FINGERPRINT,
    }
    if request.stream:
        with_usage = bool(request.stream_options and request.stream_options.include_usage)
        return EventStream(_stream(head, answers, choices, with_usage), answers.cancel, service.limits)
    body = await unless_left(receive, _whole(head, answers, choices), answers.cancel)
    return Response(status_code=499) if body is None else JSONResponse(body)


# What is asked


def _prepare(request: ChatRequest, opened: Opened) -> tuple[list[Job], Reading]:
    """In a thread: template, tokens, grammar."""
    tokenizer = opened.llm.tokenizer
    if not request.logprobs and request.top_logprobs is not None:
        raise ApiError(400, "top_logprobs needs logprobs: true", "top_logprobs")
    params = sampling_params(
        request, opened, request.max_completion_tokens or request.max_tokens,
        (request.top_logprobs or 0) if request.logprobs else None,
    )  # fmt: skip
    messages = [_plain(message, number) for number, message in enumerate(request.messages)]
    tools = _tools(request)
    text = _render(request, messages, tools, tokenizer)
    check_length(text, opened, "messages")
    thinking = text.rstrip().endswith(THINK)
    reading = Reading(
        style_of(tokenizer) if tools else None, tuple(tool["function"]["name"] for tool in tools), thinking
    )
    constraint = _constraint(request, tools, reading, opened)
    prompt = opened.chats.encode(text)

    def ended(stats: GenerationStats) -> None:
        opened.chats.remember(text, prompt, stats.token_ids)

    return [_job(prompt, p, constraint, ended) for p in params], reading


def _job(prompt: list[int], params: SamplingParams, constraint: GrammarConstraint | None, ended: Any) -> Job:
    return Job(prompt, params, None if constraint is None else constraint.copy(), ended)


def _plain(message: Message, number: int) -> dict[str, Any]:
    """As chat templates take it: contents are text, arguments of calls objects."""
    content = message.content or ""
    if isinstance(content, list):
        for part in content:
            if part.type != "text" or part.text is None:
                what = f"messages.{number} has a content part of type {part.type[:40]!r}"
                raise ApiError(400, f"{what}; this model reads text only", "messages", "unsupported_content")
        content = "".join(part.text or "" for part in content)
    role = {"developer": "system", "function": "tool"}.get(message.role, message.role)
    plain: dict[str, Any] = {"role": role, "content": content}
    for name in ("name", "tool_call_id", "reasoning_content"):
        if getattr(message, name) is not None:
            plain[name] = getattr(message, name)
    if message.tool_calls:
        plain["tool_calls"] = [
            {
                "id": call.id or "",
                "type": "function",
                "function": {"name": call.function.name, "arguments": _object(call.function.arguments)},
            }
            for call in message.tool_calls
        ]
    return plain


def _object(arguments: str | dict[str, Any]) -> Any:
    """Arguments as the object that templates expect; text that is none stays text."""
    if isinstance(arguments, dict):
        return arguments
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    return value if isinstance(value, dict) else arguments


def _tools(request: ChatRequest) -> list[dict[str, Any]]:
    """Those that the model is shown."""
    tools = [tool.model_dump(exclude_none=True) for tool in request.tools or ()]
    names = [tool["function"]["name"] for tool in tools]
    if len(set(names)) < len(names):
        raise ApiError(400, "two tools have the same name; give each its own", "tools")
    for tool in tools:
        with blaming("tools"):
            check_schema(tool["function"].get("parameters", {}))
    match request.tool_choice:
        case "none":
            return []
        case "required" if not tools:
            raise ApiError(400, "tool_choice is required, but there are no tools", "tool_choice")
        case NamedTool(function=function) if function.name not in names:
            raise ApiError(400, f"tool_choice names {function.name[:64]!r}, no tool of these", "tool_choice")
    return tools


def _render(
    request: ChatRequest, messages: list[dict[str, Any]], tools: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
) -> str:  # fmt: skip
    variables = request.chat_template_kwargs or {}
    if depth_of(variables, DEEPEST_VALUE) > DEEPEST_VALUE:
        raise ApiError(400, f"nested deeper than {DEEPEST_VALUE} levels", "chat_template_kwargs")
    if not tokenizer.template_takes_tools:
        return tokenizer.apply_chat_template(introduce(messages, tools), variables=variables)
    return tokenizer.apply_chat_template(messages, tools=tools or None, variables=variables)


def _constraint(
    request: ChatRequest, tools: Sequence[Mapping[str, Any]], reading: Reading, opened: Opened
) -> GrammarConstraint | None:
    """What the answer has to follow, if anything."""
    choice, grammars = request.tool_choice, opened.grammars
    schema = _schema(request)
    if isinstance(choice, NamedTool):
        tools = [tool for tool in tools if tool["function"]["name"] == choice.function.name]
    must_call = bool(tools) and (choice == "required" or isinstance(choice, NamedTool))
    if must_call or (tools and schema is not None):
        assert reading.style is not None
        with blaming("tools"):
            grammar = call_grammar(
                reading.style, tools, opened.llm.tokenizer, parallel=request.parallel_tool_calls is not False,
                thinking=reading.thinking, otherwise=None if must_call else schema,
            )  # fmt: skip
            return grammars.lark(grammar)
    if schema is None:
        return None
    with blaming("response_format"):
        if reading.thinking:
            return grammars.lark(json_grammar_behind_thought(schema))
        return grammars.schema(schema)


def _schema(request: ChatRequest) -> dict[str, Any] | None:
    form = request.response_format
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return {"type": "object"}
    if form.json_schema is None or form.json_schema.schema_ is None:
        raise ApiError(400, "response_format json_schema needs a json_schema.schema", "response_format")
    with blaming("response_format"):
        check_schema(form.json_schema.schema_)
    return form.json_schema.schema_


# What is answered


class _Choice:
    """One answer while it comes: pieces in, deltas out, and what they add up to."""

    def __init__(self, tokenizer: Tokenizer, reading: Reading) -> None:
        self._tokenizer, self._style = tokenizer, reading.style
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
        return [self._delta(part) for part in parts]

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
    head: dict[str, Any], answers: Answers, choices: Sequence[_Choice], with_usage: bool
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


async def _whole(head: dict[str, Any], answers: Answers, choices: Sequence[_Choice]) -> dict[str, Any]:
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
