"""What a model wrote, told apart: however the text is cut into pieces, the same parts come out."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmoe.constraints import GrammarError, Grammars
from flashmoe.generation import Piece
from flashmoe.server.answer_parser import Arguments, Call, Content, Part, Reasoning, Style, parser_for
from flashmoe.server.chat import Choice
from flashmoe.server.chat_prompt import Reading
from flashmoe.server.conversation_ids import ConversationIds
from flashmoe.server.tools import call_grammar, introduce, style_of
from flashmoe.tokenizer import Tokenizer

WEATHER = '{"name": "weather", "arguments": {"city": "Par\\"}is", "days": [1, {"a": "]"}]}}'
ARGUMENTS = '{"city": "Par\\"}is", "days": [1, {"a": "]"}]}'


def joined(parts: Sequence[Part]) -> list[Part]:
    """Neighbours of a kind as one."""
    whole: list[Any] = []
    for part in parts:
        if whole and type(whole[-1]) is type(part) and not isinstance(part, Call):
            whole[-1] = type(part)(whole[-1].text + part.text)
        else:
            whole.append(part)
    return [part for part in whole if isinstance(part, Call) or part.text]


def parts_of(
    text: str, style: Style | None = "hermes", *, cuts: Sequence[int] = (), thinking: bool = False
) -> list[Part]:
    parser = parser_for(style, ["weather", "wait"], thinking)
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    parts = [part for a, b in zip(edges, edges[1:], strict=False) for part in parser.push(text[a:b])]
    return joined(parts + parser.finish())


CALL = [Call("weather"), Arguments(ARGUMENTS)]
CASES: list[tuple[Style | None, str, list[Part]]] = [
    (None, "plain <tool_call> text", [Content("plain <tool_call> text")]),
    ("hermes", "just text < tool", [Content("just text < tool")]),
    ("hermes", f"<tool_call>\n{WEATHER}\n</tool_call>", CALL),
    ("hermes", f"Let me see.\n<tool_call>{WEATHER}</tool_call>", [Content("Let me see."), *CALL]),
    ("hermes", f"<tool_call>\n{WEATHER}\n</tool_call>\n<tool_call>\n{WEATHER}\n</tool_call>", CALL + CALL),
    ("hermes", f"<tool_call>\n{WEATHER}", CALL),  # no end
    ("hermes", '<tool_call>{"arguments": {"a": 1}, "name": "wait"}</tool_call>',
     [Call("wait"), Arguments('{"a": 1}')]),
    ("hermes", '<tool_call>{"name": "wait"}</tool_call> so', [Call("wait"), Arguments("{}"), Content(" so")]),
    ("hermes", "<tool_call>rain?</tool_call> no", [Content("<tool_call>rain?</tool_call> no")]),
    ("hermes", "text \n ", [Content("text \n ")]),
    ("hermes", WEATHER, CALL),  # no markup at all
    ("hermes", '{"name": "unknown", "arguments": {}}', [Content('{"name": "unknown", "arguments": {}}')]),
    ("hermes", '{"answer": 5}', [Content('{"answer": 5}')]),
    ("json", WEATHER, CALL),
    ("json", '{"name": "weather", "parameters": {"a": 1}}', [Call("weather"), Arguments('{"a": 1}')]),
    ("mistral", f"[TOOL_CALLS][{WEATHER}, {WEATHER}]", [Call("weather"), *CALL[1:]] * 2),
    ("mistral", f"[TOOL_CALLS]weather[ARGS]{ARGUMENTS}[TOOL_CALLS]wait{{}}",
     [*CALL, Call("wait"), Arguments("{}")]),
    ("mistral", "[TOOL_CALLS] nothing to call", [Content("[TOOL_CALLS] nothing to call")]),
    ("hermes", "<think>\nhm\n</think>\n\nyes", [Reasoning("\nhm\n"), Content("yes")]),
    (None, " <think>never ends", [Reasoning("never ends")]),
    (None, "<thinking> aloud", [Content("<thinking> aloud")]),
    ("harmony", "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>yes"
     "<|return|>", [Reasoning("hm"), Content("yes")]),
    ("harmony", "<|channel|>commentary to=functions.wait <|constrain|>json<|message|>{}<|call|>",
     [Call("wait"), Arguments("{}")]),
    ("harmony", "<|start|>assistant to=functions.wait<|channel|>commentary json<|message|>{\"a\": 1}<|call|>",
     [Call("wait"), Arguments('{"a": 1}')]),
]  # fmt: skip


@pytest.mark.parametrize("style, text, expected", CASES)
def test_parts_are_told_apart(style: Style | None, text: str, expected: list[Part]):
    parts = parts_of(text, style)
    assert _without_edges(parts) == _without_edges(expected)


@pytest.mark.parametrize("style, text, expected", CASES)
@settings(max_examples=40, deadline=None)
@given(cuts=st.lists(st.integers(0, 120), max_size=12))
def test_where_a_text_is_cut_does_not_matter(
    style: Style | None, text: str, expected: list[Part], cuts: list[int]
):
    assert parts_of(text, style, cuts=cuts) == parts_of(text, style)
    assert parts_of(text, style, cuts=range(len(text))) == parts_of(text, style)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.sampled_from(["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[", "]", "{", "}", '"name"', ":",
                         '"', "\\", "<think>", "</think>", "wait", " ", "\n", ",", '{"name": "wait"}', "<"]),
        max_size=30,
    ),
    st.sampled_from(["hermes", "mistral", "json", "harmony", None]),
)  # fmt: skip
def test_any_text_is_told_apart_without_an_error_and_alike_in_pieces(bits: list[str], style: Style | None):
    text = "".join(bits)
    assert parts_of(text, style, cuts=range(len(text))) == parts_of(text, style)


def test_a_prompt_that_ends_in_a_thought_begins_with_one():
    assert parts_of("hm</think>yes", None, thinking=True) == [Reasoning("hm"), Content("yes")]


def test_arguments_come_as_they_are_written():
    parser = parser_for("hermes", ["weather"], False)
    assert parser.push('<tool_call>\n{"name": "weather", "arguments": {"ci') == [
        Call("weather"), Arguments('{"ci')
    ]  # fmt: skip
    assert parser.push('ty": ') == [Arguments('ty": ')]


@pytest.mark.parametrize("parallel, told", [(True, 2), (False, 1)])
def test_where_calls_may_not_be_parallel_only_the_first_is_told(
    tokenizer: Tokenizer, parallel: bool, told: int
):
    choice = Choice(tokenizer, Reading("hermes", ("weather",), False, parallel))
    deltas = choice.push(Piece(f"<tool_call>{WEATHER}</tool_call>" * 2, 5, "stop"))
    assert len(choice.message()["tool_calls"]) == told and choice.finish_reason == "tool_calls"
    assert {delta["tool_calls"][0]["index"] for delta in deltas} == set(range(told))


def test_a_special_token_counts_where_it_marks_a_call(tiny_model: Path, tmp_path: Path):
    """Decoding gives no text for it."""
    source = json.loads((tiny_model / "tokenizer.json").read_text("utf-8"))
    source["added_tokens"][0]["content"] = "[TOOL_CALLS]"
    source["model"]["vocab"]["[TOOL_CALLS]"] = source["model"]["vocab"].pop("<|endoftext|>")
    (tmp_path / "tokenizer.json").write_text(json.dumps(source), "utf-8")
    tokenizer = Tokenizer(tmp_path)
    choice = Choice(tokenizer, Reading("mistral", ("wait",), False))
    for piece in (Piece("", tokenizer.id_of("[TOOL_CALLS]")), Piece("wait", 20), Piece("{}", 21, "stop")):
        choice.push(piece)
    (call,) = choice.message()["tool_calls"]
    assert call["function"] == {"name": "wait", "arguments": "{}"}
    assert len(call["id"]) == 9 and call["id"].isalnum(), "as Mistral's templates want it"


def _without_edges(parts: list[Part]) -> list[Any]:
    """Space around text between calls is nobody's."""
    return [type(p)(p.text.strip()) if isinstance(p, Content) else p for p in parts]


