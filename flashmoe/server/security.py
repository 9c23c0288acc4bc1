"""Who may ask what: Host and Origin against DNS rebinding and foreign pages, the API key, a body's size and
time.

One ASGI layer around the whole application; it has the whole body before anything looks at it.
"""

import asyncio
import hmac
import ipaddress
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flashmoe.server.cors import AllowedOrigins, answer_headers, is_preflight, preflight_headers
from flashmoe.server.errors import ApiError
from flashmoe.server.limits import Limits

HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none';"
    " frame-ancestors 'none'; object-src 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}
LOOPBACK = ("localhost", "127.0.0.1", "::1")
# The page and what says no more than that we are alive; it asks for the key itself.
_KEYED = ("/v1/", "/metrics", "/tokenize", "/detokenize")
_OPEN = ("/v1/health",)
_DISCARDED, _DISCARD_S = 8, 1.0  # times the largest body; at most so long
_READING = ("GET", "HEAD")


class AllowedHosts:
    """Names by which this server may be called; "*" allows all."""

    def __init__(self, bind_host: str, names: Iterable[str] = ()) -> None:
        self._names = {_bare(name) for name in (*LOOPBACK, bind_host, *names)}
        # Behind 0.0.0.0 are addresses we do not know. Rebinding needs a name, so an address is no danger.
        self._addresses = _bare(bind_host) in ("0.0.0.0", "::", "")

    def __contains__(self, host: object) -> bool:
        name = _host_name(str(host))
        if name in self._names or "*" in self._names:
            return True
        return self._addresses and _is_address(name)


class Guard:
    """The ASGI layer."""

    def __init__(
        self, app: ASGIApp, limits: Limits, hosts: AllowedHosts, api_key: str | None,
        note: Callable[[int], None] = lambda status: None, origins: AllowedOrigins | None = None,
    ) -> None:  # fmt: skip
        """`note` is told the status of each refusal; pages of `origins` may ask, too."""
        self._app, self._limits, self._hosts, self._note = app, limits, hosts, note
        self._origins = origins or AllowedOrigins()
        self._key = None if api_key is None else api_key.encode("utf-8")
        self._held_bytes = 0  # of all requests under way

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        origin, body = self._origins.of(headers), _Body()
        guarded = _with_headers(send, {} if origin is None else answer_headers(origin), bool(self._origins))
        try:
            await self._serve(body, scope, headers, origin, receive, guarded)
        finally:
            self._held_bytes -= body.size

    async def _serve(
        self, body: "_Body", scope: Scope, headers: Headers, origin: str | None, receive: Receive,
        guarded: Send,
    ) -> None:  # fmt: skip
        only_asks = origin is not None and is_preflight(scope["method"], headers)
        try:
            self._check_host(headers)
            if origin is None:
                self._check_origin(scope["method"], headers)
            if not only_asks:  # a browser sends no key with it
                self._check_key(scope["path"], headers)
            if not await self._fill(body, headers, receive):  # the client left
                return
        except ApiError as error:
            self._note(error.status_code)
            await self._discard(receive)
            told = {**(error.headers or {}), "Connection": "close"}  # the rest of the body is not read
            await JSONResponse(error.body(), error.status_code, told)(scope, receive, guarded)
            return
        if only_asks:
            await Response(status_code=204, headers=preflight_headers(headers))(scope, receive, guarded)
            return
        await self._app(scope, _replay(body.take(), receive), guarded)

    def _check_host(self, headers: Headers) -> None:
        host = headers.get("host", "")
        if host not in self._hosts:
            raise ApiError(
                403, f"host {host[:100]!r} is not ours; the server's option --allowed-host adds one",
                code="host",
            )

    def _check_origin(self, method: str, headers: Headers) -> None:
        if method not in _READING and not _same_origin(headers, headers.get("host", "")):
            raise ApiError(
                403, "pages of other origins may not use this server; its option --cors-origin lets one",
                code="origin",
            )  # fmt: skip

    def _check_key(self, path: str, headers: Headers) -> None:
        if self._key is None or not needs_key(path):
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        # Starlette reads headers as Latin-1; compare the bytes that came.
        if scheme.lower() != "bearer" or not hmac.compare_digest(
            given.strip().encode("latin-1"), self._key
        ):
            raise ApiError(
                401, "give the server's API key: Authorization: Bearer KEY", code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )  # fmt: skip

    async def _discard(self, receive: Receive) -> None:
        """Read what is left of a refused body, within reason: a client that still sends when the connection
        closes never sees the answer."""
        left = _DISCARDED * self._limits.body_bytes
        try:
            async with asyncio.timeout(_DISCARD_S):
                more = True
                while more and left > 0:
                    message = await receive()
                    left -= len(message.get("body", b""))
                    more = message.get("more_body", False)
        except TimeoutError:
            pass

    async def _fill(self, body: "_Body", headers: Headers, receive: Receive) -> bool:
        """Read the whole body; False if the client left in the middle of it."""
        most = self._limits.body_bytes
        too_large = ApiError(413, f"the body is larger than {most} bytes; shorten it", code="body_too_large")
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > most:
            raise too_large
        try:
            async with asyncio.timeout(self._limits.body_s):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return False
                    bit, more = message.get("body", b""), message.get("more_body", False)
                    body.data += bit
                    body.size += len(bit)
                    self._held_bytes += len(bit)
                    if body.size > most:
                        raise too_large
                    # Small ones always pass: four who hold much should not lock everybody out.
                    if self._held_bytes > self._limits.bodies_bytes and body.size > self._limits.small_bytes:
                        raise ApiError(
                            503, "too many large requests at once; try again later", code="busy",
                            headers={"Retry-After": "5"},
                        )  # fmt: skip
        except TimeoutError as error:
            late = f"the body did not arrive within {self._limits.body_s:g} s"
            raise ApiError(408, late, code="body_timeout") from error
        return True


