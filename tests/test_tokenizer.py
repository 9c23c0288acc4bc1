"""Tokenizer files, streamed decoding, and chat templates as transformers renders them."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from flashmoe.errors import TokenizerError
from flashmoe.tokenizer import StreamDecoder, Tokenizer

CORPUS = ["hello world, hello there", "the cat sat on the mat", "naïve café — 你好 🙂", "f(x)\n  return"] * 4
SPECIAL = ["<s>", "<|im_start|>", "<|im_end|>"]
CHAT = [
    {"role": "system", "content": "You are terse."},
    {"role": "user", "content": 'Hello <there> & "you"\n'},
    {"role": "assistant", "content": " Hi! 你好 🙂"},
    {"role": "user", "content": "Bye"},
]


def byte_level() -> tokenizers.Tokenizer:
    """Like Qwen's, OLMoE's and SmolLM2's."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<tool call>", normalized=False)])  # added, but not special
    return tokenizer


def sentencepiece_like() -> tokenizers.Tokenizer:
    """Like Mixtral's: spaces as ▁, the first one dropped, rare characters as byte tokens."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=["<unk>", *SPECIAL, *byte_tokens],
        limit_alphabet=30,
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    values = json.loads(tokenizer.to_str())
    values["added_tokens"] = [t for t in values["added_tokens"] if t["content"] not in byte_tokens]
    return tokenizers.Tokenizer.from_str(json.dumps(values))


def metaspace() -> tokenizers.Tokenizer:
    """Spaces as ▁ by the Metaspace pair, as newer conversions of sentencepiece models have it."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=["<unk>", *SPECIAL], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def with_tokens_that_say_nothing() -> tokenizers.Tokenizer:
    """A decoder may drop what is in a token; this one drops tildes, and the first space like the others."""
    words = [f"▁{word}" for word in range(150)] + [f"~{word}" for word in range(150)]
    tokenizer = tokenizers.Tokenizer(models.WordLevel({word: id for id, word in enumerate(words)}, "▁0"))
    nothing = decoders.Replace(tokenizers.Regex("~.*"), "")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), nothing, decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


KINDS = {
    "byte level": byte_level,
    "sentencepiece": sentencepiece_like,
    "metaspace": metaspace,
    "says nothing": with_tokens_that_say_nothing,
}


def write_model(folder: Path, **files: Any) -> Path:
    """A model folder: a byte-level tokenizer.json, and `tokenizer_config={…}` and the like as JSON files."""
    byte_level().save(str(folder / "tokenizer.json"))
    for name, values in files.items():
        (folder / f"{name}.json").write_text(json.dumps(values), "utf-8")
    return folder


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("model")
    KINDS[request.param]().save(str(folder / "tokenizer.json"))
    return Tokenizer(folder)


def streamed(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    stream = StreamDecoder(tokenizer)
    return [*(stream.push(id) for id in ids), stream.finish()]


# Encoding


def test_text_comes_back_as_it_was(tmp_path: Path) -> None:
    tokenizer = Tokenizer(write_model(tmp_path))
    ids = tokenizer.encode("hello 你好 <|im_end|> 🙂")
    assert tokenizer.decode(ids) == "hello 你好  🙂"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "hello 你好 <|im_end|> 🙂"


def test_what_the_model_wants_around_plain_text_is_added_on_request_only(tmp_path: Path) -> None:
    raw = byte_level()
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    raw.enable_truncation(3)
    raw.enable_padding(length=9)
    raw.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path)
    plain = tokenizer.encode("hello there, cat")
    assert len(plain) > 3, "the file's truncation and padding are for training"
    assert tokenizer.encode("hello there, cat", add_special_tokens=True) == [0, *plain]


def test_text_that_is_not_unicode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="the text is not Unicode"):
        Tokenizer(write_model(tmp_path)).encode("caf\udcc3")


