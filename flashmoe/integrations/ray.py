"""Ray: replicas behind one OpenAI endpoint (Ray Serve), and a stage for batch jobs (Ray Data).

    from ray import serve
    from flashmoe.integrations.ray import serving_app
    serve.run(serving_app("PATH", replicas=4, ram_budget="16G"))

    ds.map_batches(FlashMoEBatch, fn_constructor_kwargs={"model": "PATH", "ram_budget": "16G"}, …)

Each replica is a process with a model and a RAM budget of its own. A chat's turns reach the replica that has
its KV prefix: the gateway names the conversation (integrations/sessions.py), Ray hashes the name to a
replica. Replicas answer with the application of `flashmoe serve`, called in the process; who may ask is
checked once, in the gateway. Ray pickles what goes between its processes; we hand it numbers, text and bytes.

Written for ray[serve,data] 2.60. docs/scaling.md says when any of this pays.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence
from typing import Any

try:
    from ray import serve
    from ray.exceptions import RayError, RayTaskError
    from ray.serve.config import RequestRouterConfig
    from ray.serve.exceptions import BackPressureError, RayServeException
except ImportError as error:
    raise ImportError(f"this needs Ray ({error}): pip install 'flashmoe[ray]'") from error

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flashmoe.api import LLM
from flashmoe.errors import BudgetError, ConfigError
from flashmoe.integrations.asgi import HttpRequest, call_app
from flashmoe.integrations.batches import FlashMoEBatch
from flashmoe.integrations.sessions import conversation_key
from flashmoe.server.app import create_api
from flashmoe.server.errors import ApiError
from flashmoe.server.limits import Limits
from flashmoe.server.security import AllowedHosts, Guard
from flashmoe.server.service import Service
from flashmoe.sizes import parse_size

__all__ = ["FlashMoEBatch", "serving_app"]

log = logging.getLogger(__name__)

ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
FALLBACKS = 2  # replicas that are tried after a conversation's own, when that one is full
# Not the page, its figures or /metrics: they are of one process, and a request may reach any.
PATHS = (
    "/v1/chat/completions", "/v1/completions", "/v1/models", "/tokenize", "/detokenize", "/health",
    "/v1/health",
)  # fmt: skip
RETRY_AFTER_S = 5
REPLICA_HEADER = "x-flashmoe-replica"  # of each answer: who gave it


def serving_app(
    model: str | None = None, *, ram_budget: str, replicas: int = 1, cpus_per_replica: int = 1,
    max_batch: int = 8, queue: int = 64, served_model_name: str | None = None, api_key: str | None = None,
    allowed_hosts: Sequence[str] = (), **llm_options: Any,
) -> serve.Application:  # fmt: skip
    """An application for `serve.run` or `serve deploy`.

    `ram_budget` is each replica's, "16G" and not a share of what is free: Ray reserves it where a replica is
    placed, and `cpus_per_replica`, which is the number of threads. The model must be at the same path, or in
    the Hugging Face cache, on every node. `queue`: so many requests wait at a replica; then its neighbours
    are asked, then the client is told to come back. `llm_options` as in `LLM`. Raises
    ConfigError and BudgetError.
    """
    if not (isinstance(replicas, int) and replicas >= 1):
        raise ConfigError(f"replicas {replicas!r} is not a number of processes")
    try:
        budget_bytes = parse_size(ram_budget, free_bytes=None)
    except BudgetError as error:
        raise BudgetError(f"ram_budget of a replica: {error}; several share a machine, so say 16G") from error
    options = {"threads": cpus_per_replica, "max_batch": max_batch, **llm_options}
    name = served_model_name or (model.rstrip("/").rpartition("/")[2] if model else "smolmoe")
    model_replicas = serve.deployment(
        _Replica,
        name="FlashMoE",
        num_replicas=replicas,
        max_ongoing_requests=max_batch + queue,
        max_queued_requests=queue,
        ray_actor_options={"num_cpus": cpus_per_replica, "memory": budget_bytes},
        request_router_config=RequestRouterConfig(
            request_router_class=ROUTER, request_router_kwargs={"num_fallback_replicas": FALLBACKS}
        ),
    ).bind(model, name, ram_budget, queue, options)
    gateway = serve.deployment(
        _Gateway,
        name="Gateway",
        max_ongoing_requests=replicas * (max_batch + queue) + Limits().connections,
        ray_actor_options={"num_cpus": 0},
    )
    app: serve.Application = gateway.bind(model_replicas, api_key, list(allowed_hosts))
    return app


class _Replica:
    """A model with its RAM budget, and the application that answers for it."""

    def __init__(
        self, model: str | None, name: str, ram_budget: str, queue: int, options: dict[str, Any]
    ) -> None:
        self._llm = LLM(model, ram_budget=ram_budget, **options)
        self._service = Service(name)
        self._service.open(self._llm, queue)
        self._app = create_api(self._service)
        self._id = serve.get_replica_context().replica_id.unique_id

    async def http(
        self, method: str, path: str, query: str, headers: list[tuple[str, str]], body: bytes
    ) -> AsyncGenerator[tuple[int, list[tuple[str, str]]] | bytes]:
        """Answer one request: (status, headers), then pieces of the body."""
        parts = call_app(self._app, HttpRequest(method, path, query, headers, body))
        try:
            async for part in parts:
                if isinstance(part, tuple):
                    part = part[0], [*part[1], (REPLICA_HEADER, self._id)]
                yield part
        finally:
            await parts.aclose()  # at once: the app hears that the client has left

    def __del__(self) -> None:
        if hasattr(self, "_service"):
            self._service.close()
            self._llm.close()


class _Gateway:
    """Checks who asks, names the conversation, and hands the request to its replica."""

    def __init__(self, replicas: Any, api_key: str | None, allowed_hosts: list[str]) -> None:
        self._replicas = replicas
        hosts = AllowedHosts("127.0.0.1", allowed_hosts)
        self._app = Guard(self._forward, Limits(), hosts, api_key, _note_refusal)

    async def __call__(self, request: Request) -> Response:
        return _AppResponse(self._app)

    async def _forward(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers, path = Headers(scope=scope), scope["path"]
        if path not in PATHS and not path.startswith("/v1/models/"):
            error = ApiError(404, f"{path[:200]} is not there behind Ray; its dashboard shows the replicas")
            await JSONResponse(error.body(), 404)(scope, receive, send)
            return
        body = (await receive()).get("body", b"")  # Guard has it whole
        handle = self._replicas.options(stream=True, session_id=conversation_key(headers, body))
        query = scope["query_string"].decode("latin-1")
        parts = handle.http.remote(scope["method"], path, query, list(headers.items()), body)
        sent: list[Message] = []
        leaves = asyncio.ensure_future(_gone(receive))
        passes = asyncio.ensure_future(_pass_on(parts, send, sent))
        try:
            await asyncio.wait((leaves, passes), return_when=asyncio.FIRST_COMPLETED)
            if passes.done():
                passes.result()
        except (RayError, RayServeException) as error:
            await _tell(_api_error(error), sent, scope, receive, send)
        finally:
            parts.cancel()
            for task in (leaves, passes):
                task.cancel()
            await asyncio.gather(leaves, passes, return_exceptions=True)


class _AppResponse(Response):
    """What an ASGI app answers, as the response that Ray Serve asks for."""

    def __init__(self, app: ASGIApp) -> None:
        super().__init__()
        self._answer = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._answer(scope, receive, send)


def _note_refusal(status: int) -> None:
    log.info("a request was refused with status %d", status)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _pass_on(parts: Any, send: Send, sent: list[Message]) -> None:
    async for part in parts:
        message: Message
        if isinstance(part, bytes):
            message = {"type": "http.response.body", "body": part, "more_body": True}
        else:
            status, headers = part
            raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers]
            message = {"type": "http.response.start", "status": status, "headers": raw}
            sent.append(message)
        await send(message)
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _tell(error: ApiError, sent: list[Message], scope: Scope, receive: Receive, send: Send) -> None:
    """The error as the answer, or as a stream's last event where the answer has begun."""
    answer = JSONResponse(error.body(), error.status_code, error.headers)
    if not sent:
        await answer(scope, receive, send)
        return
    if b"text/event-stream" in dict(sent[0]["headers"]).get(b"content-type", b""):
        event = b"data: " + bytes(answer.body) + b"\n\n"
        await send({"type": "http.response.body", "body": event, "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def _api_error(error: Exception) -> ApiError:
    later = {"Retry-After": str(RETRY_AFTER_S)}
    if isinstance(error, BackPressureError):
        return ApiError(429, "all replicas are busy; try again later", None, "queue_full", later)
    if isinstance(error, RayTaskError):
        return ApiError(500, "the replica failed; its log, in Ray's dashboard, says why")
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    return ApiError(503, f"the replica cannot be reached: {reason}; try again", None, None, later)
