"""The HTTP API as its clients see it, most of all OpenAI's own: on a tiny random model."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import pytest
from openai import OpenAI
from servers import Server, serving
from starlette.applications import Starlette
from starlette.testclient import TestClient

from flashmoe import LLM
from flashmoe.server.app import page_routes
from flashmoe.server.errors import ApiError
from flashmoe.server.service import check_length

USER: Any = [{"role": "user", "content": "what is the capital of France"}]
COLOURS = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green"]}, "sure": {"type": "boolean"}},
    "required": ["colour", "sure"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def llm(tiny_model: Path) -> Iterator[LLM]:
    with LLM(tiny_model, ram_budget="8G") as llm:
        yield llm


@pytest.fixture(scope="module")
def server(llm: LLM) -> Iterator[Server]:
    with serving(llm) as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[OpenAI]:
    with server.client() as client:
        yield client


def text_of(client: OpenAI, **options: Any) -> str:
    answer = client.chat.completions.create(model="x", messages=USER, **{"max_tokens": 12, **options})
    return answer.choices[0].message.content or ""


# Whole answers and streams


def test_an_answer_has_text_usage_and_the_served_name(client: OpenAI):
    answer = client.chat.completions.create(model="any name", messages=USER, max_tokens=12)
    assert answer.model == "tiny" and answer.object == "chat.completion"
    assert answer.choices[0].finish_reason == "length" and answer.choices[0].message.role == "assistant"
    assert answer.usage is not None and answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12


def test_a_stream_joins_to_the_whole_answer(client: OpenAI):
    whole = text_of(client)
    stream = list(
        client.chat.completions.create(
            model="x", messages=USER, max_tokens=12, stream=True, stream_options={"include_usage": True}
        )
    )
    first, *_, last, usage = stream
    assert first.choices[0].delta.role == "assistant" and first.choices[0].delta.content == ""
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream[:-1]) == whole
    assert last.choices[0].finish_reason == "length"
    assert usage.choices == [] and usage.usage is not None and usage.usage.completion_tokens == 12
    assert len({chunk.id for chunk in stream}) == 1


def test_the_api_gives_what_the_library_gives(llm: LLM, client: OpenAI):
    """The same model, prompt and options: the same text."""
    messages = [{"role": "user", "content": USER[0]["content"]}]
    ids = llm.tokenizer.encode(llm.tokenizer.apply_chat_template(messages))
    answer = client.completions.create(model="x", prompt=ids, max_tokens=12)
    assert answer.choices[0].text == text_of(client)


def test_a_stream_ends_with_done_and_nothing_behind_it(server: Server):
    body = {"messages": USER, "max_tokens": 3, "stream": True}
    status, headers, data = server.request("POST", "/v1/chat/completions", body)
    assert status == 200 and headers["content-type"].startswith("text/event-stream")
    events = data.decode().split("\n\n")
    assert all(event.startswith("data: {") for event in events[:-2])
    assert events[-2:] == ["data: [DONE]", ""]


def test_the_same_seed_gives_the_same_text_and_another_one_another(client: OpenAI):
    drawn = {seed: text_of(client, seed=seed, temperature=5.0) for seed in (1, 2)}
    assert text_of(client, seed=1, temperature=5.0) == drawn[1]
    assert drawn[1] != drawn[2]


def test_n_answers_are_those_of_the_seeds_that_follow(client: OpenAI):
    answer = client.chat.completions.create(
        model="x", messages=USER, max_tokens=12, n=3, seed=5, temperature=5.0
    )
    texts = [choice.message.content for choice in sorted(answer.choices, key=lambda c: c.index)]
    assert texts == [text_of(client, seed=5 + i, temperature=5.0) for i in range(3)]
    assert answer.usage is not None and answer.usage.completion_tokens == 36


def test_text_ends_before_a_stop_string(client: OpenAI):
    whole = text_of(client)
    stop = whole[3:5]
    answer = client.chat.completions.create(model="x", messages=USER, max_tokens=12, stop=[stop])
    assert answer.choices[0].message.content == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_both_names_of_the_length_limit_count(client: OpenAI, name: str):
    options: Any = {name: 4}
    answer = client.chat.completions.create(model="x", messages=USER, **options)
    assert answer.usage is not None and answer.usage.completion_tokens == 4


def test_a_full_context_is_a_length(server: Server, llm: LLM):
    ids = [5] * (llm.engine.context - 3)
    status, answer = server.post("/v1/completions", {"prompt": ids, "max_tokens": 1000})
    assert status == 200 and answer["choices"][0]["finish_reason"] == "length"


def test_a_text_has_the_same_tokens_whatever_was_answered_before(server: Server, llm: LLM):
    """Once the ids of an answer were kept for texts that go on in the middle of its last word."""
    drawn = {"seed": 4, "temperature": 1.0, "repetition_penalty": 1.5}
    _, answer = server.post("/v1/completions", {"prompt": "the ca", "max_tokens": 9, "echo": True, **drawn})
    text = answer["choices"][0]["text"] + "pital"
    _, answer = server.post("/v1/completions", {"prompt": text, "max_tokens": 1})
    assert answer["usage"]["prompt_tokens"] == len(llm.tokenizer.encode(text))


def test_a_second_turn_reuses_the_ids_that_the_model_chose(client: OpenAI):
    """Random bytes hardly ever encode to the ids that made them; the answer's keys and values stay useful."""
    begin: Any = [{"role": "user", "content": "a conversation of its own"}]
    first = client.chat.completions.create(
        model="x", messages=begin, max_tokens=24, seed=3, temperature=1.0,
        extra_body={"repetition_penalty": 1.5},
    )  # fmt: skip
    said = first.choices[0].message.content
    again: Any = [*begin, {"role": "assistant", "content": said}, {"role": "user", "content": "go on"}]
    second = client.chat.completions.create(model="x", messages=again, max_tokens=1)
    assert first.usage is not None and second.usage is not None
    assert second.usage.prompt_tokens_details is not None
    known = first.usage.prompt_tokens + first.usage.completion_tokens
    assert second.usage.prompt_tokens_details.cached_tokens == known - 1  # the last one was never run