def test_the_ids_that_end_a_text_come_from_all_files(tmp_path: Path) -> None:
    write_model(
        tmp_path,
        generation_config={"eos_token_id": [7, 8]},
        config={"eos_token_id": 7, "model_type": "mixtral"},
        tokenizer_config={"eos_token": {"content": "<|im_end|>", "__type": "AddedToken"}},
    )
    assert Tokenizer(tmp_path).eos_token_ids == {7, 8, SPECIAL.index("<|im_end|>")}


def test_a_model_that_names_no_end_has_none(tmp_path: Path) -> None:
    write_model(tmp_path, config={"eos_token_id": None}, tokenizer_config={"eos_token": None})
    assert Tokenizer(tmp_path).eos_token_ids == frozenset()


# Streamed decoding


@settings(deadline=None)
@given(text=st.text(st.characters(codec="utf-8"), max_size=20) | st.sampled_from(["a 🙂🙂 b", "你好 世界"]))
def test_streamed_text_joins_to_the_whole_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


@settings(deadline=None)
@given(ids=st.lists(st.integers(0, 350), max_size=40))
def test_any_ids_stream_to_what_decode_gives(tokenizer: Tokenizer, ids: list[int]) -> None:
    """Half characters, bytes that never were any, special tokens, ids without a token."""
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


def test_a_character_comes_out_when_its_last_byte_does(tmp_path: Path) -> None:
    tokenizer = Tokenizer(write_model(tmp_path))
    ids = tokenizer.encode("🦀")  # not in the corpus, so spelled in bytes
    assert len(ids) > 1
    assert streamed(tokenizer, ids) == [""] * (len(ids) - 1) + ["🦀", ""]


def test_a_character_cut_off_shows_as_such_at_the_end_only(tmp_path: Path) -> None:
    tokenizer = Tokenizer(write_model(tmp_path))
    ids = tokenizer.encode("🦀")[:-1]
    assert streamed(tokenizer, ids) == [""] * len(ids) + ["\ufffd"]


@pytest.mark.parametrize("kind", ["sentencepiece", "metaspace"])
def test_the_first_space_is_dropped_and_no_other(tmp_path: Path, kind: str) -> None:
    """Decoding each token alone would run the words together."""
    KINDS[kind]().save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path)
    ids = tokenizer.encode("the cat")
    assert (tokenizer.visible_token(ids[0]) or "").startswith("▁")
    assert "".join(streamed(tokenizer, ids)) == "the cat"


