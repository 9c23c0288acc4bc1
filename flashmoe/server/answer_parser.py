"""What a model wrote, told apart: thoughts, the answer, tool calls. Text in as it comes, parts out.

The styles of calling a tool: hermes (Qwen, Hermes) <tool_call>{"name", "arguments"}</tool_call>; mistral
[TOOL_CALLS][{"name", "arguments"}] or [TOOL_CALLS]name[ARGS]{…}; harmony (gpt-oss) channels; and in all of
them, an answer that is nothing but {"name", "arguments"} of a known tool. What looks like a call and is none
stays text.
"""

import json
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

Style = Literal["hermes", "mistral", "harmony", "json"]
THINK, END_THINK = "<think>", "</think>"
TOOL_CALL, END_TOOL_CALL = "<tool_call>", "</tool_call>"
TOOL_CALLS = "[TOOL_CALLS]"
# Special tokens have no text of their own; these matter here.
MARKERS = (
    THINK, END_THINK, TOOL_CALL, END_TOOL_CALL, TOOL_CALLS, "[ARGS]", "[CALL_ID]",
    "<|channel|>", "<|message|>", "<|constrain|>", "<|start|>", "<|end|>", "<|call|>", "<|return|>",
)  # fmt: skip
_HEAD = re.compile(
    r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.){1,200}")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)
_NAMED = re.compile(r"\s*([a-zA-Z0-9_.:-]{1,64})(?:\[CALL_ID\]\w+)?(?:\[ARGS\])?\s*(?=\{)")
_MAY_BE_CALL = re.compile(r'\s*(\{\s*("(n(a(m(e(".*)?)?)?)?)?)?)?', re.DOTALL)
_LONGEST_HEAD = 400


@dataclass(frozen=True, slots=True)
class Content:
    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    text: str


@dataclass(frozen=True, slots=True)
class Call:
    """A tool call begins; `Arguments` follow, JSON text in bits."""

    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    text: str


Part = Content | Reasoning | Call | Arguments


class AnswerParser(Protocol):
    def push(self, text: str) -> list[Part]: ...

    def finish(self) -> list[Part]: ...


def parser_for(style: Style | None, tools: Collection[str], thinking: bool) -> AnswerParser:
    """`style`: how the model calls tools, None where it has none to call; `thinking`: the prompt ends inside
    of a thought."""
    if style == "harmony":
        return HarmonyParser()
    return TagParser(style, frozenset(tools), thinking)


