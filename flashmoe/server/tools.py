"""Tools of a request: the style the model calls them in, how it learns of them, the grammar of a call."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from flashmoe.constraints import JSON_STYLE, GrammarError, check_schema
from flashmoe.server.answer_parser import END_THINK, END_TOOL_CALL, TOOL_CALL, TOOL_CALLS, Style
from flashmoe.tokenizer import Tokenizer

# Hermes' words, for models whose chat template knows no tools.
_INTRODUCTION = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> \
XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


def style_of(tokenizer: Tokenizer) -> Style:
    """How the model was trained to call tools, as its chat template shows."""
    if tokenizer.template_mentions("<|channel|>"):
        return "harmony"
    if tokenizer.template_mentions(TOOL_CALLS):
        return "mistral"
    if tokenizer.template_mentions(TOOL_CALL) or not tokenizer.template_takes_tools:
        return "hermes"
    return "json"


def introduce(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The conversation for a template that knows no tools: calls and descriptions as text."""
    told = [_as_text(message) for message in messages]
    if tools:
        words = _INTRODUCTION.format(tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))
        if told and told[0]["role"] == "system":
            told[0]["content"] = f"{told[0]['content']}\n\n{words}"
        else:
            told.insert(0, {"role": "system", "content": words})
    return told


def call_grammar(
    style: Style, tools: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, *, parallel: bool,
    thinking: bool, otherwise: Mapping[str, Any] | None = None,
) -> str:  # fmt: skip
    """A Lark grammar of one call or, if `parallel`, several. `thinking`: behind a thought. `otherwise`: or
    else a JSON value of this schema. Raises GrammarError for parameters that are no schema."""
    lines = []
    for number, tool in enumerate(tools):
        function = tool["function"]
        lines.append(f"call{number}: {_call(style, function['name'], f'args{number}', tokenizer)}")
        lines.append(f"args{number}: %json {_arguments_schema(function)}")
    lines.insert(0, "call: " + " | ".join(f"call{number}" for number in range(len(tools))))
    between = '", " ' if style in ("mistral", "json") else '"\\n" '
    several = parallel and style in ("hermes", "mistral")
    calls = f"call ({between}call)*" if several else "call"
    if style == "mistral":
        calls = f'{_special(TOOL_CALLS, tokenizer)} "[" {calls} "]"'
    if otherwise is not None:
        lines.append(f"other: %json {_styled(otherwise)}")
        calls = f"({calls}) | other"
    return "\n".join([*_behind_thought(calls, thinking), *lines])


def json_grammar_behind_thought(schema: Mapping[str, Any]) -> str:
    """A Lark grammar of a JSON value, where the prompt ends inside of a thought."""
    return "\n".join([*_behind_thought("value", True), f"value: %json {_styled(schema)}"])


def _behind_thought(body: str, thinking: bool) -> list[str]:
    if not thinking:
        return [f"start: {body}"]
    return [f'start: thought "\\n\\n" ({body})', f'thought[suffix="{END_THINK}"]: /(.|\\n)*/']


def _call(style: Style, name: str, arguments: str, tokenizer: Tokenizer) -> str:
    begin, end = json.dumps(f'{{"name": "{name}", "arguments": '), json.dumps("}")
    if style == "hermes":
        before, after = json.dumps(f"{TOOL_CALL}\n"), json.dumps(f"\n{END_TOOL_CALL}")
        return f"{before} {begin} {arguments} {end} {after}"
    if style == "harmony":
        special = [_special(token, tokenizer) for token in ("<|channel|>", "<|constrain|>", "<|message|>")]
        to = json.dumps(f"commentary to=functions.{name} ")
        return f'{special[0]} {to} {special[1]} "json" {special[2]} {arguments}'
    return f"{begin} {arguments} {end}"


def _special(token: str, tokenizer: Tokenizer) -> str:
    id = tokenizer.id_of(token)
    if id is None:
        return json.dumps(token)
    return f"<[{id}]>" if tokenizer.visible_token(id) is None else json.dumps(token)


def _arguments_schema(function: Mapping[str, Any]) -> str:
    parameters = dict(function.get("parameters") or {})
    if parameters.get("type", "object") != "object":
        raise GrammarError(
            f"the parameters of tool {function['name']} have type {parameters['type']!r:.40}, not object"
        )
    check_schema(parameters)
    return _styled({"type": "object", **parameters})


def _styled(schema: Mapping[str, Any]) -> str:
    return json.dumps({**schema, "x-guidance": dict(JSON_STYLE)})


def _as_text(message: Mapping[str, Any]) -> dict[str, Any]:
    told = {key: value for key, value in message.items() if key != "tool_calls"}
    called = [call["function"] for call in message.get("tool_calls") or ()]
    if called:
        written = (f"{TOOL_CALL}\n{_written(function)}\n{END_TOOL_CALL}" for function in called)
        told["content"] = "\n".join(part for part in (told["content"], *written) if part)
    return told


def _written(function: Mapping[str, Any]) -> str:
    return json.dumps(
        {"name": function["name"], "arguments": function["arguments"]}, ensure_ascii=False
    )