def test_work_per_token_does_not_grow_with_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, decoded = Tokenizer(write_model(tmp_path)), 0
    decode = tokenizer.decode

    def counting(ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        nonlocal decoded
        decoded += len(ids)
        return decode(ids, skip_special_tokens)

    monkeypatch.setattr(tokenizer, "decode", counting)
    for text in ("the cat sat on the mat " * 100, "🦀" * 200):
        ids, decoded = tokenizer.encode(text), 0
        streamed(tokenizer, ids)
        assert decoded < 12 * len(ids)
    lead_byte, decoded = tokenizer.encode("🦀")[0], 0
    streamed(tokenizer, [lead_byte] * 2000)  # no character ever
    assert decoded < 20 * 2000


# Chat templates, against transformers

CHATML = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MISTRAL = """{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}

{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('After the optional system message, roles must alternate user/assistant') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {%- if loop.first and system_message is defined %}
            {{- ' [INST] ' + system_message + '\n\n' + message['content'] + ' [/INST]' }}
        {%- else %}
            {{- ' [INST] ' + message['content'] + ' [/INST]' }}
        {%- endif %}
    {%- elif message['role'] == 'assistant' %}
        {{- ' ' + message['content'] + eos_token}}
    {%- endif %}
{%- endfor %}
"""
QWEN = """{%- if tools %}
    {{- '# Tools' }}{%- for tool in tools %}{{- tool | tojson }}{%- endfor %}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {%- set content = message.content.split('</think>')[-1].lstrip('\n') %}
        {{- '<|im_start|>' + message.role + '\n' }}
        {%- generation %}{{- content }}{% endgeneration %}{{- '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}
"""
LLAMA = """{{- bos_token }}
{%- set date_string = strftime_now("%Y") if strftime_now is defined else "2024" %}
{% for message in messages %}
  {% if message.role == "tool" %}{% continue %}{% endif %}
{{ loop.index ~ "/" ~ loop.length }} {{ message | tojson(indent=2) }}
    {{ messages | map(attribute="role") | join("+") }}
    {% for key, text in message.items() if key != "role" %}{{ loop.last }}{{ text }}{% endfor %}
    {% if loop.last %}{{ date_string }}{% break %}{% endif %}
{% endfor %}
"""
TEMPLATES = {"chatml": CHATML, "mistral": MISTRAL, "qwen": QWEN, "llama": LLAMA}
TOKENS = {"bos_token": "<s>", "eos_token": "<|im_end|>"}


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("chat", [CHAT, CHAT[1:], CHAT[1:2]], ids=["system", "turns", "one"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_templates_give_what_transformers_gives(
    tmp_path: Path, template: str, chat: list[dict[str, str]], add_generation_prompt: bool
) -> None:
    write_model(tmp_path, tokenizer_config={"chat_template": TEMPLATES[template], **TOKENS})
    fast: Any = PreTrainedTokenizerFast  # its constructor has no annotations
    theirs = fast(tokenizer_object=byte_level(), chat_template=TEMPLATES[template], **TOKENS)
    assert Tokenizer(tmp_path).apply_chat_template(chat, add_generation_prompt) == theirs.apply_chat_template(
        chat, tokenize=False, add_generation_prompt=add_generation_prompt
    )


def chat_with(folder: Path, template: str, chat: list[dict[str, str]] = CHAT) -> str:
    write_model(folder, tokenizer_config={"chat_template": template})
    return Tokenizer(folder).apply_chat_template(chat)


def test_what_a_template_refuses_is_told_in_its_words(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="refuses these messages: After the optional system"):
        chat_with(tmp_path, MISTRAL, CHAT[2:])


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__ }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages|attr('__class__') }}",
        "{{ '{0.__class__}'.format(messages) }}",
        "{{ raise_exception.__globals__ }}",
    ],
)
def test_a_template_cannot_reach_python(tmp_path: Path, template: str) -> None:
    try:
        assert "class" not in chat_with(tmp_path, template)
    except TokenizerError as error:
        assert "SecurityError" in str(error)


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(10**9) %}{% endfor %}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% set n = range(9999)|list %}{% for a in n %}{% for b in n|map('int') %}{% endfor %}{% endfor %}",
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% set n = range(9999)|list %}"
        "{% for a in n recursive %}{% if loop.depth < 3 %}{{ loop(n) }}{% endif %}{% endfor %}",
        "{% for a in range(99999) %}{{ 'a long line of text' }}{% endfor %}",
        "{% for a in 'constant' * 10 %}" * 4 + "{% endfor %}" * 4,
        "{{ lipsum(n=10**9) }}",
    ],
)
def test_a_template_without_end_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str
) -> None:
    monkeypatch.setattr("flashmoe.tokenizer._MOST_TEMPLATE_STEPS", 200_000)  # to be done sooner
    with pytest.raises(TokenizerError, match="the chat template failed with"):
        chat_with(tmp_path, template)


@pytest.mark.parametrize("template", ["{% if %}", "{{ 1 / 0 }}", "{{ messages[99].content }}", "{{ no() }}"])
def test_a_broken_template_is_an_error_only_when_used(tmp_path: Path, template: str) -> None:
    write_model(tmp_path, tokenizer_config={"chat_template": template})
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.encode("hello")
    with pytest.raises(TokenizerError, match="the chat template failed with"):
        tokenizer.apply_chat_template(CHAT)


def test_a_template_cannot_change_what_it_is_given(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="SecurityError"):
        chat_with(tmp_path, "{{ messages.append(1) }}")


