"""The server on the real small model: what the README shows, a conversation, JSON, tools, many at a time."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI
from servers import Server, serving

from flashmoe import LLM

pytestmark = pytest.mark.demo
ROOT = Path(__file__).parent.parent
FRANCE: Any = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(None, ram_budget="8G") as llm:
        yield llm


@pytest.fixture(scope="module")
def server(llm: LLM) -> Iterator[Server]:
    with serving(llm, name="smolmoe") as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[OpenAI]:
    with server.client() as client:
        yield client


def examples() -> list[tuple[str, str]]:
    """(language, code) of the README's examples for the server."""
    text = (ROOT / "README.md").read_text("utf-8")
    return re.findall(r"<!-- test: serve -->\n```(\w+)\n(.*?)```", text, re.DOTALL)


def test_the_examples_of_the_readme_run_as_they_are(server: Server):
    assert [language for language, _ in examples()] == ["sh", "python"]
    for language, code in examples():
        code = code.replace("http://127.0.0.1:8000", server.url)
        command = ["sh", "-c", code] if language == "sh" else [sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        if language == "sh":
            assert "Paris" in json.loads(done.stdout)["choices"][0]["message"]["content"]
        else:
            assert done.stdout.strip()


def test_a_conversation_computes_only_what_is_new(client: OpenAI):
    first = client.chat.completions.create(model="x", messages=FRANCE, max_tokens=40, temperature=0)
    said = first.choices[0].message.content
    assert said and "Paris" in said
    italy = {"role": "user", "content": "And of Italy?"}
    again: Any = [*FRANCE, {"role": "assistant", "content": said}, italy]
    second = client.chat.completions.create(model="x", messages=again, max_tokens=20, temperature=0)
    assert first.usage is not None and second.usage is not None
    assert second.usage.prompt_tokens_details is not None
    assert second.usage.prompt_tokens_details.cached_tokens == first.usage.total_tokens - 1


def test_a_schema_holds_on_a_real_model(client: OpenAI):
    schema: Any = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}, "in_europe": {"type": "boolean"}},
        "required": ["city", "in_europe"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model="x", messages=FRANCE, max_tokens=60, temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "place", "schema": schema}},
    )  # fmt: skip
    value = json.loads(answer.choices[0].message.content or "")
    assert set(value) == {"city", "in_europe"} and isinstance(value["in_europe"], bool)


def test_a_tool_is_called_and_its_answer_told(client: OpenAI):
    weather: Any = {"type": "function", "function": {
        "name": "weather", "description": "The weather in a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "maxLength": 20}},
                       "required": ["city"], "additionalProperties": False}}}  # fmt: skip
    question: Any = [{"role": "user", "content": "How is the weather in Paris?"}]
    called = client.chat.completions.create(
        model="x", messages=question, tools=[weather], tool_choice="required", max_tokens=100, temperature=0,
        parallel_tool_calls=False,
    )  # fmt: skip
    assert called.choices[0].finish_reason == "tool_calls"
    message = called.choices[0].message
    assert message.tool_calls is not None
    call: Any = message.tool_calls[0]
    assert call.function.name == "weather" and set(json.loads(call.function.arguments)) == {"city"}
    told = client.chat.completions.create(
        model="x", max_tokens=20, temperature=0, tools=[weather],
        messages=[*question, message.model_dump(exclude_none=True),
                  {"role": "tool", "tool_call_id": call.id, "content": "sunny, 25 degrees"}],
    )  # fmt: skip
    assert told.choices[0].message.content


def test_many_clients_get_the_answers_that_each_would_get_alone(client: OpenAI):
    def ask(word: str) -> str:
        answer = client.chat.completions.create(
            model="x", messages=[{"role": "user", "content": f"Tell me about {word}."}],
            max_tokens=16, temperature=0,
        )  # fmt: skip
        return answer.choices[0].message.content or ""

    words = ["cats", "the sea", "bread", "Rome", "music", "trains"]
    alone = [ask(word) for word in words]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(ask, words)) == alone
