"""Answers that must be JSON, follow a JSON schema or a grammar: which tokens may come next (llguidance).

Schemas and grammars come from strangers: their size and depth are limited here, the work they cause by
llguidance's own limits. Knows the tokenizer, neither model nor server.
"""

import json
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import llguidance
import numpy as np

from flashmoe.errors import ConfigError, FlashMoEError
from flashmoe.sampler import Allowed
from flashmoe.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

LARGEST_SCHEMA_CHARACTERS = 64 * 1024
DEEPEST_SCHEMA = 32
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
        self._lock = threading.Lock()
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
        matcher = llguidance.LLMatcher(self._ready(), grammar, log_level=0, limits=_limits())
        if matcher.is_error():
            raise GrammarError(f"the {what} cannot be used: {_first_line(matcher.get_error())}")
        return GrammarConstraint(matcher, self._vocab_size)

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
        """The tokens that may come now, [V]; raises FlashMoEError where the grammar's limits end it."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            raise FlashMoEError(f"the grammar became too complex: {_first_line(self._matcher.get_error())}")
        allowed: Allowed = np.unpackbits(bits, count=self._vocab_size, bitorder="little").astype(np.bool_)
        if not allowed.any():
            raise FlashMoEError("the grammar leaves no token to go on with; use a simpler schema")
        return allowed

    def accept(self, token_id: int) -> None:
        """A token was chosen."""
        if not self._matcher.consume_token(token_id):
            raise FlashMoEError(f"the grammar refuses token {token_id} that it had allowed")

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
