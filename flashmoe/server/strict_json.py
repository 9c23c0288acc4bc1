"""Request bodies as JSON, more strictly than json.loads: finite numbers, Unicode text, bounded nesting."""

import json
import re
from typing import Any, NoReturn

from fastapi import Request, Response
from fastapi.routing import APIRoute

from flashmoe.server.errors import ApiError

# Each may take a hundred bytes: a list of lists has one in three. Text in which every tenth character is a
# comma still fits, up to the largest body.
MOST_VALUES = 400_000
_HALF_PAIR = re.compile(rb"\\u[dD][89a-fA-F]")  # surrogates; whole pairs are fine


def parse_json(data: bytes) -> Any:
    """The value in `data`; ApiError 400 for anything that is not JSON, or no text, or no number."""
    values = data.count(b",") + data.count(b"[") + data.count(b"{")
    if values > MOST_VALUES:
        raise ApiError(400, f"the body has about {values} values, the most is {MOST_VALUES}; send fewer")
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=_no_number)
        if _HALF_PAIR.search(data):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError as error:
        raise ApiError(400, "the body is nested too deeply; make it flatter") from error
    except UnicodeError as error:
        raise ApiError(400, "the body is not UTF-8, or holds half a surrogate pair") from error
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {str(error)[:200]}") from error
    return value


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


class StrictRequest(Request):
    """Parses its body with `parse_json`."""

    async def json(self) -> Any:
        if not hasattr(self, "_parsed"):
            self._parsed = parse_json(await self.body())
        return self._parsed


class StrictRoute(APIRoute):
    """A route whose requests are strict."""

    def get_route_handler(self) -> Any:
        handle = super().get_route_handler()

        async def strictly(request: Request) -> Response:
            response: Response = await handle(StrictRequest(request.scope, request.receive))
            return response

        return strictly
