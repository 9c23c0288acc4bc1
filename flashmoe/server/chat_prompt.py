"""What a chat request asks for: from messages to token ids, from tools and formats to a grammar.

Runs outside of the event loop: templates, tokenising and grammars take a while.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flashmoe.constraints import GrammarConstraint, check_schema, depth_of
from flashmoe.sampler import SamplingParams
from flashmoe.server.answer_parser import THINK, Style
from flashmoe.server.errors import ApiError, blaming
from flashmoe.server.generations import Job
from flashmoe.server.schemas import ChatRequest, Message, NamedTool
from flashmoe.server.service import Opened, check_length, sampling_params
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
    parallel: bool = True


def prepare(request: ChatRequest, opened: Opened) -> tuple[list[Job], Reading]:
    """The generations to make, one for each of `n`, and how to read them. Raises ApiError, FlashMoEError."""
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
        style_of(tokenizer) if tools else None, tuple(tool["function"]["name"] for tool in tools), thinking,
        request.parallel_tool_calls is not False,
    )  # fmt: skip
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
                reading.style, tools, opened.llm.tokenizer, parallel=reading.parallel,
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