class TagParser:
    """hermes, mistral and json; thoughts in <think>."""

    def __init__(self, style: Style | None, tools: frozenset[str], thinking: bool) -> None:
        self._tools, self._calls = tools, style is not None
        self._markers = (TOOL_CALL, TOOL_CALLS) if self._calls else ()
        self._text = ""  # not yet told apart
        self._space = ""  # behind the last text: belongs to it only if more text follows
        self._scanner = _Scanner()
        self._state: Callable[[bool], Iterator[Part]] = self._thinking if thinking else self._begin
        self._seen = 0  # characters of the text that the scanner has seen

    def push(self, text: str) -> list[Part]:
        self._text += text
        return self._advance(end=False)

    def finish(self) -> list[Part]:
        parts = self._advance(end=True)
        if self._text:
            parts.append(Content(self._space + self._text))
        elif self._space and not self._scanner.calls:
            parts.append(Content(self._space))
        self._text = self._space = ""
        return parts

    def _advance(self, end: bool) -> list[Part]:
        """States run until one can do no more with what is there."""
        parts: list[Part] = []
        while True:
            before = (self._state, len(self._text))
            parts += self._state(end)
            if (self._state, len(self._text)) == before or not self._text:
                return parts

    # States: each takes what it can from the text, and says who goes on.

    def _begin(self, end: bool) -> Iterator[Part]:
        """Nothing but space so far."""
        text = self._text.lstrip()
        if THINK.startswith(text[: len(THINK)]) and not end and len(text) < len(THINK):
            return
        if text.startswith(THINK):
            self._text, self._state = text[len(THINK) :], self._thinking
        else:
            self._state = self._first if self._calls else self._content
        yield from ()

    def _thinking(self, end: bool) -> Iterator[Part]:
        thought, marker, rest = _split(self._text, (END_THINK,), end)
        if thought:
            yield Reasoning(thought)
        self._text = rest
        if marker:
            self._state = self._after_thought

    def _after_thought(self, end: bool) -> Iterator[Part]:
        self._text = self._text.lstrip()
        if self._text:
            self._state = self._first if self._calls else self._content
        yield from ()

    def _first(self, end: bool) -> Iterator[Part]:
        """An answer that may be a call without any markup."""
        may_be = _MAY_BE_CALL.fullmatch(self._text)
        if not may_be:
            self._state = self._content
            return
        closed = self._end_of_value()
        if closed is None and not end:
            return
        self._restart()
        call = _call_of(self._text[:closed]) if closed is not None else None
        if call is None or call[0] not in self._tools:
            self._state = self._content
            return
        self._text, self._state = self._text[closed:], self._content
        yield from self._whole(*call)

    def _content(self, end: bool) -> Iterator[Part]:
        text, marker, rest = _split(self._text, self._markers, end)
        shown = text.rstrip() if self._calls else text
        if shown:
            yield Content(self._space + shown)
            self._space = ""
        self._space += text[len(shown) :]
        self._text = rest
        if marker:
            self._space = ""
            self._restart()
            self._state = self._tagged if marker == TOOL_CALL else self._listed

    def _tagged(self, end: bool) -> Iterator[Part]:
        """Behind <tool_call>."""
        head = _HEAD.match(self._text)
        if head:
            self._text = self._text[head.end() :]
            yield self._begin_call(json.loads(head[1]))
            self._restart()
            self._state = self._arguments
            return
        closed = self._end_of_value()
        if closed is None and END_TOOL_CALL not in self._text and not end:
            return
        call = _call_of(self._text[:closed]) if closed is not None else None
        if call is None:
            yield from self._no_call(TOOL_CALL)
            return
        self._text, self._state = self._text[closed:], self._behind
        yield from self._whole(*call)

    def _listed(self, end: bool) -> Iterator[Part]:
        """Behind [TOOL_CALLS]."""
        text = self._text.lstrip()
        if not text and not end:
            return
        if not text.startswith("["):  # the newer style
            named = _NAMED.match(self._text)
            if named:
                self._text = self._text[named.end() :]
                yield self._begin_call(named[1])
                self._restart()
                self._state = self._arguments
            elif end or len(text) > _LONGEST_HEAD:
                yield from self._no_call(TOOL_CALLS)
            return
        closed = self._end_of_value()
        if closed is None:
            if end:
                yield from self._no_call(TOOL_CALLS)
            return
        calls = _calls_of(self._text[:closed])
        if not calls:
            yield from self._no_call(TOOL_CALLS)
            return
        self._text, self._state = self._text[closed:], self._content
        for call in calls:
            yield from self._whole(*call)

    def _arguments(self, end: bool) -> Iterator[Part]:
        """Inside of the object of arguments."""
        closed = self._scanner.scan(self._text)
        bit = self._text if closed is None else self._text[:closed]
        self._text = self._text[len(bit) :]
        if bit:
            yield Arguments(bit)
        if closed is not None:
            self._state = self._behind

    def _behind(self, end: bool) -> Iterator[Part]:
        """Behind a call's arguments: what closes it says nothing."""
        text = self._text.lstrip().removeprefix("}").lstrip()
        if text.startswith(END_TOOL_CALL):
            self._text, self._state = text[len(END_TOOL_CALL) :], self._content
        elif end or not END_TOOL_CALL.startswith(text):
            self._text, self._state = text, self._content
        yield from ()

    def _end_of_value(self) -> int | None:
        """Where the object or list that the text begins with ends; looks at each character once."""
        closed = self._scanner.scan(self._text[self._seen :])
        if closed is not None:
            return self._seen + closed
        self._seen = len(self._text)
        return None

    def _restart(self) -> None:
        self._scanner.restart()
        self._seen = 0

    def _no_call(self, marker: str) -> Iterator[Part]:
        """It only looked like one."""
        self._state = self._content
        yield Content(self._space + marker)
        self._space = ""

    def _begin_call(self, name: str) -> Call:
        self._scanner.calls += 1
        return Call(name)

    def _whole(self, name: str, arguments: str) -> Iterator[Part]:
        yield self._begin_call(name)
        yield Arguments(arguments)


