"""Connections: how many there may be, and how long a request's head may take. On top of uvicorn's h11
protocol, which itself would wait for a head for ever.

`scope["state"]["abort"]` of a request drops its connection at once, unsent data included: for readers who do
not read.
"""

import asyncio
from typing import Any, ClassVar

from uvicorn.protocols.http.h11_impl import H11Protocol

from flashmoe.server.limits import Limits

_BUSY = (503, "Service Unavailable", "too many connections are open; try again later")
_NONSENSE = (400, "Bad Request", "this is not HTTP/1.1 as it should be, or its head is too large")
_SLOW = (408, "Request Timeout", "the request's head took too long")


class LimitedProtocol(H11Protocol):
    """Use a subclass from `with_limits`."""

    limits: ClassVar[Limits] = Limits()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.app_state = {**self.app_state, "abort": self._abort}
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections:
            self._refuse(*_BUSY)
            return
        self._await_head()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        begun = self.cycle
        super().data_received(data)
        if self.cycle is not begun:
            self._forget_timer()
        elif (begun is None or begun.response_complete) and self._head_timer is None:
            self._await_head()  # the beginning of another head: keep-alive's timer has been stopped by it

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_timer()
        super().connection_lost(exc)

    def timeout_keep_alive_handler(self) -> None:
        if self.transport.get_write_buffer_size():  # closing would wait until somebody reads it
            self.transport.abort()
        else:
            super().timeout_keep_alive_handler()

    def send_400_response(self, msg: str) -> None:
        """In the shape of all our errors, unless an answer has begun."""
        if self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete:
            self.transport.close()
        else:
            self._refuse(*_NONSENSE)

    def _unsupported_upgrade_warning(self) -> None:
        """An upgrade is simply not made; uvicorn would log advice to install a WebSocket library."""

    def _await_head(self) -> None:
        self._head_timer = self.loop.call_later(self.limits.header_s, self._head_is_late)

    def _head_is_late(self) -> None:
        self._head_timer = None
        if not self.transport.is_closing():
            self._refuse(*_SLOW)

    def _forget_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _refuse(self, status: int, reason: str, why: str) -> None:
        kind = "unavailable_error" if status == 503 else "invalid_request_error"
        body = f'{{"error": {{"message": "{why}", "type": "{kind}", "param": null, "code": null}}}}'
        self.transport.write(
            f"HTTP/1.1 {status} {reason}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
            f"connection: close\r\n\r\n{body}".encode("ascii")
        )
        self.transport.close()

    def _abort(self) -> None:
        self.transport.abort()


def with_limits(limits: Limits) -> type[LimitedProtocol]:
    """The protocol class for these limits: uvicorn makes the objects."""
    return type("Protocol", (LimitedProtocol,), {"limits": limits})
