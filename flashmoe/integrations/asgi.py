"""Call an ASGI app inside the process, as an HTTP server would: a request in, its response piece by piece.

Knows HTTP and ASGI, neither models nor Ray. Does not cover lifespan events or WebSockets.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import anyio

Message = MutableMapping[str, Any]
App = Callable[
    [Message, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]
]
Headers = list[tuple[str, str]]
UNREAD_PIECES = 16  # of a response that nobody takes; then the app waits


@dataclass(frozen=True, slots=True)
class HttpRequest:
    """A whole request. Header names in lower case."""

    method: str
    path: str
    query: str
    headers: Sequence[tuple[str, str]]
    body: bytes
    client: str = "127.0.0.1"


async def call_app(app: App, request: HttpRequest) -> AsyncGenerator[tuple[int, Headers] | bytes]:
    """Yields (status, headers), then the body's pieces as they come.

    Closing the iterator tells the app that the client has gone, and cancels it. Raises what the app raises.
    """
    ours, theirs = anyio.create_memory_object_stream[Message](UNREAD_PIECES)
    gone, parts = asyncio.Event(), iter([request.body])

    async def receive() -> Message:
        for body in parts:
            return {"type": "http.request", "body": body, "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def run() -> None:
        async with ours:
            await app(_scope(request), receive, ours.send)

    task = asyncio.ensure_future(run())
    try:
        async with theirs:
            async for message in theirs:
                if message["type"] == "http.response.start":
                    headers = [(k.decode("latin-1"), v.decode("latin-1")) for k, v in message["headers"]]
                    yield message["status"], headers
                elif message.get("body"):
                    yield bytes(message["body"])
        await task
    finally:
        gone.set()
        if not task.done():
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


def _scope(request: HttpRequest) -> Message:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": request.method,
        "scheme": "http",
        "path": request.path,
        "raw_path": request.path.encode(),
        "query_string": request.query.encode("latin-1"),
        "root_path": "",
        "headers": [(name.encode("latin-1"), value.encode("latin-1")) for name, value in request.headers],
        "client": (request.client, 0),
        "server": ("127.0.0.1", 80),
        "state": {},
    }
