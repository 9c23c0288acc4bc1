"""Pages of other origins that may use this server: those that it was told of, each exactly.

Nothing is allowed with credentials: a page that has the API key sends it itself, as any client does.
"""

import re
from collections.abc import Iterable, Mapping

from starlette.datastructures import Headers

from flashmoe.errors import ConfigError

# As a browser writes one: no path, no user, small letters. Other schemes than http are of apps.
_ORIGIN = re.compile(r"([a-z][a-z0-9+.-]*)://([a-z0-9._~-]+|\[[0-9a-f:.]+\])(:[0-9]{1,5})?")
_OWN_PORTS = {"http": ":80", "https": ":443"}
# "*" stands for any header but Authorization, as long as no credentials are allowed (fetch, 3.2.3).
_PREFLIGHT = {
    "Access-Control-Allow-Methods": "GET, POST",
    "Access-Control-Allow-Headers": "Authorization, *",
    "Access-Control-Max-Age": "600",
}


class AllowedOrigins:
    """Origins such as https://chat.example and http://localhost:3000. Raises ConfigError for what is none."""

    def __init__(self, origins: Iterable[str] = ()) -> None:
        self._origins = {_origin(text) for text in origins}

    def __bool__(self) -> bool:
        return bool(self._origins)

    def of(self, headers: Headers) -> str | None:
        """The origin of the page that asks, if it is one of these."""
        given = headers.getlist("origin")
        return given[0] if len(given) == 1 and given[0] in self._origins else None


def is_preflight(method: str, headers: Headers) -> bool:
    """Whether a browser only asks if a page may ask."""
    return method == "OPTIONS" and "access-control-request-method" in headers


def answer_headers(origin: str) -> dict[str, str]:
    """What lets a page of an allowed origin read an answer."""
    return {"Access-Control-Allow-Origin": origin, "Access-Control-Expose-Headers": "Retry-After"}


def preflight_headers(headers: Headers) -> Mapping[str, str]:
    """What says that a page of an allowed origin may ask: the same, whatever it wants to send."""
    if headers.get("access-control-request-private-network") == "true":  # from the internet to this machine
        return {**_PREFLIGHT, "Access-Control-Allow-Private-Network": "true"}
    return _PREFLIGHT


def _origin(text: str) -> str:
    """As browsers send it: without the scheme's own port."""
    found = _ORIGIN.fullmatch(text.strip().lower())
    if found is None:
        raise ConfigError(
            f"--cors-origin {text[:200]!r} is no origin; write scheme, name and port alone, as"
            " https://chat.example or http://localhost:3000"
        )
    return found[0].removesuffix(_OWN_PORTS.get(found[1], ""))
