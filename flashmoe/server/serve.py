"""Runs the application: socket, signals, loading beside it, and an orderly end.

The socket is open before the model is loaded, so that /health can say so. SIGTERM and Ctrl-C: no new
connections, what runs may finish within `drain_s`, the rest is cancelled; a second Ctrl-C ends it at once.
"""

import asyncio
import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field

import uvicorn

from flashmoe.api import LLM
from flashmoe.errors import ConfigError
from flashmoe.server.access_log import AccessLog
from flashmoe.server.app import create_app
from flashmoe.server.cors import AllowedOrigins
from flashmoe.server.limits import Limits
from flashmoe.server.protocol import with_limits
from flashmoe.server.security import AllowedHosts, is_loopback
from flashmoe.server.service import Service

_AFTER_CANCEL_S = 5  # for the streams to say so
_AFTER_CUT_S = 1  # for requests to notice that their clients are gone


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """What `flashmoe serve` was told. Raises ConfigError for what cannot be."""

    model_name: str
    host: str = "127.0.0.1"
    port: int = 8000  # 0: any that is free
    api_key: str | None = None
    allowed_hosts: Sequence[str] = ()
    queue: int = 64
    drain_s: float = 30.0
    limits: Limits = field(default_factory=Limits)
    cors_origins: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name, value, least, most in (
            ("port", self.port, 0, 65535), ("queue", self.queue, 1, 100_000),
            ("drain-seconds", self.drain_s, 0, 86_400),
        ):  # fmt: skip
            if not least <= value <= most:
                raise ConfigError(f"--{name} {value:g} is not from {least} to {most}")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable()):
            raise ConfigError("the API key has other than printable ASCII characters; HTTP cannot carry it")
        if self.api_key is not None and not self.api_key.strip():
            raise ConfigError("the API key is empty; give one, or leave out --api-key and FLASHMOE_API_KEY")
        AllowedOrigins(self.cors_origins)


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; ConfigError if the address is taken or none of ours."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, kind, protocol)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
            listening.listen(1024)
        except BaseException:
            listening.close()
            raise
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            f"cannot listen on {host} port {port}: {reason}; choose another --host or --port"
        ) from error
    return listening


class HttpServer(uvicorn.Server):
    """uvicorn's, ending as the module's docstring says."""

    def __init__(
        self, service: Service, options: ServeOptions, log: Callable[[str], None] | None = None
    ) -> None:
        """`log` is told a line about each request."""
        app = create_app(
            service, AllowedHosts(options.host, options.allowed_hosts), options.api_key,
            AllowedOrigins(options.cors_origins),
        )  # fmt: skip
        super().__init__(
            uvicorn.Config(
                app if log is None else AccessLog(app, log),
                http=with_limits(options.limits),
                ws="none",
                loop="asyncio",
                lifespan="off",
                log_level="error",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=max(1, int(options.limits.idle_s)),
                timeout_graceful_shutdown=int(options.drain_s) + _AFTER_CANCEL_S + _AFTER_CUT_S,
                h11_max_incomplete_event_size=32 * 1024,
            )
        )
        self._service, self._drain_s = service, options.drain_s
        self.last_signal: int | None = None
        self._ending: asyncio.AbstractEventLoop | None = None

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain, then cancel, then cut off: uvicorn would cancel tasks, and log a traceback of each."""
        self._ending = loop = asyncio.get_running_loop()
        timers = (
            loop.call_later(0.0 if self.force_exit else self._drain_s + _AFTER_CANCEL_S, self._cut_off),
            loop.call_later(self._drain_s, self._service.cancel_all),
        )
        await super().shutdown(sockets)
        for timer in timers:
            timer.cancel()
        if self.server_state.tasks:
            await asyncio.wait(self.server_state.tasks, timeout=_AFTER_CUT_S)

    def _cut_off(self) -> None:
        """Whoever is still connected: a body that does not come, a reader who does not read."""
        for connection in list(self.server_state.connections):
            connection.transport.abort()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Unlike uvicorn's: the signal is not raised again behind the orderly end."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        self.last_signal = number
        if self.should_exit and number == signal.SIGINT:
            self.force_exit = True
            if self._ending is not None:
                self._ending.call_soon_threadsafe(self._cut_off)
        self.should_exit = True


def serve(
    load: Callable[[], LLM], options: ServeOptions, say: Callable[[str], None],
    log: Callable[[str], None] | None = None,
) -> int | None:  # fmt: skip
    """Serve until a signal comes, and return its number. Raises what `load` raises.

    `log` is told a line about each request.
    """
    listening = bind(options.host, options.port)
    port = listening.getsockname()[1]
    service = Service(options.model_name, options.limits)
    server = HttpServer(service, options, log)
    if not is_loopback(options.host) and options.api_key is None:
        say(f"warning: {options.host} can be reached by others, and there is no --api-key to keep them out")
    loaded: list[LLM] = []
    failed: list[BaseException] = []

    def open_model() -> None:
        try:
            loaded.append(load())
            service.open(loaded[0], options.queue)
        except BaseException as error:  # carried to the main thread, which raises it
            failed.append(error)
            server.should_exit = True
        else:
            shown = f"[{options.host}]" if ":" in options.host else options.host
            say(f"{options.model_name}: http://{shown}:{port}/ (API below /v1); Ctrl-C stops")

    loading = threading.Thread(target=open_model, name="load", daemon=True)
    loading.start()
    try:
        server.run([listening])
        if server.should_exit and failed:
            raise failed[0]
    finally:
        service.close()
        for llm in loaded:
            llm.close()
    return server.last_signal
