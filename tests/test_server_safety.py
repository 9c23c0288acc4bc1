"""What clients who mean ill, or are just slow or gone, can and cannot do: on a tiny random model."""

import json
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from servers import Server, serving

from flashmoe import LLM
from flashmoe.errors import ConfigError
from flashmoe.server.limits import Limits
from flashmoe.server.security import AllowedHosts, is_loopback
from flashmoe.server.serve import ServeOptions, bind

CHAT = "/v1/chat/completions"
USER: Any = [{"role": "user", "content": "hi"}]
FEW = Limits(body_bytes=2000, connections=8)
HASTY = Limits(body_s=2.0, header_s=2.0)
IMPATIENT = Limits(send_s=0.3, ping_s=0.05, unread_pieces=64)


@pytest.fixture(scope="module")
def llm(tiny_model: Path) -> Iterator[LLM]:
    with LLM(tiny_model, ram_budget="8G") as llm:
        yield llm


@pytest.fixture(scope="module")
def server(tiny_model: Path) -> Iterator[Server]:
    """With a key and low limits; its LLM is its own, since one LLM has one server."""
    with (
        LLM(tiny_model, ram_budget="8G") as llm,
        serving(llm, api_key="sesame", limits=FEW, allowed_hosts=["models.example"]) as server,
    ):
        yield server


@pytest.fixture
def hasty() -> Iterator[Server]:
    """It waits for nobody; without a model."""
    with serving(None, limits=HASTY) as server:
        yield server


KEY = {"Authorization": "Bearer sesame"}


def wait_for(condition: Any) -> None:
    """Until it holds; pytest's time limit ends a wait that never does."""
    pause = threading.Event()
    for _ in range(3000):
        if condition():
            return
        pause.wait(0.01)
    raise AssertionError("it never came to hold")


def read_all(connection: socket.socket) -> bytes:
    data = b""
    while bit := connection.recv(65536):
        data += bit
    return data


# Who may ask


def test_only_the_key_opens_the_api(server: Server):
    body = {"messages": USER, "max_tokens": 1}
    for headers in ({}, {"Authorization": "Bearer sesam"}, {"Authorization": "Basic sesame"},
                    {"Authorization": "Bearer"}, {"Authorization": "Bearer s\xe9same"}):  # fmt: skip
        status, told, data = server.request("POST", CHAT, body, headers)
        assert status == 401 and told["www-authenticate"] == "Bearer"
        assert json.loads(data)["error"]["code"] == "invalid_api_key"
    assert server.post(CHAT, body, KEY)[0] == 200
    with server.client() as client:
        assert [model.id for model in client.models.list()] == ["tiny"]


@pytest.mark.parametrize("path", ["/v1/models", "/v1/stats", "/metrics", "/v1/nothing"])
def test_paths_of_the_api_need_the_key(server: Server, path: str):
    assert server.request("GET", path)[0] == 401


@pytest.mark.parametrize("path", ["/health", "/v1/health", "/openapi.json"])
def test_what_tells_nothing_needs_no_key(server: Server, path: str):
    assert server.request("GET", path)[0] == 200


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:80", "127.0.0.1:80", "[::1]:80", "models.example"])
def test_a_host_that_is_ours_is_served(server: Server, host: str):
    assert server.request("GET", "/health", headers={"Host": host})[0] == 200


@pytest.mark.parametrize("host", ["evil.example", "10.0.0.1", "localhost.evil.example", "", "evil.test:80"])
def test_another_host_is_refused(server: Server, host: str):
    """A page whose name was made to point at 127.0.0.1 sends its own name."""
    status, _, data = server.request("GET", "/health", headers={"Host": host})
    assert status == 403 and "--allowed-host" in json.loads(data)["error"]["message"]


def test_behind_a_wildcard_address_any_address_is_ours_but_no_name():
    hosts = AllowedHosts("0.0.0.0")
    assert "10.1.2.3:8000" in hosts and "[fe80::1]" in hosts
    assert "evil.example" not in hosts and "evil.example" in AllowedHosts("0.0.0.0", ["*"])


@pytest.mark.parametrize(
    "headers",
    [{"Origin": "http://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"},
     {"Origin": "http://localhost:9"}, {"Origin": "http://["}],
)  # fmt: skip
def test_pages_of_other_origins_may_not_post(server: Server, headers: dict[str, str]):
    status, told, _ = server.request("POST", CHAT, {"messages": USER}, KEY | headers)
    assert status == 403 and "access-control-allow-origin" not in told


def test_our_own_page_may_post(server: Server):
    own = {"Origin": server.url, "Sec-Fetch-Site": "same-origin"}
    assert server.request("POST", CHAT, {"messages": USER, "max_tokens": 1}, KEY | own)[0] == 200


def test_every_answer_has_the_headers_that_keep_browsers_in_bounds(server: Server):
    for path in ("/health", "/nothing"):
        headers = server.request("GET", path)[1]
        assert headers["content-security-policy"].startswith("default-src 'self'")
        assert headers["x-content-type-options"] == "nosniff" and "server" not in headers


