"""The FastAPI application: which path is answered by what, and the description of it all (OpenAPI)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Response
from starlette.responses import FileResponse, JSONResponse
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

import flashmoe
from flashmoe.server import errors
from flashmoe.server.chat import chat
from flashmoe.server.completions import complete
from flashmoe.server.cors import AllowedOrigins
from flashmoe.server.metrics import CONTENT_TYPE
from flashmoe.server.schemas import (
    ChatCompletion,
    ChatRequest,
    Completion,
    CompletionRequest,
    DetokenizeRequest,
    ErrorBody,
    Health,
    ModelCard,
    ModelList,
    Text,
    TokenizeRequest,
    TokenList,
)
from flashmoe.server.security import AllowedHosts, Guard, needs_key
from flashmoe.server.service import Service, check_length
from flashmoe.server.strict_json import StrictRequest, StrictRoute

WEB = Path(__file__).parent.parent / "web"
# The page's files belong together: after an upgrade a browser must not mix those of two versions.
REVALIDATE = {"Cache-Control": "no-cache"}
# Of one event; what its data says as JSON is in OpenAI's reference.
_EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
_EVENTS = {"content": {"text/event-stream": {"schema": _EVENT}}}


def create_app(
    service: Service, hosts: AllowedHosts, api_key: str | None = None, origins: AllowedOrigins | None = None
) -> ASGIApp:
    """The whole application, guarded. `origins`: whose pages may use it beside its own."""
    return Guard(create_api(service), service.limits, hosts, api_key, service.metrics.refused, origins)


def create_api(service: Service) -> FastAPI:
    """The application without the checks of who asks: for those who put their own in front."""
    api = FastAPI(
        title="FlashMoE",
        version=flashmoe.__version__,
        description="OpenAI-compatible API over one Mixture-of-Experts model.",
        docs_url=None,  # their pages load scripts from elsewhere
        redoc_url=None,
        separate_input_output_schemas=False,
    )
    errors.install(api, service.metrics.refused)
    api.include_router(_model_routes(service))
    api.include_router(_state_routes(service))
    api.router.routes.extend(page_routes(WEB))
    _describe_errors_as_they_are(api)
    return api


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorBody} for status in (400, 401, 403, 408, 413, 503, *statuses)}


def _model_routes(service: Service) -> APIRouter:
    """What the model answers."""
    router = APIRouter(route_class=StrictRoute)

    @router.post(
        "/v1/chat/completions", response_model=ChatCompletion,
        responses={200: _EVENTS, **_errors(429, 500)}, summary="Answer a conversation",
    )  # fmt: skip
    async def chat_completions(body: ChatRequest, request: StrictRequest) -> Response:
        return await chat(service, body, request)

    @router.post(
        "/v1/completions", response_model=Completion,
        responses={200: _EVENTS, **_errors(429, 500)}, summary="Continue text",
    )  # fmt: skip
    async def completions(body: CompletionRequest, request: StrictRequest) -> Response:
        return await complete(service, body, request)

    @router.post("/tokenize", responses=_errors(), summary="Text to token ids")
    async def tokenize(body: TokenizeRequest) -> TokenList:
        opened = service.opened

        def encode() -> list[int]:
            check_length(body.content, opened, "content")
            return opened.llm.tokenizer.encode(body.content, body.add_special)

        return TokenList(tokens=await service.in_thread(encode))

    @router.post("/detokenize", responses=_errors(), summary="Token ids to text")
    async def detokenize(body: DetokenizeRequest) -> Text:
        tokenizer = service.opened.llm.tokenizer
        text = await service.in_thread(lambda: tokenizer.decode(body.tokens, skip_special_tokens=False))
        return Text(content=text)

    return router


def _state_routes(service: Service) -> APIRouter:
    """What there is, and how it does."""
    router = APIRouter()

    @router.get("/v1/models", responses=_errors(), summary="The model, as a list")
    async def models() -> ModelList:
        return ModelList(object="list", data=[_card(service)])

    @router.get("/v1/models/{id:path}", responses=_errors(404), summary="The model")
    async def model(id: str) -> ModelCard:
        if id != service.model_name:
            raise errors.ApiError(404, f"no model {id[:200]!r}; this server has {service.model_name}", "id")
        return _card(service)

    @router.get("/v1/stats", responses=_errors(), summary="The cache at work")
    async def stats() -> dict[str, Any]:
        return service.opened.live.snapshot()

    @router.get(
        "/metrics", response_class=Response, summary="Figures for Prometheus",
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **_errors()},
    )  # fmt: skip
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)

    async def health() -> JSONResponse:
        state = service.state
        return JSONResponse({"status": state}, 200 if state == "ok" else 503)

    for path in ("/health", "/v1/health"):
        router.add_api_route(
            path, health, response_model=Health, responses={503: {"model": Health}, **_errors_of_guard()},
            summary="Whether the model is loaded", operation_id=path.strip("/").replace("/", "_"),
        )  # fmt: skip
    return router


def _errors_of_guard() -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorBody} for status in (403, 408, 413)}


def _card(service: Service) -> ModelCard:
    opened = service.opened
    meta = {
        "model_type": opened.llm.config.model_type,
        "n_ctx": opened.context,
        "n_vocab": opened.llm.config.vocab_size,
    }
    return ModelCard.model_validate(
        {"id": service.model_name, "object": "model", "created": opened.created, "owned_by": "flashmoe",
         "meta": meta}
    )  # fmt: skip


class _Revalidated(StaticFiles):
    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers.update(REVALIDATE)
        return response


def page_routes(folder: Path) -> Sequence[BaseRoute]:
    """The page's files as they lie in `folder`, index.html at /; none without the folder."""
    if not folder.is_dir():
        return []

    def file_route(path: str, file: Path) -> Route:
        async def serve(_: Any) -> Response:
            return FileResponse(file, headers=REVALIDATE)

        return Route(path, serve, methods=["GET"])

    routes: list[BaseRoute] = []
    for entry in sorted(folder.iterdir()):
        if entry.is_dir():
            routes.append(Mount(f"/{entry.name}", _Revalidated(directory=entry)))
        elif entry.suffix != ".py":
            routes.append(file_route(f"/{entry.name}", entry))
            if entry.name == "index.html":
                routes.append(file_route("/", entry))
    return routes


def _describe_errors_as_they_are(api: FastAPI) -> None:
    """FastAPI documents status 422, which we never give, and does not know of the key."""
    describe = api.openapi

    def openapi() -> dict[str, Any]:
        document = describe()
        for path, operations in document["paths"].items():
            for operation in operations.values():
                operation["responses"].pop("422", None)
                if needs_key(path):
                    operation["security"] = [{}, {"key": []}]  # where the server was given one
        for name in ("HTTPValidationError", "ValidationError"):
            document["components"]["schemas"].pop(name, None)
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        return document

    api.openapi = openapi  # type: ignore[method-assign]