def test_a_templates_message_cannot_drive_the_terminal(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError) as refused:
        chat_with(tmp_path, "{{ raise_exception('\\x1b[2J' + '\n' * 1000) }}")
    assert str(refused.value).isprintable() and len(str(refused.value)) < 400


def test_a_base_model_sees_the_plain_text(tmp_path: Path) -> None:
    tokenizer = Tokenizer(write_model(tmp_path))
    assert not tokenizer.has_chat_template
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Once upon a"}]) == "Once upon a"


# Where the template comes from


def test_a_template_may_be_a_list_of_named_ones(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    write_model(tmp_path, tokenizer_config={"chat_template": named})
    assert Tokenizer(tmp_path).apply_chat_template(CHAT) == "plain"


def test_named_templates_without_a_default_are_refused_unless_there_is_only_one(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "rag", "template": "documents"}]
    write_model(tmp_path, tokenizer_config={"chat_template": named})
    with pytest.raises(TokenizerError, match=r"none of the chat templates .*rag.* is named default"):
        Tokenizer(tmp_path)
    write_model(tmp_path, tokenizer_config={"chat_template": named[:1]})
    assert Tokenizer(tmp_path).apply_chat_template(CHAT) == "tools"


def test_a_template_file_goes_over_the_config_and_that_over_the_older_file(tmp_path: Path) -> None:
    write_model(tmp_path, chat_template={"chat_template": "old"})
    assert Tokenizer(tmp_path).apply_chat_template(CHAT) == "old"
    write_model(tmp_path, tokenizer_config={"chat_template": "config"})
    assert Tokenizer(tmp_path).apply_chat_template(CHAT) == "config"
    (tmp_path / "chat_template.jinja").write_text("own file {{ messages[0].role }}", "utf-8")
    assert Tokenizer(tmp_path).apply_chat_template(CHAT) == "own file system"


def test_special_tokens_may_be_spelled_as_objects(tmp_path: Path) -> None:
    bos = {"content": "<s>", "lstrip": False}
    tokens = {"bos_token": bos, "eos_token": "</s>", "pad_token": None, "unk_token": 3}
    template = "{{ bos_token }}|{{ eos_token }}|{{ pad_token is defined }}|{{ unk_token is defined }}"
    write_model(tmp_path, tokenizer_config={"chat_template": template, **tokens})
    assert Tokenizer(tmp_path).apply_chat_template(CHAT) == "<s>|</s>|False|False"


# Files that are missing or damaged


def test_a_folder_without_tokenizer_json_is_an_error_that_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer\.json is missing; .* transformers writes it"):
        Tokenizer(tmp_path)


def damaged(change: str) -> bytes:
    """A tokenizer.json with one thing wrong."""
    values = json.loads(byte_level().to_str())
    if change == "merges of unknown tokens":
        values["model"]["merges"] = [["a", "zzzz"]]
    elif change == "bad regex":
        values["pre_tokenizer"] = {
            "type": "Split", "pattern": {"Regex": "(((("}, "behavior": "Isolated", "invert": False
        }  # fmt: skip
    elif change == "a post-processor that panics":
        values["post_processor"] = {
            "type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<x>", "type_id": 0}}],
            "pair": [], "special_tokens": {},
        }  # fmt: skip
    return json.dumps(values).encode()