def test_loopback_is_known_when_seen():
    assert [h for h in ("localhost", "127.0.0.1", "127.9.9.9", "::1", "[::1]") if not is_loopback(h)] == []
    assert [h for h in ("0.0.0.0", "::", "10.0.0.1", "box.example") if is_loopback(h)] == []


# How much


def test_a_large_body_is_refused_by_its_length_or_as_it_comes(server: Server):
    assert server.post(CHAT, b"x" * 2001, KEY)[0] == 413
    with server.connect() as connection:
        connection.sendall(
            f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer sesame\r\n"
            "Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
        )
        connection.sendall(b"400\r\n" + b"x" * 0x400 + b"\r\n400\r\n" + b"x" * 0x400 + b"\r\n")
        assert read_all(connection).startswith(b"HTTP/1.1 413 ")


def test_bodies_of_all_requests_together_are_limited_and_forgotten_with_them(tiny_model: Path):
    limits = Limits(body_bytes=2000, bodies_bytes=3000, small_bytes=1200)
    with serving(None, limits=limits) as server, server.connect() as holding:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2000\r\n\r\n"
        holding.sendall(head.encode() + b" " * 1900)
        wait_for(lambda: server.guard._held_bytes == 1900)
        assert server.post(CHAT, b" " * 1500)[1]["error"]["code"] == "busy"
        assert server.post(CHAT, b" " * 1200)[0] == 400  # a small one is read
        holding.sendall(b" " * 100)
        assert holding.recv(12) == b"HTTP/1.1 400"
        assert server.post(CHAT, b" " * 1500)[0] == 400
        wait_for(lambda: server.guard._held_bytes == 0)


def test_a_body_of_very_many_values_is_refused_before_it_is_parsed():
    with serving(None) as server:  # not a hasty one: a megabyte takes a busy machine its time
        status, answer = server.post(CHAT, b'{"x": [' + b"[]," * 400_000 + b"[]]}")
    assert status == 400 and "the most is 400000" in answer["error"]["message"]


def test_a_slow_head_and_a_slow_body_end_with_408(hasty: Server):
    with hasty.connect() as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: loc")
        assert read_all(connection).startswith(b"HTTP/1.1 408 ")
    with hasty.connect() as connection:
        connection.sendall(
            f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{{".encode()
        )
        assert read_all(connection).startswith(b"HTTP/1.1 408 ")


def test_a_slow_second_head_on_the_same_connection_ends_too(hasty: Server):
    """The first request's keep-alive timer is stopped by the second's first byte."""
    with hasty.connect() as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        answer = b""
        while b'"loading model"}' not in answer:
            bit = connection.recv(65536)
            assert bit, answer
            answer += bit
        connection.sendall(b"GET /heal")
        assert read_all(connection).startswith(b"HTTP/1.1 408 ")


def test_too_many_connections_are_refused_and_those_there_are_go_on(server: Server):
    wait_for(lambda: not server.http.server_state.connections)
    connections = [server.connect() for _ in range(FEW.connections)]
    try:
        wait_for(lambda: len(server.http.server_state.connections) == FEW.connections)
        with server.connect() as one_more:
            assert read_all(one_more).startswith(b"HTTP/1.1 503 ")
        connections[0].sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert b'{"status":"ok"}' in read_all(connections[0])
    finally:
        for connection in connections:
            connection.close()


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01 hello\r\n\r\n",  # TLS
        b"GET /\xff HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",  # no host
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 40_000,  # and no end in sight
    ],
)
def test_what_is_not_http_is_a_400(server: Server, sent: bytes):
    with server.connect() as connection:
        connection.sendall(sent)
        head, _, body = read_all(connection).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 ")
        assert json.loads(body)["error"]["type"] == "invalid_request_error"


# Who leaves, and who does not read


def test_a_client_that_leaves_ends_its_generation(llm: LLM):
    body = {"messages": USER, "max_tokens": 4000, "stream": True}
    for stream in (True, False):
        with serving(llm) as server:
            sent = json.dumps(body | {"stream": stream}).encode()
            with server.connect() as connection:
                head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                connection.sendall(f"{head}Content-Length: {len(sent)}\r\n\r\n".encode() + sent)
                wait_for(lambda: llm.scheduler.running)
            wait_for(lambda: not llm.scheduler.running)
            text = server.request("GET", "/metrics")[2].decode()
            assert 'flashmoe_generations_total{outcome="cancelled"} 1.0' in text


def test_a_reader_who_does_not_read_is_dropped_and_others_go_on(llm: LLM):
    """Its answer is bounded by what may wait unread; then the generation ends and the connection is cut."""
    with serving(llm, limits=IMPATIENT) as server:
        body = {"messages": USER, "max_tokens": 4000, "stream": True, "n": 4}
        sent = json.dumps(body | {"logprobs": True, "top_logprobs": 20}).encode()
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(sent)}\r\n\r\n".encode() + sent)
        wait_for(lambda: llm.scheduler.running)
        assert server.chat(max_tokens=5)[0] == 200
        wait_for(lambda: not llm.scheduler.running and not server.http.server_state.connections)
        connection.close()


