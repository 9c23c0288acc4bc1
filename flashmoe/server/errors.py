"""Errors as OpenAI writes them: {"error": {"message", "type", "param", "code"}} with a fitting status."""

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from flashmoe.constraints import GrammarError
from flashmoe.errors import (
    ConfigError,
    ContextError,
    FlashMoEError,
    ModelError,
    QueueFullError,
    TokenizerError,
)
from storage.storage_errors import StorageError

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "unavailable_error",
}
_TYPE_NAMES = ("bool", "int", "float", "str")


class ApiError(HTTPException):
    """An answer that is an error; `param` names the field that caused it."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(status, message, headers)
        self.param, self.code = param, code

    def body(self) -> dict[str, Any]:
        return error_body(self.status_code, str(self.detail), self.param, self.code)


def error_body(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """The body of an error."""
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def api_error(error: Exception) -> ApiError:
    """What a client is told about an error of ours."""
    match error:
        case ApiError():
            return error
        case QueueFullError():
            wait = {"Retry-After": str(max(1, math.ceil(error.retry_after_s)))}
            return ApiError(429, str(error), code="queue_full", headers=wait)
        case ContextError():
            return ApiError(400, str(error), code="context_length_exceeded")
        case ConfigError() | TokenizerError() | ModelError():
            return ApiError(400, str(error))
        case FlashMoEError() | StorageError():
            return ApiError(500, str(error))
    return ApiError(500, f"internal error ({type(error).__name__}); the server's log has the details")


@contextmanager
def blaming(param: str) -> Generator[None, None, None]:
    """A schema that cannot be used is this field's."""
    try:
        yield
    except GrammarError as error:
        raise ApiError(400, str(error), param, "invalid_schema") from error


def install(app: FastAPI, note: Callable[[int], None]) -> None:
    """Have `app` answer every error in this shape; `note` is told each status."""

    def answer(told: ApiError, headers: Mapping[str, str] | None = None) -> Response:
        note(told.status_code)
        return JSONResponse(told.body(), told.status_code, headers)

    async def known(_: Request, error: Exception) -> Response:
        told = api_error(error)
        return answer(told, told.headers)

    async def http(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        told = error if isinstance(error, ApiError) else ApiError(error.status_code, str(error.detail))
        return answer(told, error.headers)

    async def invalid(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return answer(_invalid(error.errors()))

    async def bug(_: Request, error: Exception) -> Response:
        return answer(api_error(error))

    app.add_exception_handler(FlashMoEError, known)
    app.add_exception_handler(StorageError, known)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(Exception, bug)


def _invalid(errors: Sequence[Any]) -> ApiError:
    """One of pydantic's complaints, on one line with the field's name."""
    # Of a field with several types there is one for each: a value of the right type says most.
    said = next((error for error in errors if not error["type"].endswith("_type")), errors[0])
    where = [str(part) for part in said["loc"] if part != "body"]
    if not where:
        hint = "; send application/json" if said["type"] == "model_attributes_type" else ""
        return ApiError(400, f"the body is no JSON object that this path takes: {said['msg']}{hint}")
    # pydantic names types among the fields: stop.list[constrained-str].0
    fields = [part for part in where[:8] if part.isdigit() or part.isidentifier()]
    name = ".".join(part for part in fields if part not in _TYPE_NAMES)
    message = str(said["msg"]).removeprefix("Value error, ")
    return ApiError(400, f"{name}: {message[:300]}", where[0])