class HarmonyParser:
    """gpt-oss: <|channel|>analysis<|message|>…<|end|><|start|>assistant<|channel|>final<|message|>…"""

    _ENDS = ("<|end|>", "<|call|>", "<|return|>", "<|start|>", "<|channel|>")

    def __init__(self) -> None:
        self._text, self._in_body = "", False
        self._kind: type[Content] | type[Reasoning] | type[Arguments] = Content

    def push(self, text: str) -> list[Part]:
        self._text += text
        return list(self._parts(end=False))

    def finish(self) -> list[Part]:
        parts = list(self._parts(end=True))
        if self._text and not self._in_body and "<|" not in self._text:
            parts.append(Content(self._text))  # no channel at all
        self._text = ""
        return parts

    def _parts(self, end: bool) -> Iterator[Part]:
        while True:
            if self._in_body:
                text, marker, self._text = _split(self._text, self._ENDS, end)
                if text:
                    yield self._kind(text)
                if marker is None:
                    return
                self._in_body, self._text = False, marker + self._text
            head, found, rest = self._text.partition("<|message|>")
            if not found:
                return
            self._in_body, self._text = True, rest
            called = re.search(r"to=functions\.([a-zA-Z0-9_.:-]{1,64})", head)
            channel = re.findall(r"<\|channel\|>\s*(\w+)", head)
            if called:
                self._kind = Arguments
                yield Call(called[1])
            else:
                self._kind = Reasoning if channel[-1:] == ["analysis"] else Content


class _Scanner:
    """Finds the end of a JSON object that comes in bits."""

    def __init__(self) -> None:
        self.calls = 0
        self.restart()

    def restart(self) -> None:
        self._depth, self._in_string, self._escaped = 0, False, False

    def scan(self, text: str) -> int | None:
        """Where in `text` the value ends; None if it goes on."""
        for i, character in enumerate(text):
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif character == "\\":
                    self._escaped = True
                elif character == '"':
                    self._in_string = False
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    return i + 1
        return None


def _split(text: str, markers: Sequence[str], end: bool) -> tuple[str, str | None, str]:
    """What is before the first marker, the marker, what is behind it. Without one: what cannot be the
    beginning of one, None, the rest."""
    found = min(((i, m) for m in markers if (i := text.find(m)) >= 0), default=None)
    if found is not None:
        at, marker = found
        return text[:at], marker, text[at + len(marker) :]
    if not end:
        longest = max(map(len, markers), default=1)
        for at in range(max(0, len(text) - longest + 1), len(text)):
            if any(marker.startswith(text[at:]) for marker in markers):
                return text[:at], None, text[at:]
    return text, None, ""


def _call_of(text: str) -> tuple[str, str] | None:
    """Name and arguments of {"name", "arguments"}; None if it is something else."""
    try:
        return _checked(json.loads(text))
    except (ValueError, RecursionError):
        return None


def _calls_of(text: str) -> list[tuple[str, str]]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return []
    calls = [_checked(value) for value in values]
    return [call for call in calls if call is not None] if None not in calls else []


def _checked(value: Any) -> tuple[str, str] | None:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        return value["name"], arguments
    if not isinstance(arguments, dict):
        return None
    return value["name"], json.dumps(arguments, ensure_ascii=False)