def test_messages_come_as_parts_and_in_every_role(client: OpenAI):
    messages: Any = [
        {"role": "developer", "content": "be terse"},
        {"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": "a", "content": "three"},
    ]  # fmt: skip
    plain: Any = [
        {"role": "system", "content": "be terse"},
        {"role": "user", "content": "one two"},
        {"role": "assistant", "content": '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'},
        {"role": "tool", "content": "three"},
    ]
    texts = [
        client.chat.completions.create(model="x", messages=m, max_tokens=8).choices[0].message.content
        for m in (messages, plain)
    ]
    assert texts[0] == texts[1]


# Log probabilities


def test_chat_logprobs_have_tokens_bytes_and_the_likeliest(client: OpenAI):
    answer = client.chat.completions.create(
        model="x", messages=USER, max_tokens=6, logprobs=True, top_logprobs=3
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None and len(logprobs.content) == 6
    for token in logprobs.content:
        assert len(token.top_logprobs) == 3 and token.logprob <= 0
        assert token.top_logprobs[0].logprob == token.logprob  # greedy
    data = bytes(b for token in logprobs.content for b in token.bytes or [])
    assert data.decode("utf-8", "replace") == answer.choices[0].message.content


def test_a_stream_carries_the_same_logprobs(client: OpenAI):
    options: Any = {"model": "x", "messages": USER, "max_tokens": 6, "logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(stream=True, **options))
    streamed = [t for c in chunks if (p := c.choices[0].logprobs) and p.content for t in p.content]
    assert whole.choices[0].logprobs is not None
    assert streamed == whole.choices[0].logprobs.content


def test_completion_logprobs_have_the_older_shape(client: OpenAI):
    answer = client.completions.create(model="x", prompt="the expert", max_tokens=5, logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.tokens is not None and logprobs.top_logprobs is not None
    assert len(logprobs.tokens) == len(logprobs.token_logprobs or []) == len(logprobs.text_offset or []) == 5
    for token, top in zip(logprobs.tokens, logprobs.top_logprobs, strict=True):
        assert token in top


# Completions


def test_prompts_are_text_texts_or_ids(client: OpenAI, llm: LLM):
    ids = llm.tokenizer.encode("the expert", add_special_tokens=True)
    one = client.completions.create(model="x", prompt="the expert", max_tokens=5)
    two = client.completions.create(model="x", prompt=["what is", "the expert"], max_tokens=5)
    three = client.completions.create(model="x", prompt=[ids], max_tokens=5)
    assert one.choices[0].text == two.choices[1].text == three.choices[0].text
    assert [choice.index for choice in two.choices] == [0, 1]
    assert two.usage is not None and two.usage.completion_tokens == 10


def test_echo_begins_with_the_prompt_whole_and_streamed(client: OpenAI):
    plain = client.completions.create(model="x", prompt="the expert", max_tokens=5).choices[0].text
    whole = client.completions.create(model="x", prompt="the expert", max_tokens=5, echo=True)
    stream = client.completions.create(model="x", prompt="the expert", max_tokens=5, echo=True, stream=True)
    assert whole.choices[0].text == "the expert" + plain
    assert "".join(chunk.choices[0].text for chunk in stream) == "the expert" + plain


# Constrained answers and tools


def test_a_json_schema_is_followed(client: OpenAI):
    for seed in range(3):
        answer = json.loads(
            text_of(
                client, max_tokens=100, seed=seed, temperature=2.0,
                response_format={"type": "json_schema", "json_schema": {"name": "c", "schema": COLOURS}},
            )
        )  # fmt: skip
        assert answer["colour"] in ("red", "green") and isinstance(answer["sure"], bool)


def test_a_json_object_begins_like_one(client: OpenAI):
    """A random model does not end it; what there is of it is JSON."""
    assert text_of(client, response_format={"type": "json_object"}).startswith("{")


TOOLS: Any = [
    {"type": "function", "function": {"name": "paint", "parameters": COLOURS}},
    {"type": "function", "function": {"name": "wait", "description": "do nothing"}},
]


def test_a_required_tool_is_called_with_arguments_that_fit(client: OpenAI):
    answer = client.chat.completions.create(
        model="x", messages=USER, tools=TOOLS[:1], tool_choice="required", parallel_tool_calls=False
    )
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    assert choice.message.tool_calls is not None
    call: Any = choice.message.tool_calls[0]
    assert call.function.name == "paint" and json.loads(call.function.arguments)["colour"] in ("red", "green")
    assert call.id.startswith("call_")


def test_a_named_tool_is_the_one_called_and_streams_in_deltas(client: OpenAI):
    named: Any = {"type": "function", "function": {"name": "paint"}}
    options: Any = {"model": "x", "messages": USER, "tools": TOOLS, "tool_choice": named,
                    "parallel_tool_calls": False}  # fmt: skip
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(stream=True, **options))
    deltas = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    assert deltas[0].function is not None and deltas[0].function.name == "paint" and deltas[0].id
    assert all(delta.index == 0 for delta in deltas) and len(deltas) > 2
    arguments = "".join(delta.function.arguments or "" for delta in deltas if delta.function)
    assert whole.choices[0].message.tool_calls is not None
    expected: Any = whole.choices[0].message.tool_calls[0]
    assert arguments == expected.function.arguments
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_the_turn_after_a_tool_call_computes_only_what_is_new(client: OpenAI):
    """The call, read and written again, is the text that the model wrote."""
    options: Any = {"model": "x", "tools": TOOLS[:1]}
    first = client.chat.completions.create(
        messages=USER, tool_choice="required", parallel_tool_calls=False, **options
    )
    message = first.choices[0].message
    assert message.tool_calls is not None and first.usage is not None
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "painted"}
    turns: Any = [*USER, message.model_dump(exclude_none=True), result]
    second = client.chat.completions.create(messages=turns, max_tokens=1, **options)
    assert second.usage is not None and second.usage.prompt_tokens_details is not None
    assert second.usage.prompt_tokens_details.cached_tokens == first.usage.total_tokens - 1


def test_without_a_choice_of_tools_none_is_shown(client: OpenAI):
    assert text_of(client, tools=TOOLS, tool_choice="none") == text_of(client)
    assert text_of(client, tools=TOOLS) != text_of(client)  # they are in the prompt


# Other paths


def test_models_can_be_listed_and_looked_up(client: OpenAI):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "flashmoe"
    with pytest.raises(openai.NotFoundError, match="no model 'other'"):
        client.models.retrieve("other")


def test_tokenize_and_detokenize_are_inverse(server: Server):
    _, tokens = server.post("/tokenize", {"content": "the expert"})
    assert server.post("/detokenize", tokens) == (200, {"content": "the expert"})
    assert server.post("/detokenize", {"tokens": [2**31]})[0] == 200  # ids without a token give no text


def test_health_and_metrics_tell_how_it_does(server: Server):
    server.chat(max_tokens=3)
    assert server.request("GET", "/health")[2] == server.request("GET", "/v1/health")[2] == b'{"status":"ok"}'
    status, headers, data = server.request("GET", "/metrics")
    lines = dict(line.rsplit(" ", 1) for line in data.decode().splitlines() if not line.startswith("#"))
    assert status == 200 and headers["content-type"].startswith("text/plain")
    assert float(lines['flashmoe_generations_total{outcome="length"}']) >= 1
    assert float(lines["flashmoe_generated_tokens_total"]) >= 3
    assert float(lines["flashmoe_expert_hits_total"]) > 0
    assert float(lines["flashmoe_ram_budget_bytes"]) == 8 * 2**30
    assert float(lines["flashmoe_rss_bytes"]) > 0
    assert float(lines["flashmoe_queue_limit"]) == 64


def test_a_computing_thread_that_died_is_told_by_health(
    server: Server, llm: LLM, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(type(llm.scheduler), "is_alive", False, raising=False)
    status, _, data = server.request("GET", "/health")
    assert status == 503 and b"restart the server" in data


def test_stats_show_the_cache(server: Server):
    status, _, data = server.request("GET", "/v1/stats")
    assert status == 200 and json.loads(data)["model"] == "tiny"


def test_while_the_model_loads_everything_says_so():
    with serving(None) as server:
        assert server.request("GET", "/health")[0] == 503
        status, body = server.chat()
        assert status == 503 and "still loading" in body["error"]["message"]
        assert server.request("GET", "/v1/models")[0] == 503
        assert server.request("GET", "/metrics")[0] == 200


# The page


def test_the_pages_files_are_served_from_their_folder_and_nothing_beside_it(tmp_path: Path):
    web = tmp_path / "web"
    (web / "assets").mkdir(parents=True)
    (tmp_path / "secret").write_text("secret")
    (web / "index.html").write_text("<title>page</title>")
    (web / "assets" / "app.js").write_text("1;")
    client = TestClient(Starlette(routes=page_routes(web)))
    assert client.get("/").text == client.get("/index.html").text == "<title>page</title>"
    script = client.get("/assets/app.js").headers
    assert script["content-type"].startswith("text/javascript")
    again = client.get("/assets/app.js", headers={"If-None-Match": script["etag"]})
    assert again.status_code == 304
    for headers in (script, again.headers, client.get("/").headers):
        assert headers["cache-control"] == "no-cache", "or an upgrade would mix the files of two versions"
    for path in ("/assets/../../secret", "/assets/%2e%2e/%2e%2e/secret", "/secret", "/assets/"):
        assert client.get(path).status_code == 404
    assert page_routes(tmp_path / "none") == []


# Errors


@pytest.mark.parametrize(
    "fields, param, message",
    [
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": [{"role": "nobody", "content": "x"}]}, "messages", "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
         "messages", "reads text only"),
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"temperature": "hot"}, "temperature", "temperature"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"n": 9}, "n", "less than or equal to 8"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"seed": -1}, "seed", "greater than or equal to 0"),
        ({"stop": ["x"] * 17}, "stop", "at most 16"),
        ({"stop": [""]}, "stop", "at least 1"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        ({"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "not supported"),
        ({"tool_choice": "required"}, "tool_choice", "there are no tools"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}],
          "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice", "names 'g'"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "needs a json_schema.schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nope"}}}},
         "response_format", "cannot be used: Invalid type"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}],
          "tool_choice": "required"}, "tools", "tool f have type 'array'"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}] * 2}, "tools", "the same name"),
    ],
)  # fmt: skip
def test_a_bad_field_is_a_400_that_names_it(server: Server, fields: Any, param: str, message: str):
    status, body = server.chat(**fields)
    assert status == 400
    assert body["error"]["param"] == param and message in body["error"]["message"]
    assert body["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "body, message",
    [
        (b"[", "not JSON"),
        (b"[1]", "no JSON object"),
        (b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}', "NaN is no JSON number"),
        (b'{"messages": [{"role": "user", "content": "x"}], "temperature": 1e999}', "temperature: "),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "surrogate"),
        (b'{"a": ' * 5000 + b"1" + b"}" * 5000, "nested too deeply"),
        (b"\xff", "not UTF-8"),
        (b'{"messages": [{"role": "user", "content": "x"}], "n": ' + b"1" * 5000 + b"}", "not JSON"),
    ],
)
def test_a_body_that_is_no_json_is_a_400(server: Server, body: bytes, message: str):
    status, answer = server.post("/v1/chat/completions", body)
    assert status == 400 and message in answer["error"]["message"]


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"echo": True, "logprobs": 1}, "echo"),
        ({"prompt": ""}, "no tokens"),
        ({"prompt": [320]}, "id 320"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": ["x"] * 3, "n": 8}, "prompts times n are 24 answers, one request may have 16"),
        ({"prompt": ["x"] * 17}, "prompt: List should have at most 16 items"),
        ({"prompt": [5] * 5000}, "the context holds 4096"),
        ({"prompt": "x" * 300_000}, "a context of 4096 tokens holds less"),
    ],
)
def test_a_completion_that_cannot_be_is_a_400(server: Server, fields: Any, message: str):
    status, body = server.post("/v1/completions", {"prompt": "x", "max_tokens": 1, **fields})
    assert status == 400 and message in body["error"]["message"]


