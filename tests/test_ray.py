"""Real Ray on this machine: two replicas of a tiny model behind one endpoint, and a stage of a batch job."""

import json
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ray = pytest.importorskip("ray", reason="Ray is not installed; see `make test-ray`")

pytestmark = pytest.mark.filterwarnings("ignore")  # Ray and what it brings warn of their own affairs

OPTIONS = {"context": 4096, "prefetch": "off", "policy": "lru"}


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100 << 20, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def url(cluster: None, tiny_model: Path) -> Iterator[str]:
    from ray import serve

    from flashmoe.integrations.ray import serving_app

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(serving_app(str(tiny_model), ram_budget="2G", replicas=2, api_key="secret", **OPTIONS))
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


def test_a_batch_job_answers_every_row(cluster: None, tiny_model: Path) -> None:
    """The first test: later the replicas hold both CPUs."""
    from flashmoe.integrations.ray import FlashMoEBatch

    questions = ["the expert", "what is the capital", "leaves first", "user"] * 3
    answered = (
        ray.data.from_items([{"id": number, "prompt": text} for number, text in enumerate(questions)])
        .map_batches(
            FlashMoEBatch,
            fn_constructor_kwargs={"model": str(tiny_model), "ram_budget": "2G", "threads": 1, **OPTIONS,
                                   "sampling": {"max_tokens": 6, "temperature": 0.0}},
            batch_size=4,
            compute=ray.data.ActorPoolStrategy(size=1),
            num_cpus=1,
        )
        .take_all()
    )  # fmt: skip
    answers = {row["id"]: row["answer"] for row in answered}
    assert sorted(answers) == list(range(12)) and all(row["answer_error"] == "" for row in answered)
    assert all(answers[number] == answers[number % 4] != "" for number in range(12))


def ask(url: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any, Any]:
    """(status, headers, the answer's JSON)."""
    data = None if body is None else json.dumps(body).encode()
    sent = {"Authorization": "Bearer secret", "Content-Type": "application/json"} | headers
    request = urllib.request.Request(url + path, data, sent)
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return response.status, response.headers, json.loads(response.read())
    except urllib.error.HTTPError as error:
        return error.code, error.headers, json.loads(error.read())


def chat(url: str, messages: list[dict[str, str]], **fields: Any) -> tuple[str, str, dict[str, Any]]:
    """(the answer, the replica that gave it, usage)."""
    body = {"model": "tiny", "messages": messages, "max_tokens": 8, "temperature": 0} | fields
    status, headers, answer = ask(url, "/v1/chat/completions", body)
    assert status == 200, answer
    return answer["choices"][0]["message"]["content"], headers["x-flashmoe-replica"], answer["usage"]


def test_every_turn_of_a_chat_reaches_the_replica_that_knows_its_beginning(url: str) -> None:
    """Eight chats take turns; spread at random, a second turn would find its prefix half the time."""
    chats: list[list[dict[str, str]]] = [
        [{"role": "user", "content": f"{number} the expert that was used longest ago leaves first"}]
        for number in range(8)
    ]
    replicas: list[set[str]] = [set() for _ in chats]
    for turn in range(3):
        for messages, seen in zip(chats, replicas, strict=True):
            text, replica, usage = chat(url, messages)
            seen.add(replica)
            cached = usage["prompt_tokens_details"]["cached_tokens"]
            assert cached >= 20 * turn, "all turns before are in the KV cache"
            messages += [{"role": "assistant", "content": text}, {"role": "user", "content": "and then"}]
    assert all(len(seen) == 1 for seen in replicas)
    assert len(set().union(*replicas)) == 2, "both replicas work"


def test_replicas_give_the_same_answer(url: str) -> None:
    question = [{"role": "user", "content": "what is the capital of France"}]
    answers = {chat(url, question, user=f"someone {number}")[:2] for number in range(8)}
    assert len({text for text, _ in answers}) == 1 and len({replica for _, replica in answers}) == 2


