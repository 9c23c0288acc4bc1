"""Server-sent events: a stream that notices when its reader has left or no longer reads."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from flashmoe.server.errors import ApiError
from flashmoe.server.generations import SlowReaderError
from flashmoe.server.limits import Limits

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"
_PING = b": still at work\n\n"  # a comment: clients skip it


def event(value: Any) -> bytes:
    """One event with a JSON value."""
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8") + b"\n\n"


class EventStream(Response):
    """Sends `events` as they come; `cancel` is called once nobody reads them any more."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], cancel: Callable[[], None], limits: Limits) -> None:
        super().__init__()
        del self.headers["content-length"]
        self.headers["X-Accel-Buffering"] = "no"  # a proxy should pass events on at once
        self._events, self._cancel, self._limits = events, cancel, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.ensure_future(self._send_all(send))
        leaving = asyncio.ensure_future(left(receive))
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not sending.done():
                return
            try:
                sending.result()
            except (SlowReaderError, TimeoutError):
                if abort := scope.get("state", {}).get("abort"):  # our own protocol's
                    abort()
        finally:
            self._cancel()
            for task in (sending, leaving):
                task.cancel()
            await asyncio.gather(sending, leaving, return_exceptions=True)

    async def _send_all(self, send: Send) -> None:
        await self._send(
            send, {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        )
        upcoming = asyncio.ensure_future(anext(self._events, None))
        try:
            while True:
                done, _ = await asyncio.wait({upcoming}, timeout=self._limits.ping_s)
                data = upcoming.result() if done else _PING
                if data is None:
                    break
                await self._send(send, {"type": "http.response.body", "body": data, "more_body": True})
                if done:
                    upcoming = asyncio.ensure_future(anext(self._events, None))
        except ApiError as error:
            await self._send(
                send, {"type": "http.response.body", "body": event(error.body()), "more_body": True}
            )
        finally:
            upcoming.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await upcoming
        await self._send(send, {"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send, message: dict[str, Any]) -> None:
        async with asyncio.timeout(self._limits.send_s):
            await send(message)


async def left(receive: Receive) -> None:
    """Returns when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_left(receive: Receive, work: Coroutine[Any, Any, T], cancel: Callable[[], None]) -> T | None:
    """What `work` gives; None, after `cancel`, if the client leaves before."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(left(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        cancel()
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)
