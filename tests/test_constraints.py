"""Constraints: what may be said next is what the schema allows, and hostile schemas are refused."""

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashmoe import constraints
from flashmoe.constraints import GrammarConstraint, GrammarError, Grammars, depth_of
from flashmoe.errors import FlashMoEError, QueueFullError
from flashmoe.tokenizer import Tokenizer

VOCAB = 330  # more than the tokenizer knows, as in padded vocabularies
EITHER: dict[str, Any] = {
    "type": "object",
    "properties": {"kind": {"enum": ["a", "b"]}, "size": {"type": "integer"}},
    "required": ["kind", "size"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Tokenizer:
    return Tokenizer(tiny_model)


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Grammars:
    return Grammars(tokenizer, VOCAB)


def write(constraint: GrammarConstraint, tokenizer: Tokenizer, seed: int, most: int = 200) -> str:
    """Whatever is allowed, chosen at random; the end as soon as it may come."""
    random, ids = np.random.default_rng(seed), []  # type: ignore[var-annotated]
    while not constraint.is_complete and len(ids) < most:
        allowed = constraint.allowed()
        assert allowed is not None and allowed.shape == (VOCAB,) and not allowed[320:].any()
        choices = np.flatnonzero(allowed)
        ending = [id for id in choices if id in tokenizer.eos_token_ids]
        token = int(ending[0] if ending else random.choice(choices))
        constraint.accept(token)
        ids.append(token)
    return tokenizer.decode(ids)


@pytest.mark.parametrize("seed", range(20))
def test_whatever_is_chosen_follows_the_schema(grammars: Grammars, tokenizer: Tokenizer, seed: int):
    constraint = grammars.schema(EITHER)
    text = write(constraint, tokenizer, seed)
    value = json.loads(text)
    assert value["kind"] in ("a", "b") and isinstance(value["size"], int)
    assert text == json.dumps(value), "one style, and no room for endless space"


def test_a_complete_answer_says_so(grammars: Grammars, tokenizer: Tokenizer):
    constraint = grammars.schema({"const": "a"})
    for id in tokenizer.encode('"a"'):
        assert not constraint.is_complete
        constraint.accept(id)
    assert constraint.is_complete


def test_any_object_begins_with_a_brace(grammars: Grammars, tokenizer: Tokenizer):
    allowed = grammars.any_object().allowed()
    assert allowed is not None
    assert {tokenizer.token_text(int(id))[0] for id in np.flatnonzero(allowed)} == {"{"}


def test_a_copy_goes_its_own_way(grammars: Grammars, tokenizer: Tokenizer):
    constraint = grammars.schema(EITHER)
    assert write(constraint.copy(), tokenizer, 1) == write(constraint.copy(), tokenizer, 1)
    assert not constraint.is_complete


def test_a_token_that_was_not_allowed_is_an_error(grammars: Grammars, tokenizer: Tokenizer):
    with pytest.raises(FlashMoEError, match="refuses token"):
        grammars.schema(EITHER).accept(tokenizer.encode("x")[0])


@pytest.mark.parametrize(
    "schema, message",
    [
        ({"type": "nope"}, "Invalid type"),
        ({"$ref": "http://127.0.0.1:1/schema.json"}, "cannot be used"),
        ({"type": "string", "pattern": "("}, "regex"),
        ({"not": {"type": "string"}}, "Unimplemented"),
        ({"allOf": [{"type": "string"}, {"type": "number"}]}, "Unsatisfiable"),
        ({"enum": ["x" * 70_000]}, "70,?.*characters|characters, the most is"),
    ],
)
def test_a_schema_that_cannot_be_followed_is_an_error(grammars: Grammars, schema: Any, message: str):
    with pytest.raises(GrammarError, match=message):
        grammars.schema(schema)


def test_a_schema_that_is_too_deep_is_refused_before_anything_recurses(grammars: Grammars):
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(900):
        schema = {"type": "object", "properties": {"a": schema}}
    with pytest.raises(GrammarError, match="nested deeper than 32"):
        grammars.schema(schema)


PATTERNS = [{"type": "string", "pattern": f".*{i}.*"} for i in range(60)]


def chain(keyword: str) -> dict[str, Any]:
    """Many patterns for one text, each beside the next."""
    if keyword == "$ref":
        links = {f"d{i}": {**PATTERNS[i], "$ref": f"#/$defs/d{i + 1}"} for i in range(59)}
        return {"$ref": "#/$defs/d0", "$defs": {**links, "d59": PATTERNS[59]}}
    schema = PATTERNS[0]
    for pattern in PATTERNS[1:15]:
        schema = {**pattern, keyword: [schema]}
    return schema


@pytest.mark.parametrize(
    "schema, message",
    [
        ({"allOf": PATTERNS}, "60 patterns and formats; where allOf, .* the most is 8"),
        ({"allOf": [{"properties": {"a": p}} for p in PATTERNS]}, "60 patterns and formats"),
        (chain("anyOf"), "15 patterns and formats"),
        (chain("$ref"), "60 patterns and formats"),
        ({"patternProperties": {f"^(a|b)*{i}$": {} for i in range(400)}}, "400 patternProperties.* is 32"),
        ({"type": "integer", "multipleOf": 2**31 - 1}, "too large a multipleOf"),
        ({"type": "number", "multipleOf": 0.0123457}, "too large a multipleOf"),
        ({"allOf": [{"type": "integer", "multipleOf": p} for p in (3, 7, 11, 13, 17, 19)]}, "or too many"),
        ({"type": "integer", "multipleOf": True}, "cannot be used"),
        ({"type": "integer", "multipleOf": 10**4000}, "cannot be used"),
        ({"type": "number", "multipleOf": float("inf")}, "cannot be used"),
        ({"$ref": "#"}, "became too complex"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, "became too complex"),
    ],
)
def test_what_would_be_compiled_for_ever_is_refused(grammars: Grammars, schema: Any, message: str):
    """llguidance counts what a step costs, not what it does before the first: sixty patterns that a text must
    all match held one of the two threads that prepare requests, and the end of the process, for ever."""
    with pytest.raises(GrammarError, match=message):
        grammars.schema(schema)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {f"p{i}": p for i, p in enumerate(PATTERNS)}},
        {"type": "object",
         "properties": {f"p{i}": {"allOf": [{"$ref": "#/$defs/d"}], "title": "T"} for i in range(20)},
         "$defs": {"d": {"type": "string", "format": "date"}}},
        {"type": "object", "properties": {"pattern": PATTERNS[0], "allOf": PATTERNS[1], "$ref": PATTERNS[2]}},
        {"type": "number", "multipleOf": 0.25, "maximum": 100},
        {"anyOf": [{"type": "integer", "multipleOf": 1000}, *PATTERNS[:20]]},
    ],
)  # fmt: skip
def test_what_is_only_large_is_not(grammars: Grammars, schema: Any):
    grammars.schema(schema)