def test_a_bad_request_does_not_disturb_a_stream(llm: LLM):
    with serving(llm) as server, server.client() as client:
        options: Any = {"model": "x", "messages": USER, "max_tokens": 60}
        whole = client.chat.completions.create(**options).choices[0].message.content
        stream = client.chat.completions.create(stream=True, **options)
        text = next(stream).choices[0].delta.content or ""
        for body in (b"[" * 100_000, b'{"messages": 1}', b"\xff", b"x" * 5_000_000):
            assert server.post(CHAT, body)[0] in (400, 413)
        assert text + "".join(chunk.choices[0].delta.content or "" for chunk in stream) == whole


def test_a_full_queue_is_a_429_that_says_when_to_come_back(llm: LLM):
    with serving(llm, queue=1) as server, server.client() as client:
        long: Any = {"model": "x", "messages": USER, "max_tokens": 4000, "stream": True}
        streams = []
        for begun in range(1, llm.scheduler.most_running + 1):
            streams.append(client.chat.completions.create(**long))
            wait_for(lambda begun=begun: llm.scheduler.running == begun)
        streams.append(client.chat.completions.create(**long))
        wait_for(lambda: llm.scheduler.waiting == 1)
        with pytest.raises(openai.RateLimitError, match="wait already") as refused:
            client.chat.completions.create(model="x", messages=USER)
        assert int(refused.value.response.headers["retry-after"]) >= 1
        for stream in streams:
            stream.close()
        wait_for(lambda: not llm.scheduler.running and not llm.scheduler.waiting)


def test_an_error_of_the_engine_ends_a_stream_with_an_error(llm: LLM, monkeypatch: pytest.MonkeyPatch):
    from flashmoe.generation import GenerationRequest

    def fail(*_: Any) -> None:
        raise ConfigError("the drive is on fire")

    with serving(llm) as server, server.client() as client:
        with monkeypatch.context() as patch:
            patch.setattr(GenerationRequest, "take", fail)
            with pytest.raises(openai.APIError, match="the drive is on fire"):
                list(client.chat.completions.create(model="x", messages=USER, stream=True))
            assert server.chat()[0] == 400
        assert server.chat(max_tokens=2)[0] == 200


# The end


def test_what_runs_may_finish_when_the_server_ends(llm: LLM):
    with serving(llm, drain_s=60) as server, server.client() as client:
        stream = client.chat.completions.create(model="x", messages=USER, max_tokens=200, stream=True)
        chunks = [next(stream)]
        server.http.should_exit = True
        chunks += list(stream)
        assert chunks[-1].choices[0].finish_reason == "length"


def test_what_does_not_finish_in_time_is_told_so(llm: LLM):
    with serving(llm, drain_s=0) as server, server.client() as client:
        stream = client.chat.completions.create(model="x", messages=USER, max_tokens=4000, stream=True)
        next(stream)
        server.http.should_exit = True
        with pytest.raises(openai.APIError, match="the server is stopping"):
            list(stream)


def test_a_body_that_does_not_come_does_not_hold_up_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """uvicorn cancelled such a request, and wrote a traceback."""
    monkeypatch.setattr("flashmoe.server.serve._AFTER_CANCEL_S", 0)
    with serving(None) as server, server.connect() as connection:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n"
        connection.sendall(head.encode() + b"{")
        wait_for(lambda: server.guard._held_bytes)
        server.http.should_exit = True
        with suppress(ConnectionResetError):
            assert read_all(connection) == b""
    assert not server.http.server_state.tasks
    assert capsys.readouterr().err == ""


def test_a_second_ctrl_c_ends_streams_at_once_and_without_a_traceback(
    llm: LLM, capsys: pytest.CaptureFixture[str]
):
    with serving(llm, drain_s=60) as server, server.client() as client:
        stream = client.chat.completions.create(model="x", messages=USER, max_tokens=4000, stream=True)
        next(stream)
        server.http._note(signal.SIGINT, None)
        server.http._note(signal.SIGINT, None)
        with pytest.raises((openai.APIError, httpx2.TransportError)):
            list(stream)
        wait_for(lambda: not llm.scheduler.running and not server.http.server_state.tasks)
    assert capsys.readouterr().err == ""


# Options


@pytest.mark.parametrize(
    "options, message",
    [
        ({"port": 70000}, "--port 70000 is not from 0 to 65535"),
        ({"queue": 0}, "--queue 0 is not from 1"),
        ({"api_key": ""}, "the API key is empty"),
        ({"api_key": "schlüssel"}, "ASCII"),
    ],
)
def test_an_impossible_option_is_refused(options: Any, message: str):
    with pytest.raises(ConfigError, match=message):
        ServeOptions("tiny", **options)


def test_an_address_that_is_taken_is_one_line():
    with bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1 port {port}: Address already"):
            bind("127.0.0.1", port)
