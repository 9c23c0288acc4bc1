"""What the integrations are made of, without Ray: conversations' names, calling an app, answering a batch."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashmoe.api import LLM
from flashmoe.errors import ConfigError
from flashmoe.integrations.asgi import UNREAD_PIECES, HttpRequest, Message, call_app
from flashmoe.integrations.batches import FlashMoEBatch
from flashmoe.integrations.sessions import conversation_key

SYSTEM = {"role": "system", "content": "You are terse."}


def key(**body: Any) -> str:
    return conversation_key({}, json.dumps(body).encode())


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def answer(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


# Conversations' names


def test_every_turn_of_a_chat_has_the_same_name_and_other_chats_have_others() -> None:
    first = key(messages=[SYSTEM, user("Hello")])
    second = key(messages=[SYSTEM, user("Hello"), answer("Hi"), user("Why?")], temperature=0.5)
    assert first == second != ""
    assert key(messages=[SYSTEM, user("Hallo")]) != first
    assert key(messages=[user("Hello")]) != first


def test_content_in_parts_is_a_conversation_too() -> None:
    parts = [{"type": "text", "text": "Hello"}]
    assert key(messages=[user(parts)]) == key(messages=[user(parts), answer("Hi"), user("Why?")]) != ""


@pytest.mark.parametrize("field", ["session_id", "prompt_cache_key", "user"])
def test_a_client_may_name_its_conversation(field: str) -> None:
    named = key(messages=[user("a")], **{field: "chat 7"})
    assert named == key(messages=[user("b")], **{field: "chat 7"})
    assert named != key(messages=[user("a")], **{field: "chat 8"})
    assert key(messages=[user("a")], **{field: ""}) == key(messages=[user("a")])


def test_the_header_goes_before_the_body_and_the_session_before_the_person() -> None:
    body = json.dumps({"messages": [user("a")], "user": "me", "session_id": "chat 7"}).encode()
    named = key(session_id="chat 7")
    assert conversation_key({"x-session-id": "chat 7"}, body) == conversation_key({}, body) == named


def test_a_prompt_that_grows_keeps_its_name() -> None:
    beginning = "Once upon a time " * 40
    assert key(prompt=beginning) == key(prompt=beginning + "there was") != key(prompt="Once")
    assert key(prompt=[beginning]) == key(prompt=beginning)
    assert key(prompt=list(range(600))) == key(prompt=list(range(700))) != ""


NO_CONVERSATIONS = [
    b"", b"[]", b"{", b'"x"', b"{}", b"\xff", b"[" * 100_000, b'{"a":' * 100_000, b'{"messages": []}',
    b'{"messages": 7, "prompt": 7}',
]  # fmt: skip


@pytest.mark.parametrize("body", NO_CONVERSATIONS, ids=lambda body: body[:20].decode("latin-1"))
def test_what_is_no_conversation_has_no_name(body: bytes) -> None:
    assert conversation_key({}, body) == ""


NAMES = st.sampled_from(["messages", "prompt", "role", "content", "user", "session_id"])
PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()


@given(st.recursive(PLAIN, lambda inner: st.lists(inner) | st.dictionaries(NAMES, inner)))
def test_any_json_has_a_name_or_none(body: Any) -> None:
    name = conversation_key({}, json.dumps(body).encode())
    assert name == "" or len(name) == 32


# Calling an app


async def echo(scope: Message, receive: Any, send: Any) -> None:
    body = (await receive())["body"]
    headers = [(b"x-path", scope["path"].encode()), (b"x-query", scope["query_string"])]
    await send({"type": "http.response.start", "status": 418, "headers": headers + scope["headers"]})
    for at in range(0, len(body), 2):
        await send({"type": "http.response.body", "body": body[at : at + 2], "more_body": True})
    await send({"type": "http.response.body"})


REQUEST = HttpRequest("POST", "/a b", "c=d", [("x-own", "1")], b"hello")


def test_an_apps_answer_comes_piece_by_piece() -> None:
    async def call() -> list[Any]:
        return [part async for part in call_app(echo, REQUEST)]

    assert asyncio.run(call()) == [
        (418, [("x-path", "/a b"), ("x-query", "c=d"), ("x-own", "1")]), b"he", b"ll", b"o",
    ]  # fmt: skip


def test_an_apps_error_is_raised() -> None:
    async def app(scope: Message, receive: Any, send: Any) -> None:
        raise ValueError("mine")

    async def call() -> None:
        async for _ in call_app(app, REQUEST):
            pass

    with pytest.raises(ValueError, match="mine"):
        asyncio.run(call())


def test_an_app_whose_client_leaves_is_told_and_cancelled() -> None:
    told: list[str] = []

    async def app(scope: Message, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        try:
            told.append((await receive())["type"])
            await asyncio.Event().wait()
        finally:
            told.append("cancelled")

    async def call() -> None:
        parts = call_app(app, REQUEST)
        assert await anext(parts) == (200, [])
        await asyncio.sleep(0)
        await parts.aclose()

    asyncio.run(call())
    assert told[-1] == "cancelled" and told[:-1] in ([], ["http.disconnect"])


def test_an_app_waits_for_a_slow_reader() -> None:
    sent = []

    async def app(scope: Message, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for number in range(1000):
            await send({"type": "http.response.body", "body": b"x", "more_body": True})
            sent.append(number)

    async def call() -> None:
        parts = call_app(app, REQUEST)
        for _ in range(3):
            await anext(parts)
        for _ in range(100):
            await asyncio.sleep(0)
        assert len(sent) <= UNREAD_PIECES + 3
        await parts.aclose()

    asyncio.run(call())


# A batch


@pytest.fixture(scope="module")
def stage(tiny_model: Path) -> Iterator[FlashMoEBatch]:
    stage = FlashMoEBatch(
        str(tiny_model), ram_budget="8G", sampling={"max_tokens": 6, "temperature": 0.0}, threads=1,
        context=256, prefetch="off", policy="lru",
    )  # fmt: skip
    yield stage
    stage.close()


@pytest.fixture(scope="module")
def alone(tiny_model: Path) -> Iterator[LLM]:
    with LLM(str(tiny_model), ram_budget="8G", threads=1, context=256, prefetch="off", policy="lru") as llm:
        yield llm


def test_a_batch_gets_the_answers_that_each_row_gets_alone(stage: FlashMoEBatch, alone: LLM) -> None:
    questions = ["the expert", "what is the capital", "leaves first", "user"]
    batch = stage({"prompt": np.array(questions, object), "id": np.arange(4)})
    assert batch["id"].tolist() == [0, 1, 2, 3] and batch["prompt"].tolist() == questions
    for question, text in zip(questions, batch["answer"], strict=True):
        assert text == alone.chat(max_tokens=6, temperature=0.0).send(question).text
    assert batch["answer_finish_reason"].tolist() == ["length"] * 4
    assert batch["answer_error"].tolist() == [""] * 4


def test_messages_are_a_conversation(stage: FlashMoEBatch) -> None:
    column = np.empty(2, object)
    column[0] = np.array([user("the expert")], object)  # as Arrow hands them over
    column[1] = [SYSTEM, user("the expert")]
    one, other = stage({"prompt": column})["answer"]
    assert one == stage({"prompt": ["the expert"]})["answer"][0] and one != other


def test_a_row_that_cannot_be_answered_says_why_and_ends_nothing(stage: FlashMoEBatch) -> None:
    batch = stage({"prompt": ["word " * 400, "the expert"]})
    assert batch["answer"][0] == "" and "256" in batch["answer_error"][0]
    assert batch["answer_finish_reason"].tolist() == ["error", "length"]
    assert batch["answer"][1] == stage({"prompt": ["the expert"]})["answer"][0]


def test_a_batch_larger_than_the_queue_is_answered_whole(stage: FlashMoEBatch) -> None:
    most = stage.llm.scheduler.most_waiting
    stage.llm.scheduler.most_waiting = 2
    try:
        batch = stage({"prompt": ["the expert"] * 9})
    finally:
        stage.llm.scheduler.most_waiting = most
    assert len(set(batch["answer"])) == 1 and batch["answer_error"].tolist() == [""] * 9


def test_a_missing_column_and_a_strange_one_are_named(stage: FlashMoEBatch) -> None:
    with pytest.raises(ConfigError, match="has the columns text, none is 'prompt'"):
        stage({"text": ["a"]})
    with pytest.raises(ConfigError, match="'prompt' holds int, neither text nor messages"):
        stage({"prompt": [7]})


def test_ray_that_is_not_there_is_a_line_that_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import builtins
    import sys

    real = builtins.__import__

    def without_ray(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "ray" or name.startswith("ray."):
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_ray)
    monkeypatch.delitem(sys.modules, "flashmoe.integrations.ray", raising=False)
    with pytest.raises(ImportError, match=r"this needs Ray .*pip install 'flashmoe\[ray\]'"):
        import flashmoe.integrations.ray  # noqa: F401
