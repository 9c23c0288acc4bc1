"""One line about each request when it is over: who asked for what is seen, what was said is not."""

import time
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send


class AccessLog:
    """An ASGI layer around the whole application. Requests that never became one (a head that is too slow, or
    is not HTTP) are not seen."""

    def __init__(self, app: ASGIApp, say: Callable[[str], None]) -> None:
        self._app, self._say = app, say

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, begin_s = "gone", time.perf_counter()  # gone: the client, before it got an answer

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        state = scope.setdefault("state", {})
        try:
            await self._app(scope, receive, sending)
        finally:
            tokens = sum(len(stats.token_ids) for stats in state.get("generations", ()))
            # As it came, percent signs and all: a line stays a line. The query is not told.
            path = scope.get("raw_path", b"").decode("ascii", "replace")[:200]
            self._say(
                f"{scope['method']} {path} {status}, {tokens} tokens, {time.perf_counter() - begin_s:.3f} s"
            )