def test_a_conversation_longer_than_the_context_is_a_400_for_streams_too(client: OpenAI):
    long: Any = [{"role": "user", "content": "x y " * 3000}]
    with pytest.raises(openai.BadRequestError, match="the context holds") as refused:
        client.chat.completions.create(model="x", messages=long, stream=True)
    assert refused.value.code == "context_length_exceeded"


@pytest.mark.parametrize(
    "path, fields",
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "7" * 200_000}]}),
        ("/v1/completions", {"prompt": "7" * 200_000}),
        ("/tokenize", {"content": "7" * 200_000}),
    ],
)
def test_a_long_text_of_many_tokens_is_refused_before_it_is_tokenised_whole(
    server: Server, llm: LLM, monkeypatch: pytest.MonkeyPatch, path: str, fields: Any
):
    """4 MB of digits took 1.5 GB beside the budget, for a model with room for 64 characters a token."""
    seen: list[int] = []
    encode = llm.tokenizer.encode

    def counted(text: str, *options: Any, **named: Any) -> list[int]:
        seen.append(len(text))
        return encode(text, *options, **named)

    monkeypatch.setattr(llm.tokenizer, "encode", counted)
    status, body = server.post(path, fields)
    assert status == 400 and body["error"]["code"] == "context_length_exceeded"
    assert "the context holds 4096; shorten it" in body["error"]["message"] and seen == [50_000]