@pytest.mark.parametrize(
    "data",
    [b"", b"{}", b"null", b"[" * 100_000, b"\xff\xfe", b'{"version": "1.0", "model": {"type": "BPE"}}']
    + [damaged("merges of unknown tokens"), damaged("bad regex"), damaged("a post-processor that panics")],
    ids=["empty", "{}", "null", "deep", "not UTF-8", "half", "merges", "regex", "panic"],
)  # fmt: skip
def test_a_damaged_tokenizer_json_is_an_error_that_names_the_file(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(data)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json is no usable tokenizer: .*; get it again"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("data", [b"{", b"[" * 100_000, b"[]", b'"text"', b"\xff", b"9" * 5000])
@pytest.mark.parametrize("name", ["tokenizer_config", "generation_config", "config", "chat_template"])
def test_a_damaged_config_is_an_error_that_names_the_file(tmp_path: Path, name: str, data: bytes) -> None:
    write_model(tmp_path)
    (tmp_path / f"{name}.json").write_bytes(data)
    with pytest.raises(TokenizerError, match=rf"{name}\.json .*; get it again"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("value", ["2", [1, "2"], True, -1, 1.5, {"id": 2}], ids=str)
def test_a_senseless_eos_token_id_is_refused(tmp_path: Path, value: Any) -> None:
    with pytest.raises(TokenizerError, match=r"config\.json: eos_token_id .* is no id and no list of ids"):
        Tokenizer(write_model(tmp_path, config={"eos_token_id": value}))


@pytest.mark.parametrize("value", [3, {"default": "x"}, "x" * (2**20 + 1)], ids=["number", "object", "huge"])
def test_a_senseless_chat_template_is_refused(tmp_path: Path, value: Any) -> None:
    with pytest.raises(TokenizerError, match=r"config\.json: chat_template .* is no text below 1 MiB"):
        Tokenizer(write_model(tmp_path, tokenizer_config={"chat_template": value}))


def test_files_too_large_to_be_true_are_not_read(tmp_path: Path) -> None:
    write_model(tmp_path)
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(17 * 2**20)
    with pytest.raises(TokenizerError, match=r"config\.json has over 16 MiB"):
        Tokenizer(tmp_path)


def test_the_tokenizer_needs_no_torch() -> None:
    code = "import sys, flashmoe.tokenizer; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Single tokens, and templates with tools


def test_the_bytes_of_tokens_join_to_the_text(tiny_model: Path):
    """Also where a token is a part of a character."""
    tokenizer = Tokenizer(tiny_model)
    for text in ("the expert", "naïve – 日本語 🙂", "a\n\tb"):
        ids = tokenizer.encode(text)
        assert b"".join(tokenizer.token_bytes(id) for id in ids) == text.encode()
    assert "\ufffd" in "".join(tokenizer.token_text(id) for id in tokenizer.encode("日"))


def test_special_tokens_have_their_own_text(tiny_model: Path):
    tokenizer = Tokenizer(tiny_model)
    end = tokenizer.id_of("<|im_end|>")
    assert end is not None and tokenizer.token_text(end) == "<|im_end|>"
    assert tokenizer.visible_token(end) is None
    assert tokenizer.id_of("no such token") is None


def test_a_template_gets_tools_and_variables_but_cannot_lose_the_messages(tmp_path: Path, tiny_model: Path):
    source = "{{ messages[0].content }}{% if tools %}|{{ tools[0].name }}{% endif %}|{{ mood }}"
    (tmp_path / "tokenizer.json").write_bytes((tiny_model / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": source}))
    tokenizer = Tokenizer(tmp_path)
    user = [{"role": "user", "content": "hi"}]
    assert tokenizer.template_takes_tools and tokenizer.template_mentions("mood")
    assert tokenizer.apply_chat_template(user) == "hi|"
    variables = {"mood": "calm", "messages": 1}
    shown = tokenizer.apply_chat_template(user, tools=[{"name": "f"}], variables=variables)
    assert shown == "hi|f|calm"
    assert not Tokenizer(tiny_model).template_takes_tools


def test_a_template_that_gives_tools_a_default_takes_them(tmp_path: Path, tiny_model: Path):
    """Mistral's do; to jinja2 the name is then a variable of the template's own."""
    source = "{% if not tools is defined %}{% set tools = none %}{% endif %}{{ tools }}"
    (tmp_path / "tokenizer.json").write_bytes((tiny_model / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": source}))
    assert Tokenizer(tmp_path).template_takes_tools