# Grammars


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Tokenizer:
    return Tokenizer(tiny_model)


def tool(name: str, **parameters: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


PLACE = tool(
    "place", type="object", properties={"at": {"$ref": "#/$defs/at"}}, required=["at"],
    additionalProperties=False, **{"$defs": {"at": {"enum": ["here", "there"]}}},
)  # fmt: skip


def accepts(grammars: Grammars, grammar: str, text: str, tokenizer: Tokenizer) -> bool:
    """Whether `text` can be said to its end."""
    constraint = grammars.lark(grammar)
    for id in tokenizer.encode(text):
        allowed = constraint.allowed()
        if allowed is None or not allowed[id]:
            return False
        constraint.accept(id)
    if constraint.is_complete:
        return True
    allowed = constraint.allowed()
    return allowed is not None and any(allowed[id] for id in tokenizer.eos_token_ids)


@pytest.mark.parametrize(
    "style, options, text, fits",
    [
        ("hermes", {}, '<tool_call>\n{"name": "place", "arguments": {"at": "here"}}\n</tool_call>', True),
        ("hermes", {}, '<tool_call>\n{"name": "place", "arguments": {"at": "else"}}\n</tool_call>', False),
        ("hermes", {}, '<tool_call>\n{"name": "other", "arguments": {"at": "here"}}\n</tool_call>', False),
        ("hermes", {}, "hello", False),
        ("hermes", {"parallel": True},
         '<tool_call>\n{"name": "place", "arguments": {"at": "here"}}\n</tool_call>\n'
         '<tool_call>\n{"name": "place", "arguments": {"at": "there"}}\n</tool_call>', True),
        ("hermes", {"otherwise": {"const": 5}}, "5", True),
        ("hermes", {"thinking": True},
         'well\n</think>\n\n<tool_call>\n{"name": "place", "arguments": {"at": "here"}}\n</tool_call>', True),
        ("json", {}, '{"name": "place", "arguments": {"at": "here"}}', True),
        ("mistral", {}, '[TOOL_CALLS][{"name": "place", "arguments": {"at": "here"}}]', True),
        ("harmony", {}, '<|channel|>commentary to=functions.place <|constrain|>json<|message|>{"at": "here"}',
         True),
    ],
)  # fmt: skip
def test_a_call_grammar_takes_calls_of_its_style_and_nothing_else(
    tokenizer: Tokenizer, style: Style, options: Any, text: str, fits: bool
):
    options = {"parallel": False, "thinking": False, **options}
    grammar = call_grammar(style, [PLACE], tokenizer, **options)
    assert accepts(Grammars(tokenizer, 320), grammar, text, tokenizer) == fits


def test_parameters_that_are_no_object_are_refused(tokenizer: Tokenizer):
    with pytest.raises(GrammarError, match="tool f have type 'array'"):
        call_grammar("json", [tool("f", type="array")], tokenizer, parallel=False, thinking=False)


# What the model is told


def test_a_template_without_tools_gets_them_as_text(tokenizer: Tokenizer):
    messages = [
        {"role": "system", "content": "be terse"},
        {"role": "assistant", "content": "", "tool_calls": [
            {"function": {"name": "place", "arguments": {"at": "here"}}}]},
    ]  # fmt: skip
    system, called = introduce(messages, [PLACE])
    assert system["content"].startswith("be terse\n\n# Tools") and json.dumps(PLACE) in system["content"]
    expected = '<tool_call>\n{"name": "place", "arguments": {"at": "here"}}\n</tool_call>'
    assert called["content"] == expected and "tool_calls" not in called
    assert style_of(tokenizer) == "hermes"


@pytest.mark.parametrize(
    "template, style",
    [
        ("{{ tools }}<tool_call>", "hermes"),
        ("{{ tools }}[TOOL_CALLS]", "mistral"),
        ("{{ tools }}<|channel|>", "harmony"),
        ("{{ tools }}", "json"),
    ],
)
def test_the_style_is_what_the_template_shows(tiny_model: Path, tmp_path: Path, template: str, style: str):
    (tmp_path / "tokenizer.json").write_bytes((tiny_model / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    tokenizer = Tokenizer(tmp_path)
    assert style_of(tokenizer) == style and tokenizer.template_takes_tools
    shown = tokenizer.apply_chat_template([], tools=[PLACE])
    assert "place" in shown


# Ids that the model chose


END = "<|im_end|>"


def letters(tokenizer: Tokenizer, word: str) -> list[int]:
    """One id a letter: not what encoding gives."""
    assert (odd := [tokenizer.encode(letter)[0] for letter in word]) != tokenizer.encode(word)
    return odd


def test_known_ids_are_kept_and_the_longest_known_text_wins(tokenizer: Tokenizer):
    known = ConversationIds(tokenizer, False)
    odd, end, begin = letters(tokenizer, "expert"), tokenizer.encode(END), tokenizer.encode("the ")
    known.remember("the ", begin, [*odd, *end])
    known.remember(f"the expert{END}", [*begin, *odd, *end], [*odd, *end])
    leaves = tokenizer.encode(" leaves")
    assert known.encode(f"the expert{END}expert{END} leaves") == begin + (odd + end) * 2 + leaves
    assert known.encode(f"the expert{END} leaves") == begin + odd + end + leaves
    assert known.encode("an expert") == tokenizer.encode("an expert")


def test_an_answer_cut_in_a_word_is_known_only_where_a_special_token_follows(tokenizer: Tokenizer):
    """Once what somebody had been answered changed what a longer text of somebody else's became."""
    known = ConversationIds(tokenizer, False)
    begin, odd = tokenizer.encode("the "), letters(tokenizer, "exp")
    known.remember("the ", begin, odd)
    for text in ("the expert leaves", "the exp", "the exp leaves"):
        assert known.encode(text) == tokenizer.encode(text)
    assert known.encode(f"the exp{END} more") == begin + odd + tokenizer.encode(f"{END} more")


def test_a_longer_text_that_cannot_be_used_does_not_hide_a_shorter_one(tokenizer: Tokenizer):
    known = ConversationIds(tokenizer, False)
    begin, odd, end = tokenizer.encode("the "), letters(tokenizer, "expert"), tokenizer.encode(END)
    known.remember("the ", begin, [*odd, *end])
    known.remember(f"the expert{END}", [*begin, *odd, *end], odd[:3])
    assert known.encode(f"the expert{END}expert") == begin + odd + end + tokenizer.encode("expert")


def test_no_more_texts_are_kept_than_may_be(tokenizer: Tokenizer):
    known = ConversationIds(tokenizer, False, most=2, most_characters=20)
    for word in ("first", "second", "third"):
        known.remember(word, [1], tokenizer.encode("x"))
    assert len(known) == 2
    known.remember("y" * 30, [1], tokenizer.encode("x"))
    known.remember("z" * 16, [1], tokenizer.encode("x"))
    assert len(known) == 1