def test_a_long_text_that_fits_is_not_refused_for_being_cut():
    """Its two pieces have 4120 tokens; whole it has 4000."""
    tokenizer = SimpleNamespace(encode=lambda piece: [0] * (len(piece) // 20 + 60))
    opened: Any = SimpleNamespace(llm=SimpleNamespace(tokenizer=tokenizer), context=4096)
    check_length("x" * 80_000, opened, "prompt")
    with pytest.raises(ApiError, match="the context holds 4096"):
        check_length("x" * 90_000, opened, "prompt")


def test_an_unknown_path_or_method_has_an_error_of_the_same_shape(server: Server):
    for method, path, status in (("GET", "/v1/nothing", 404), ("GET", "/v1/chat/completions", 405)):
        answered, _, data = server.request(method, path)
        assert answered == status and set(json.loads(data)["error"]) == {"message", "type", "param", "code"}


def test_unknown_fields_are_ignored(server: Server):
    assert server.chat(max_tokens=1, user="me", store=False, metadata={"a": "b"})[0] == 200


def test_the_description_tells_of_errors_as_they_are(server: Server):
    document = json.loads(server.request("GET", "/openapi.json")[2])
    responses = document["paths"]["/v1/chat/completions"]["post"]["responses"]
    assert {"200", "400", "401", "413", "429", "500", "503"} <= set(responses) and "422" not in responses
    assert "text/event-stream" in responses["200"]["content"]
