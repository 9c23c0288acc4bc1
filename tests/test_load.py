"""The load test: on the real small model all is well; on a server that errs it says what is wrong."""

import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from scripts import load_test

SMALL = ["--clients", "8", "--requests", "5", "--max-tokens", "12"]
SMALLER = ["--clients", "4", "--requests", "3", "--max-tokens", "4"]


def summary(output: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    return found


@pytest.mark.demo
def test_eight_clients_get_what_each_would_get_alone_within_the_budget(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A batch of 4 and a queue of 64: requests wait for each other, and some clients leave."""
    status = load_test.main([*SMALL, "--ram-budget", "1G", "--max-batch", "4", "--disconnects", "0.2"])
    output, _ = capfd.readouterr()
    figures = summary(output)
    assert status == 0 and figures["wrong"] == 0, output
    assert figures["requests"] == 40 == figures["identical"] + figures["disconnects"]
    assert figures["disconnects"] > 0
    assert 0 < figures["peak_rss_bytes"] <= figures["ram_budget_bytes"] == 1 << 30


# Against a server that errs


class Stub(BaseHTTPRequestHandler):
    """Answers as OpenAI's API does, with words made of the question; from the 30th request on with `flaw`."""

    protocol_version = "HTTP/1.1"
    flaw: str = ""
    asked: Counter[str]
    lock: threading.Lock

    def do_GET(self) -> None:
        peak = 2 if self.flaw == "memory" else 1
        running = 1 if self.flaw == "leftover" else 0
        memory = {"peak_rss_bytes": peak, "ram_budget_bytes": 1}
        self._json(200, {"requests": {"running": running, "waiting": 0}, "memory": memory})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.lock:
            self.asked["all"] += 1
            flaw = self.flaw if self.asked["all"] >= 30 else ""
        asked = body["messages"][-1]["content"]
        words = [f"{number}:{len(asked)}:{asked[:20]} " for number in range(body["max_tokens"])]
        if flaw == "mixed-up":
            words = ["something else "]
        if flaw == "short":
            words.pop()
        if flaw == "busy":
            with self.lock:
                self.asked["busy"] += 1
                if self.asked["busy"] <= 3:
                    self._json(429, {"error": {"message": "busy"}}, {"Retry-After": "0"})
                    return
        if flaw == "failing":
            self._json(500, {"error": {"message": "a bug"}})
        elif body.get("stream"):
            self._stream(words, cut=flaw == "cut")
        else:
            choice = {"message": {"content": "".join(words)}, "finish_reason": "length"}
            self._json(200, {"choices": [choice], "usage": _usage(words)})

    def _json(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(data)

    def _stream(self, words: list[str], cut: bool) -> None:
        self.close_connection = True
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        chunks: list[Any] = [
            {"choices": [{"delta": {"content": word}, "finish_reason": None}]} for word in words
        ]
        chunks.append({"choices": [{"delta": {}, "finish_reason": "length"}]})
        chunks.append({"choices": [], "usage": _usage(words)})
        try:
            for chunk in chunks[: len(words) if cut else None]:
                self.wfile.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
            if not cut:
                self.wfile.write(b"data: [DONE]\n\n")
        except ConnectionError:
            return  # the client has left

    def log_message(self, *_: Any) -> None:
        pass


def _usage(words: list[str]) -> dict[str, Any]:
    return {"completion_tokens": len(words), "prompt_tokens_details": {"cached_tokens": 0}}


@contextmanager
def stub(flaw: str) -> Iterator[str]:
    handler = type("Handler", (Stub,), {"flaw": flaw, "asked": Counter(), "lock": threading.Lock()})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_a_server_without_a_flaw_passes(capsys: pytest.CaptureFixture[str]) -> None:
    with stub("") as url:
        assert load_test.main([*SMALL, "--url", url]) == 0
    figures = summary(capsys.readouterr().out)
    assert figures["requests"] == 40 and figures["wrong"] == 0 and figures["retries_429"] == 0


def test_a_busy_server_is_asked_again(capsys: pytest.CaptureFixture[str]) -> None:
    with stub("busy") as url:
        assert load_test.main([*SMALL, "--url", url, "--disconnects", "0"]) == 0
    figures = summary(capsys.readouterr().out)
    assert figures["retries_429"] == 3 and figures["identical"] == 40


@pytest.mark.parametrize(
    ("flaw", "said"),
    [
        ("mixed-up", "something else"),
        ("short", "alone Answer"),
        ("cut", "without [DONE]"),
        ("failing", "status 500: "),
        ("memory", "peak RSS 2 is above the budget of 1 bytes"),
        ("leftover", "1 run and 0 wait"),
    ],
)
def test_a_server_that_errs_fails(
    flaw: str, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load_test, "REST_S", 0.0)
    with stub(flaw) as url:
        assert load_test.main([*SMALLER, "--url", url, "--disconnects", "0"]) == 1
    output = capsys.readouterr().out
    assert said in output and summary(output)["wrong"] > 0
