"""Answers that must be JSON, follow a JSON schema or a grammar: which tokens may come next (llguidance).

Schemas and grammars come from strangers: their size, depth and what llguidance has no limit for are limited
here, the other work they cause by its own limits. Knows the tokenizer, neither model nor server.
"""

import json
import math
import threading
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import llguidance
import numpy as np

from flashmoe.errors import ConfigError, QueueFullError
from flashmoe.sampler import Allowed
from flashmoe.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

LARGEST_SCHEMA_CHARACTERS = 64 * 1024
DEEPEST_SCHEMA = 32
# What llguidance 1.x works at without an end: patterns that one text must all match (12: 0.05 s, 16: 5 s, 60:
# never), each pair of patterns of names (100: 0.1 s, 400: 24 s), remainders of a division (10**5: 0.5 s).
MOST_COMBINED_PATTERNS = 8
MOST_NAME_PATTERNS = 32
MOST_REMAINDERS = 10_000
LONGEST_COMPILE_S = 10.0  # against what we do not know of
# As json.dumps writes it, which is what chat templates show to models. Free whitespace would let a model
# write line ends for ever.
JSON_STYLE: "JsonCompileOptions" = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
}


class GrammarError(ConfigError):
    """A schema or grammar that cannot be used."""


class Grammars:
    """Makes constraints for one tokenizer. Compiling takes a while: not for an event loop's thread."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._source, self._vocab_size = tokenizer, vocab_size
        self._lock, self._turn = threading.Lock(), threading.Condition()
        self._compiling = self._overran = False  # of who has the turn
        self._tokenizer: llguidance.LLTokenizer | None = None

    def any_object(self) -> "GrammarConstraint":
        """Some JSON object."""
        return self.schema({"type": "object"})

    def schema(self, schema: Mapping[str, Any]) -> "GrammarConstraint":
        """A JSON value that follows `schema`; raises GrammarError for one that is wrong or too large."""
        check_schema(schema)
        return self._constraint(json_grammar(schema), "schema")

    def lark(self, grammar: str) -> "GrammarConstraint":
        """Text of a grammar in llguidance's Lark dialect."""
        return self._constraint(llguidance.LLMatcher.grammar_from_lark(grammar), "grammar")

    def _constraint(self, grammar: str, what: str) -> "GrammarConstraint":
        """One is compiled at a time, in a thread that is left to itself if it takes too long: nothing can
        stop it. Others are refused until it ends."""
        self._take_turn()
        made: list[GrammarConstraint | GrammarError] = []

        def compile() -> None:
            try:
                made.append(self._compile(grammar, what))
            except GrammarError as error:
                made.append(error)
            except BaseException as error:  # a panic of the library
                made.append(GrammarError(f"the {what} cannot be used: {_first_line(str(error))}"))
            finally:
                self._end_turn()

        thread = threading.Thread(target=compile, name="grammar", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the system has no more threads
            self._end_turn()
            raise
        thread.join(LONGEST_COMPILE_S)
        with self._turn:
            if not made:  # so its turn has not ended
                self._overran = True
                self._turn.notify_all()
        if not made:
            raise GrammarError(f"the {what} takes more than {LONGEST_COMPILE_S:g} s to compile; simplify it")
        if isinstance(made[0], GrammarError):
            raise made[0]
        return made[0]

    def _take_turn(self) -> None:
        """Wait while another is compiled, but not for one that may never end: who waits holds one of the few
        threads that prepare requests, and those without a schema wait behind it."""
        with self._turn:
            self._turn.wait_for(lambda: not self._compiling or self._overran, LONGEST_COMPILE_S)
            if self._compiling:
                raise QueueFullError(
                    "another schema is still being compiled; try again later", LONGEST_COMPILE_S
                )
            self._compiling = True

    def _end_turn(self) -> None:
        with self._turn:
            self._compiling = self._overran = False
            self._turn.notify()

    def _compile(self, grammar: str, what: str) -> "GrammarConstraint":
        matcher = llguidance.LLMatcher(self._ready(), grammar, log_level=0, limits=_limits())
        if matcher.is_error():
            raise GrammarError(f"the {what} cannot be used: {_first_line(matcher.get_error())}")
        constraint = GrammarConstraint(matcher, self._vocab_size)
        constraint.allowed()  # some are found out at the first token only
        return constraint

    def _ready(self) -> llguidance.LLTokenizer:
        """Made on first use: it takes a quarter of a second and some memory."""
        with self._lock:
            if self._tokenizer is None:
                # Without "slices", which make a step of 1 ms one of 0.2 ms and take 160 bytes a token.
                words = llguidance.TokenizerWrapper(_Words(self._source, self._vocab_size))
                endings = sorted(id for id in self._source.eos_token_ids if id < self._vocab_size)
                self._tokenizer = llguidance.LLTokenizer(
                    words, n_vocab=self._vocab_size, eos_token=endings or None, slices=[]
                )
            return self._tokenizer


class _Words:
    """The tokens as llguidance wants them. From a tokenizer.json it would build the whole tokenizer anew,
    which takes seven times the memory."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        ids = range(vocab_size)
        self._encode = tokenizer.encode
        self.tokens = [tokenizer.token_bytes(id) for id in ids]
        self.special_token_ids = [id for id in ids if tokenizer.visible_token(id) is None]
        self.eos_token_id = min(tokenizer.eos_token_ids, default=0)
        self.bos_token_id = None

    def __call__(self, text: str) -> list[int]:
        return self._encode(text)


class GrammarConstraint:
    """One generation's; a `flashmoe.generation.Constraint`."""

    def __init__(self, matcher: llguidance.LLMatcher, vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size

    def allowed(self) -> Allowed | None:
        """The tokens that may come now, [V]; raises GrammarError where the grammar's limits end it."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            reason = _first_line(self._matcher.get_error())
            raise GrammarError(f"the grammar became too complex: {reason}; use a simpler schema")
        allowed: Allowed = np.unpackbits(bits, count=self._vocab_size, bitorder="little").astype(np.bool_)
        if not allowed.any():
            raise GrammarError("the grammar leaves no token to go on with; use a simpler schema")
        return allowed

    def accept(self, token_id: int) -> None:
        """A token was chosen."""
        if not self._matcher.consume_token(token_id):
            reason = _first_line(self._matcher.get_error())
            raise GrammarError(f"the grammar refuses token {token_id}: {reason}; use a simpler schema")

    @property
    def is_complete(self) -> bool:
        """Nothing more may come."""
        return self._matcher.is_stopped()

    def copy(self) -> "GrammarConstraint":
        """Another at the same place, for another generation."""
        return GrammarConstraint(self._matcher.deep_copy(), self._vocab_size)


def json_grammar(schema: Mapping[str, Any]) -> str:
    """llguidance's grammar of a JSON value."""
    try:
        return llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=JSON_STYLE)
    except ValueError as error:
        raise GrammarError(f"the schema cannot be used: {_first_line(str(error))}") from error


def check_schema(schema: Mapping[str, Any]) -> None:
    """Raises GrammarError for a schema that is larger or deeper than we compile."""
    if depth_of(schema, DEEPEST_SCHEMA) > DEEPEST_SCHEMA:
        raise GrammarError(f"the schema is nested deeper than {DEEPEST_SCHEMA} levels; make it flatter")
    characters = len(json.dumps(schema))
    if characters > LARGEST_SCHEMA_CHARACTERS:
        raise GrammarError(
            f"the schema has {characters} characters, the most is {LARGEST_SCHEMA_CHARACTERS}; shorten it"
        )
    _check_work(list(_objects(schema)))


def _check_work(objects: list[dict[str, Any]]) -> None:
    """Of all objects of a schema."""
    named = sum(len(o["patternProperties"]) for o in objects if _has(o, "patternProperties", dict))
    if named > MOST_NAME_PATTERNS:
        raise GrammarError(f"the schema has {named} patternProperties, the most is {MOST_NAME_PATTERNS}")
    combined = any(map(_combines, objects))
    patterns = named + sum(_has(o, key, str) for o in objects for key in ("pattern", "format"))
    if combined and patterns > MOST_COMBINED_PATTERNS:
        raise GrammarError(
            f"the schema has {patterns} patterns and formats; where allOf, anyOf, oneOf or $ref combine with"
            f" others, the most is {MOST_COMBINED_PATTERNS}"
        )
    divisors = {_digits(o["multipleOf"]) for o in objects if _has(o, "multipleOf", int | float)}
    if (math.prod(divisors) if combined else sum(divisors)) > MOST_REMAINDERS:
        raise GrammarError(f"the schema has too large a multipleOf, or too many: {sorted(divisors)[:8]}")


_COMBINING = (("allOf", list), ("anyOf", list), ("oneOf", list), ("$ref", str))
_COMBINED = (
    ("pattern", str), ("format", str), ("properties", dict), ("patternProperties", dict), ("items", dict),
    ("prefixItems", list), ("additionalProperties", dict), ("multipleOf", int | float), *_COMBINING,
)  # fmt: skip


def _combines(schema: dict[str, Any]) -> bool:
    """Whether one value must follow several schemas: title and type beside a $ref are none."""
    if _has(schema, "allOf", list) and len(schema["allOf"]) > 1:
        return True
    combining = any(_has(schema, key, kind) for key, kind in _COMBINING)
    return combining and sum(_has(schema, key, kind) for key, kind in _COMBINED) > 1


def _has(schema: dict[str, Any], key: str, kind: Any) -> bool:
    """Whether it has a keyword, and not a property of the same name, whose value is a schema."""
    return isinstance(schema.get(key), kind)


def _digits(number: float) -> int:
    """Its digits, without zeros at the ends: 25 of 2500 and 0.25. No more than any limit needs."""
    digits = "".join(map(str, Decimal(str(+number)).as_tuple().digits)).strip("0")
    return int(digits[:9] or "1")


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    """All objects in a value, its nesting being bounded already."""
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _objects(item)


def depth_of(value: Any, deep_enough: int) -> int:
    """How deeply lists and objects are nested; counts no further than one below `deep_enough`."""
    level, depth = [value], 0
    while level and depth <= deep_enough:
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                inner.extend(item.values())
            elif isinstance(item, list):
                inner.extend(item)
        if not any(isinstance(item, dict | list) for item in level):
            break
        level, depth = inner, depth + 1
    return depth


def _limits() -> llguidance.LLParserLimits:
    """A step waits for the grammar with all who run beside it: about 5 ms at most, and 100 MB of states."""
    return llguidance.LLParserLimits(
        step_lexer_fuel=100_000, step_max_items=50_000, max_lexer_states=50_000, max_grammar_size=200_000,
        verbose_errors=False,
    )  # fmt: skip


def _first_line(text: str) -> str:
    """A library's message on one line of bounded length."""
    line = " ".join(text.split())[:200]
    return "".join(character if character.isprintable() else " " for character in line)