def test_the_openai_client_streams_through_the_gateway(url: str) -> None:
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=url + "/v1", api_key="secret", max_retries=0) as client:
        question = [{"role": "user", "content": "the expert"}]
        whole = chat(url, question, max_tokens=20)[0]
        stream = client.chat.completions.create(
            model="tiny", messages=question, max_tokens=20, temperature=0, stream=True
        )
        pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert "".join(pieces) == whole and len([piece for piece in pieces if piece]) > 1


def test_what_is_wrong_with_a_request_is_said_as_by_flashmoe_serve(url: str) -> None:
    status, _, answer = ask(url, "/v1/chat/completions", {"messages": [], "model": "tiny"})
    assert status == 400 and answer["error"]["type"] == "invalid_request_error"
    status, _, answer = ask(url, "/v1/chat/completions", {}, Authorization="Bearer wrong")
    assert status == 401 and answer["error"]["type"] == "authentication_error"
    status, _, answer = ask(url, "/v1/models", None, Host="evil.example")
    assert status == 403
    status, _, answer = ask(url, "/metrics")
    assert status == 404 and "behind Ray" in answer["error"]["message"]
    assert ask(url, "/v1/models")[2]["data"][0]["id"] == "mixtral"


def test_a_client_that_leaves_ends_its_generation(url: str, tiny_model: Path) -> None:
    from ray import serve

    question = [{"role": "user", "content": "user"}]
    body = {"messages": question, "max_tokens": 3900, "stream": True, "user": "leaver"}
    sent = {"Authorization": "Bearer secret", "Content-Type": "application/json"}
    request = urllib.request.Request(url + "/v1/chat/completions", json.dumps(body).encode(), sent)
    with urllib.request.urlopen(request, timeout=60) as response:
        response.read(10)
    chat(url, question, user="leaver")
    handle = serve.get_deployment_handle("FlashMoE", "default")
    texts = []
    for number in range(8):  # whichever replica it was
        replica = handle.options(stream=True, session_id=str(number))
        parts = replica.http.remote("GET", "/metrics", "", [], b"")
        texts.append(b"".join(part for part in parts if isinstance(part, bytes)).decode())
    cancelled = [line for text in texts for line in text.splitlines() if "cancelled" in line]
    assert any(float(line.rsplit(" ", 1)[1]) >= 1 for line in cancelled), cancelled


def test_a_replica_that_dies_ends_its_streams_with_an_error_and_is_replaced(url: str) -> None:
    """The last test of the endpoint."""
    question = [{"role": "user", "content": "the expert"}]
    body = {"messages": question, "max_tokens": 3900, "temperature": 0, "stream": True}
    sent = {"Authorization": "Bearer secret", "Content-Type": "application/json"}
    request = urllib.request.Request(url + "/v1/chat/completions", json.dumps(body).encode(), sent)
    with urllib.request.urlopen(request, timeout=60) as response:
        response.read(10)
        replica = f"SERVE_REPLICA::default#FlashMoE#{response.headers['x-flashmoe-replica']}"
        ray.kill(ray.get_actor(replica, namespace="serve"))
        events = [line for line in response.read().decode().splitlines() if line.startswith("data: ")]
    error = json.loads(events[-1].removeprefix("data: "))["error"]
    assert error["type"] == "unavailable_error" and "try again" in error["message"]
    while (again := ask(url, "/v1/chat/completions", body | {"stream": False, "max_tokens": 5}))[0] == 503:
        pass  # until Ray has noticed
    assert again[0] == 200 and again[2]["choices"][0]["message"]["content"]


def test_a_share_of_free_memory_is_no_budget_for_a_replica() -> None:
    from flashmoe.errors import BudgetError, ConfigError
    from flashmoe.integrations.ray import serving_app

    for budget in ("auto", "80%"):
        with pytest.raises(BudgetError, match="ram_budget of a replica: .*say 16G"):
            serving_app("model", ram_budget=budget)
    with pytest.raises(ConfigError, match="replicas 0 is not a number of processes"):
        serving_app("model", ram_budget="1G", replicas=0)