class Slow(Grammars):
    """Compiles for as long as the test wants."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer, VOCAB)
        self.may_end = threading.Event()
        self.threads: list[threading.Thread] = []

    def _compile(self, grammar: str, what: str) -> GrammarConstraint:
        self.threads.append(threading.current_thread())
        assert self.may_end.wait(20)
        return super()._compile(grammar, what)


def test_what_takes_too_long_to_compile_is_left_to_itself_and_others_are_refused_at_once(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
):
    """It can be neither stopped nor waited for; when it has ended, others have their turn. Whoever came
    meanwhile waited as long again, in one of the two threads that prepare requests: so did plain chats."""
    grammars = Slow(tokenizer)
    monkeypatch.setattr(constraints, "LONGEST_COMPILE_S", 0.01)
    with pytest.raises(GrammarError, match="takes more than 0.01 s to compile; simplify it"):
        grammars.any_object()
    monkeypatch.setattr(constraints, "LONGEST_COMPILE_S", 1e6)  # would wait for ever
    for _ in range(2):
        with pytest.raises(QueueFullError, match="still being compiled") as refused:
            grammars.any_object()
    assert refused.value.retry_after_s > 0 and len(grammars.threads) == 1
    grammars.may_end.set()
    grammars.threads[0].join()
    assert grammars.any_object().allowed() is not None


def test_who_waits_for_one_that_takes_too_long_is_refused_as_it_is_found_out(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
):
    grammars, refused = Slow(tokenizer), []

    def wait() -> None:
        with pytest.raises(QueueFullError) as error:
            grammars.any_object()
        refused.append(error.value)

    waiting = threading.Thread(target=wait)
    begun, wait_for = threading.Event(), grammars._turn.wait_for

    def waited_for(*arguments: Any) -> bool:
        begun.set()
        return wait_for(arguments[0], 1e6)  # would wait for ever

    def join(thread: threading.Thread, timeout: float | None = None) -> None:
        """The limit is over when another waits."""
        monkeypatch.undo()
        monkeypatch.setattr(grammars._turn, "wait_for", waited_for)
        waiting.start()
        assert begun.wait(60)

    monkeypatch.setattr(threading.Thread, "join", join)
    with pytest.raises(GrammarError, match="takes more than"):
        grammars.any_object()
    waiting.join()
    assert len(refused) == 1
    grammars.may_end.set()


def test_one_for_which_there_is_no_thread_leaves_the_turn_to_others(
    grammars: Grammars, monkeypatch: pytest.MonkeyPatch
):
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            grammars.any_object()
    assert grammars.any_object().allowed() is not None


def test_a_panic_of_the_library_is_this_schemas_error(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    class Panic(BaseException):
        """As a library in Rust raises."""

    def panics(*_: Any) -> GrammarConstraint:
        raise Panic("unwrap on a None")

    grammars = Grammars(tokenizer, VOCAB)
    monkeypatch.setattr(grammars, "_compile", panics)
    with pytest.raises(GrammarError, match="cannot be used: unwrap on a None"):
        grammars.any_object()


def test_depth_is_counted_in_lists_and_objects():
    assert [depth_of(v, 9) for v in (1, [], [1], {"a": [1]}, [[[]]])] == [0, 1, 1, 2, 3]


def test_a_grammar_that_costs_too_much_ends_with_an_error_not_with_a_hang(
    grammars: Grammars, tokenizer: Tokenizer
):
    """llguidance counts what a step costs."""
    constraint = grammars.schema({"type": "string", "pattern": "^(([a-z]{1,200}){1,200}x){1,200}$"})
    with pytest.raises(FlashMoEError, match="too complex"):
        write(constraint, tokenizer, 0, most=400)
