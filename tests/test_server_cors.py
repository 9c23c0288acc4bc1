"""Pages of other origins: only those that the server was told of, exactly, and never with credentials."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from servers import Server, serving

from flashmoe import LLM
from flashmoe.errors import ConfigError
from flashmoe.server.limits import Limits
from flashmoe.server.serve import ServeOptions

CHAT = "/v1/chat/completions"
FRIEND, OTHER = "https://chat.example", "http://localhost:3000"
KEY = {"Authorization": "Bearer sesame"}
BODY: Any = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
# What a browser says of a request from elsewhere.
CROSS = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "cors"}
ASKS = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
STRANGERS = [
    "https://evil.example", "null", "*", "", "https://chat.example.evil.example", "https://evilchat.example",
    "http://chat.example", "https://chat.example:8443", "https://chat.example/", "https://chat.example.",
    "https://chat.example@evil.example", "https://chat.example, https://evil.example",
    "https://CHAT.example", "https://chat.example\u00e9",
]  # fmt: skip


@pytest.fixture(scope="module")
def server(tiny_model: Path) -> Iterator[Server]:
    """It knows two origins and has a key."""
    with (
        LLM(tiny_model, ram_budget="8G") as llm,
        serving(llm, api_key="sesame", cors_origins=[FRIEND + ":443", OTHER]) as server,
    ):
        yield server


def cors_of(headers: dict[str, str]) -> list[str]:
    return [name for name in headers if name.startswith("access-control-")]


@pytest.mark.parametrize("origin", [FRIEND, OTHER])
def test_a_page_of_an_allowed_origin_asks_first_and_then_reads_the_answer(server: Server, origin: str):
    told = {"Origin": origin, **CROSS}
    status, headers, body = server.request("OPTIONS", CHAT, None, told | ASKS)
    assert status == 204 and body == b""
    assert headers["access-control-allow-origin"] == origin
    assert headers["access-control-allow-methods"] == "GET, POST"
    assert "Authorization" in headers["access-control-allow-headers"]
    status, headers, body = server.request("POST", CHAT, BODY, told | KEY)
    assert status == 200 and json.loads(body)["choices"]
    assert headers["access-control-allow-origin"] == origin and headers["vary"] == "Origin"
    status, headers, body = server.request("POST", CHAT, BODY | {"stream": True}, told | KEY)
    assert body.endswith(b"data: [DONE]\n\n") and headers["access-control-allow-origin"] == origin


def test_it_reads_why_it_was_refused_and_when_to_come_back(server: Server):
    told = {"Origin": FRIEND, **CROSS}
    for body, sent, expected in (
        (BODY, {}, 401), ({"messages": 1}, KEY, 400), (BODY, KEY | {"Host": "evil.example"}, 403),
    ):  # fmt: skip
        status, headers, _ = server.request("POST", CHAT, body, told | sent)
        assert status == expected and headers["access-control-allow-origin"] == FRIEND
        assert headers["access-control-expose-headers"] == "Retry-After"


def test_nothing_is_ever_allowed_with_credentials_or_to_all(server: Server):
    for method, sent in (("OPTIONS", ASKS), ("GET", {}), ("POST", {})):
        headers = server.request(method, CHAT, None, {"Origin": FRIEND, "Cookie": "a=b"} | sent)[1]
        assert "access-control-allow-credentials" not in headers
        assert headers["access-control-allow-origin"] == FRIEND


@pytest.mark.parametrize("origin", STRANGERS)
def test_pages_of_any_other_origin_neither_ask_nor_read(server: Server, origin: str):
    sent = {"Origin": origin.encode("utf-8").decode("latin-1"), **CROSS} | KEY
    status, headers, _ = server.request("OPTIONS", CHAT, None, sent | ASKS)
    assert status == 403 and not cors_of(headers)
    status, headers, _ = server.request("POST", CHAT, BODY, sent)
    assert status == 403 and not cors_of(headers) and headers["vary"] == "Origin"
    headers = server.request("GET", "/v1/models", None, sent)[1]
    assert not cors_of(headers) and headers["cross-origin-resource-policy"] == "same-origin"


def test_two_origins_are_none(server: Server):
    with server.connect() as connection:
        connection.sendall(
            f"OPTIONS {CHAT} HTTP/1.1\r\nHost: localhost\r\nOrigin: {FRIEND}\r\nOrigin: https://evil.example"
            "\r\nAccess-Control-Request-Method: POST\r\nConnection: close\r\n\r\n".encode()
        )
        answer = b""
        while bit := connection.recv(65536):
            answer += bit
    assert answer.startswith(b"HTTP/1.1 403 ") and b"access-control-" not in answer.lower()


@pytest.mark.parametrize(
    "asked",
    [
        {"Access-Control-Request-Method": "DELETE"},
        {"Access-Control-Request-Method": "x" * 5000},
        {"Access-Control-Request-Headers": "x-a, \t, " + "y," * 5000},
        {"Access-Control-Request-Headers": "set-cookie\tAccess-Control-Allow-Credentials: true"},
        {"Access-Control-Request-Headers": ""},
        {"Access-Control-Request-Private-Network": "yes please"},
    ],
)
def test_what_an_allowed_page_asks_for_changes_nothing_in_what_it_is_told(
    server: Server, asked: dict[str, str]
):
    plain = server.request("OPTIONS", CHAT, None, {"Origin": FRIEND} | ASKS)
    odd = server.request("OPTIONS", CHAT, None, {"Origin": FRIEND} | ASKS | asked)
    for _, headers, _ in (plain, odd):
        headers.pop("date", None)
    assert odd == plain


def test_a_page_from_the_internet_may_reach_this_machine_if_it_is_allowed(server: Server):
    asked = ASKS | {"Access-Control-Request-Private-Network": "true"}
    headers = server.request("OPTIONS", CHAT, None, {"Origin": FRIEND} | asked)[1]
    assert headers["access-control-allow-private-network"] == "true"
    headers = server.request("OPTIONS", CHAT, None, {"Origin": "https://evil.example"} | asked)[1]
    assert not cors_of(headers)


def test_host_key_and_limits_hold_for_allowed_pages_too():
    with serving(
        None, api_key="sesame", cors_origins=[FRIEND], limits=Limits(body_bytes=1000, body_s=1.0)
    ) as server:
        told = {"Origin": FRIEND}
        assert server.request("OPTIONS", CHAT, None, told | ASKS | {"Host": "evil.example"})[0] == 403
        assert server.request("OPTIONS", CHAT, b"x" * 1001, told | ASKS)[0] == 413
        assert server.request("POST", CHAT, b"x" * 1001, told | KEY)[0] == 413
        assert server.request("GET", "/v1/models", None, told)[0] == 401
        assert server.request("OPTIONS", CHAT, None, told)[0] == 401  # asks nothing: no preflight
        with server.connect() as connection:
            connection.sendall(
                f"OPTIONS {CHAT} HTTP/1.1\r\nHost: localhost\r\nOrigin: {FRIEND}\r\n"
                "Access-Control-Request-Method: POST\r\nContent-Length: 9\r\n\r\n".encode()
            )
            assert connection.recv(12) == b"HTTP/1.1 408"


def test_our_own_page_and_clients_without_pages_are_as_before(server: Server):
    own = {"Origin": server.url, "Sec-Fetch-Site": "same-origin"} | KEY
    status, headers, _ = server.request("POST", CHAT, BODY, own)
    assert status == 200 and not cors_of(headers)
    status, headers, _ = server.request("POST", CHAT, BODY, KEY)
    assert status == 200 and not cors_of(headers)


def test_without_the_option_no_page_from_elsewhere_is_told_anything():
    with serving(None) as server:
        for method, sent in (("OPTIONS", ASKS), ("GET", {}), ("POST", {})):
            headers = server.request(method, "/v1/models", None, {"Origin": FRIEND} | sent)[1]
            assert not cors_of(headers) and "vary" not in headers


@pytest.mark.parametrize(
    "origin",
    ["*", "null", "", "chat.example", "https://", "https://chat.example/page", "https://*.example",
     "https://a.example https://b.example", "https://user@chat.example", "https://chat.example\r\nX: y",
     "https://bücher.example", "https://chat.example:x"],
)  # fmt: skip
def test_what_is_no_origin_is_refused_at_start(origin: str):
    with pytest.raises(ConfigError, match="is no origin; write scheme, name and port alone") as refused:
        ServeOptions("tiny", cors_origins=[origin])
    assert "\n" not in str(refused.value)


def test_the_command_takes_several(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    from flashmoe import cli

    seen: list[ServeOptions] = []
    monkeypatch.setattr("flashmoe.server.serve.serve", lambda load, options, *_: seen.append(options))
    assert cli.main(["serve", "--cors-origin", "HTTPS://A.example", "--cors-origin", "app://b.example"]) == 0
    assert seen[0].cors_origins == ["HTTPS://A.example", "app://b.example"]
    assert cli.main(["serve", "--cors-origin", "*"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
