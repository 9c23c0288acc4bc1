"""Text to token ids and back: tokenizer.json, streamed decoding, the model's chat template.

Knows nothing about weights and loads no torch. The files come from strangers: their sizes are capped and
their values checked. A chat template is a program, so it runs in jinja2's sandbox, and its loop rounds, calls
and output are limited. What that cannot stop is a single step that asks for much memory, such as 'x' * 10**9.
"""

import json
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
import tokenizers
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext

from flashmoe.errors import TokenizerError

_LARGEST_TOKENIZER_BYTES = 256 * 2**20  # the largest we know of has 33 MB
_LARGEST_CONFIG_BYTES = 16 * 2**20
_LARGEST_TEMPLATE_BYTES = 2**20

# Loop rounds and calls of one rendering; a chat of 1,000 messages takes one like Qwen3's 3,000.
_MOST_TEMPLATE_STEPS = 1_000_000
_MOST_TEMPLATE_CHARACTERS = 2**20  # on top of four times those of the messages

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")  # how vocabularies with byte fallback spell one byte
_REPLACEMENT = "\ufffd"  # what decoding gives for bytes that are not, or not yet, a character


def _bytes_as_characters() -> dict[str, int]:
    """How byte-level vocabularies spell bytes: printable Latin-1 as itself, the others from U+0100 on, as
    GPT-2's bytes_to_unicode has it."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


_BYTE_OF = _bytes_as_characters()


class Tokenizer:
    """The tokenizer of a model folder. Raises TokenizerError for files that are missing or unusable."""

    def __init__(self, folder: Path) -> None:
        config = _read_json(folder / "tokenizer_config.json")
        special_tokens = _special_tokens(config)
        template = _template_source(folder, config)
        self._tokenizer = _load_tokenizer(folder / "tokenizer.json")
        self._chat_template = None if template is None else ChatTemplate(template, special_tokens)
        # By id, as text spells them. No other token reaches across one: what is before and behind it can be
        # encoded by itself.
        self.special_tokens: Mapping[int, str] = {
            id: token.content
            for id, token in self._tokenizer.get_added_tokens_decoder().items()
            if token.special
        }
        ending = self._tokenizer.token_to_id(special_tokens.get("eos_token", ""))
        self.eos_token_ids = _eos_token_ids(folder) | frozenset(() if ending is None else (ending,))

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Token ids of `text`; special tokens that are written out in it count as such.

        `add_special_tokens`: add what the model wants around plain text, such as a first <s>; a chat template
        writes those itself. Raises TokenizerError for text that is not Unicode.
        """
        try:
            return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)
        except TypeError as error:  # half a surrogate pair, as from a terminal that does not speak UTF-8
            raise TokenizerError("the text is not Unicode; check the encoding of its source") from error

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`; those without a token, which padded vocabularies have, give none."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens))

    @property
    def has_chat_template(self) -> bool:
        return self._chat_template is not None

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The text that the model sees for `messages`, each with a "role" and a "content".

        `tools`: functions that the model may call, as OpenAI's API writes them. `variables`: others that the
        template knows, such as enable_thinking; ours come first. A base model, without a template, continues
        text: it sees that of the messages, one after the other. Some other model's markup (llama.cpp takes
        ChatML) would be noise to it. Raises TokenizerError when the template is broken or refuses the
        messages.
        """
        if self._chat_template is None:
            return "".join(message["content"] for message in messages)
        return self._chat_template.render(messages, add_generation_prompt, tools, variables)

    @property
    def template_takes_tools(self) -> bool:
        """Whether the chat template says anything about tools."""
        return self._chat_template is not None and self._chat_template.takes_tools

    def template_mentions(self, text: str) -> bool:
        """Whether the chat template's source contains `text`: which markup its model was trained on."""
        return self._chat_template is not None and text in self._chat_template.source

    def token_text(self, id: int) -> str:
        """The text of one token by itself, special ones included; U+FFFD where it is part of a character."""
        text = self.decode([id], skip_special_tokens=False)
        spelled = self._tokenizer.id_to_token(id) or ""
        # sentencepiece drops the space that begins a text, and here every token does
        return f" {text}" if spelled.startswith("\u2581") and not text.startswith(" ") else text

    def token_bytes(self, id: int) -> bytes:
        """The bytes of one token, which need not be whole characters."""
        text = self.token_text(id)
        spelled = self._tokenizer.id_to_token(id) or ""
        if _REPLACEMENT not in text:
            return text.encode("utf-8")
        if _BYTE_TOKEN.fullmatch(spelled):
            return bytes([int(spelled[3:5], 16)])
        if all(character in _BYTE_OF for character in spelled):
            return bytes(_BYTE_OF[character] for character in spelled)
        return text.encode("utf-8")

    def id_of(self, token: str) -> int | None:
        """The id of a token as the vocabulary spells it."""
        id = self._tokenizer.token_to_id(token)
        return None if id is None else int(id)

    def visible_token(self, id: int) -> str | None:
        """The token as the vocabulary spells it; None where decoding skips the id."""
        return None if id in self.special_tokens else self._tokenizer.id_to_token(id)


class StreamDecoder:
    """Decodes ids one at a time; the pieces join to what `Tokenizer.decode` gives for all of them.

    Only complete characters come out. Each decode includes the ids of the piece before, since a decoder may
    treat the first token apart (sentencepiece drops its space); the work per token does not grow.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = []  # the ids of the piece before
        self._context_text = ""
        self._pending: list[int] = []  # the ids behind it, whose text is not out yet
        self._next_try = 1  # how many of them make another decode worth while

    def push(self, id: int) -> str:
        """The text that became complete with `id`: often a word, "" in the middle of a character."""
        token = self._tokenizer.visible_token(id)
        if token is None:
            return ""
        self._pending.append(id)
        # One invalid byte makes its whole run of byte tokens invalid: the run must end before it is certain.
        if len(self._pending) < self._next_try or _BYTE_TOKEN.fullmatch(token):
            return ""
        text = self._pending_text()
        if not text or text.endswith(_REPLACEMENT):
            # A character takes a few tokens. After more than those this is no text: try ever less often.
            self._next_try = len(self._pending) + max(1, len(self._pending) // 8)
            return ""
        self._start_behind(self._pending)
        return text

    def finish(self) -> str:
        """The rest, with U+FFFD for what never became a character."""
        text = self._pending_text()
        self._start_behind([])
        return text

    def _pending_text(self) -> str:
        return self._tokenizer.decode(self._context + self._pending)[len(self._context_text) :]

    def _start_behind(self, context: list[int]) -> None:
        self._context, self._context_text = context, self._tokenizer.decode(context)
        self._pending, self._next_try = [], 1


class ChatTemplate:
    """A jinja2 template out of a model's files, rendered as transformers renders it."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """`special_tokens`: the text of bos_token, eos_token, … for the template to write."""
        self.source = source
        self._special_tokens = dict(special_tokens)
        self._environment = _TemplateEnvironment()
        self._one_at_a_time = threading.Lock()

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The template's text for `messages`; raises TokenizerError for whatever goes wrong in it."""
        conversation = [dict(message) for message in messages]
        limit = _MOST_TEMPLATE_CHARACTERS + 4 * sum(len(m.get("content") or "") for m in conversation)
        ours = {
            **self._special_tokens,
            "messages": conversation,
            "add_generation_prompt": add_generation_prompt,
            "tools": None if tools is None else [dict(tool) for tool in tools],
            "documents": None,
        }
        pieces, characters = [], 0
        try:
            with self._one_at_a_time:  # the count of steps is the environment's
                self._environment.steps_left = _MOST_TEMPLATE_STEPS
                for piece in self._template.generate({**(variables or {}), **ours}):
                    pieces.append(piece)
                    characters += len(piece)
                    if characters > limit:
                        raise LimitExceeded(f"it wrote more than {limit} characters")
        except _Refusal as error:
            raise TokenizerError(f"the chat template refuses these messages: {_printable(error)}") from error
        except Exception as error:  # a template can raise anything: it is a program
            what = type(error).__name__
            raise TokenizerError(f"the chat template failed with {what}: {_printable(error)}") from error
        return "".join(pieces)

    @cached_property
    def takes_tools(self) -> bool:
        """Whether the template reads the variable `tools`; a broken one does not."""
        try:
            names = self._environment.parse(self.source).find_all(nodes.Name)
        except jinja2.TemplateError:
            return False
        return any(name.name == "tools" for name in names)

    @cached_property
    def _template(self) -> jinja2.Template:
        """Compiled on first use: a model with a broken template can still continue plain text."""
        tree = self._environment.parse(self.source)
        for loop in tree.find_all(nodes.For):
            counted = nodes.Filter(loop.iter, _COUNTED, [], [], None, None)
            loop.iter = counted.set_lineno(loop.lineno).set_environment(self._environment)
        return self._environment.from_string(tree)


class _Refusal(jinja2.TemplateError):
    """The template called raise_exception."""


class LimitExceeded(jinja2.TemplateError):
    """The template runs or writes without end."""


class _GenerationTag(jinja2.ext.Extension):
    """{% generation %} … {% endgeneration %}: marks the assistant's part for training, and nothing to us."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


_COUNTED = "counted by flashmoe"  # a filter that no template can name


class _TemplateEnvironment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """What templates written for transformers expect, with a limit on loop rounds and calls."""

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationTag, jinja2.ext.loopcontrols],
            optimized=False,  # the optimizer would count loops over constants once, while compiling
        )
        self.steps_left = _MOST_TEMPLATE_STEPS
        self.filters["tojson"] = _to_json
        self.filters[_COUNTED] = self._counted
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        del self.globals["lipsum"]  # makes as much text as it is asked for

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        self._spend(1)
        if isinstance(obj, LoopContext) and args:  # loop(items), in a recursive loop
            args = (self._counted(args[0]), *args[1:])
        return super().call(context, obj, *args, **kwargs)

    def _counted(self, items: Iterable[Any]) -> Iterable[Any]:
        """`items` of a loop, paid for at once if it is known how many they are."""
        if not isinstance(items, Sized):
            return self._counted_one_by_one(items)
        self._spend(len(items))
        return items

    def _counted_one_by_one(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self._spend(1)
            yield item

    def _spend(self, steps: int) -> None:
        self.steps_left -= steps
        if self.steps_left < 0:
            raise LimitExceeded(f"it takes more than {_MOST_TEMPLATE_STEPS} steps")


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike jinja2's own: not escaped for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise _Refusal(str(message))


def _template_source(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The chat template, from its own file, tokenizer_config.json or the older chat_template.json."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return _decoded(path, _read(path, _LARGEST_TEMPLATE_BYTES))
    for name, values in (
        ("tokenizer_config.json", config),
        ("chat_template.json", _read_json(folder / "chat_template.json")),
    ):
        template = values.get("chat_template")
        if isinstance(template, list):
            template = _default_template(folder / name, template)
        if template is None:
            continue
        if not isinstance(template, str) or len(template) > _LARGEST_TEMPLATE_BYTES:
            raise TokenizerError(f"{folder / name}: chat_template {_shown(template)} is no text below 1 MiB")
        return template
    return None


def _default_template(path: Path, named: list[Any]) -> Any:
    """Out of [{"name": …, "template": …}, …]: the one named "default", or the only one."""
    entries = [entry for entry in named if isinstance(entry, dict) and isinstance(entry.get("name"), str)]
    templates = {entry["name"]: entry.get("template") for entry in entries}
    if len(templates) == 1:
        return next(iter(templates.values()))
    if "default" not in templates:
        raise TokenizerError(f"{path}: none of the chat templates {_shown(list(templates))} is named default")
    return templates["default"]


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Texts of the special tokens in tokenizer_config.json, spelled "<s>" or {"content": "<s>", …}."""
    texts = {}
    for name in _SPECIAL_TOKENS:
        value = config.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            texts[name] = text
    return texts


def _eos_token_ids(folder: Path) -> frozenset[int]:
    """All ids that end a text according to any of the files; they often name different ones."""
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        value = _read_json(folder / name).get("eos_token_id")
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(id, int) and not isinstance(id, bool) and id >= 0 for id in ids):
            raise TokenizerError(f"{folder / name}: eos_token_id {_shown(value)} is no id and no list of ids")
        found.update(ids)
    return frozenset(found)


def _load_tokenizer(path: Path) -> tokenizers.Tokenizer:
    if not path.is_file():
        raise TokenizerError(
            f"{path} is missing; only models with this file can be used:"
            " transformers writes it with AutoTokenizer.from_pretrained(…).save_pretrained(…)"
        )
    data = _read(path, _LARGEST_TOKENIZER_BYTES)
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(data)
        tokenizer.no_truncation()  # the file may ask for both
        tokenizer.no_padding()
        tokenizer.decode(tokenizer.encode("text").ids)  # some damage shows on first use only
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of the library is no Exception
        raise TokenizerError(f"{path} is no usable tokenizer: {_printable(error)}; get it again") from error
    return tokenizer


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, empty without the file."""
    if not path.is_file():
        return {}
    try:
        values = json.loads(_decoded(path, _read(path, _LARGEST_CONFIG_BYTES)))
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path} is not JSON: {_printable(error)}; get it again") from error
    if not isinstance(values, dict):
        raise TokenizerError(f"{path} holds a {type(values).__name__}, not an object; get it again")
    return values


def _read(path: Path, most_bytes: int) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(most_bytes + 1)
    except OSError as error:
        raise TokenizerError(f"{path} cannot be read: {error.strerror}") from error
    if len(data) > most_bytes:
        raise TokenizerError(f"{path} has over {most_bytes >> 20} MiB; that is not what its name says")
    return data


def _decoded(path: Path, data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path} is not UTF-8 text; get it again") from error


def _printable(error: BaseException) -> str:
    """The message on one line of bounded length, without control characters."""
    text = str(error)[:300]
    return "".join(character if character.isprintable() else " " for character in text)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