class _Body:
    """What came of a body; `size` still tells when it was taken."""

    def __init__(self) -> None:
        self.data, self.size = bytearray(), 0

    def take(self) -> bytes:
        data, self.data = bytes(self.data), bytearray()
        return data


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body once, then what comes behind it: that the client has left."""
    given = False

    async def replaying() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replaying


def _with_headers(send: Send, extra: Mapping[str, str], by_origin: bool) -> Send:
    """`by_origin`: whether answers differ by who asks, which caches must know."""

    async def sending(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in (*HEADERS.items(), *extra.items()):
                headers.setdefault(name, value)
            if by_origin:
                headers.add_vary_header("Origin")
            if headers.get("content-type", "").startswith(("application/json", "text/event-stream")):
                headers.setdefault("Cache-Control", "no-store")
        await send(message)

    return sending


def _same_origin(headers: Headers, host: str) -> bool:
    """Whether a request that changes something comes from our own page, or from no page at all."""
    if headers.get("sec-fetch-site", "none") in ("cross-site", "same-site"):
        return False
    origin = headers.get("origin")
    return origin is None or _netloc(origin) == host.lower()


def _netloc(origin: str) -> str | None:
    """"host:port" of an origin; None if it is none, as "null" is."""
    try:
        parts = urlsplit(origin.lower())
    except ValueError:
        return None
    return parts.netloc if parts.scheme in ("http", "https") else None


def needs_key(path: str) -> bool:
    """Whether a path is the API's, not the page's."""
    return path.startswith(_KEYED) and path not in _OPEN


def is_loopback(host: str) -> bool:
    name = _bare(host)
    return name in LOOPBACK or (_is_address(name) and ipaddress.ip_address(name).is_loopback)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _host_name(host: str) -> str:
    """A Host header without its port."""
    if host.startswith("["):
        return _bare(host.partition("]")[0])
    return _bare(host.rpartition(":")[0] if host.count(":") == 1 else host)


def _bare(name: str) -> str:
    return name.strip().strip("[]").rstrip(".").lower()
