"""A real server in this process: uvicorn in a thread, on a port of its own."""

import http.client
import json
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from openai import OpenAI

from flashmoe import LLM
from flashmoe.server.limits import Limits
from flashmoe.server.security import Guard
from flashmoe.server.serve import HttpServer, ServeOptions, bind
from flashmoe.server.service import Service


class Server:
    """One that runs."""

    def __init__(self, service: Service, http_server: HttpServer, port: int, api_key: str | None) -> None:
        self.service, self.http, self.port, self.api_key = service, http_server, port, api_key
        self.url = f"http://127.0.0.1:{port}"

    @contextmanager
    def client(self) -> Iterator[OpenAI]:
        """The official client, without its retries."""
        with OpenAI(base_url=f"{self.url}/v1", api_key=self.api_key or "none", max_retries=0) as client:
            yield client

    def request(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers (lower case) and body. `body`: bytes as they are, anything else as JSON."""
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            sent = {"Content-Type": "application/json"} if data is not None else {}
            connection.request(method, path, data, sent | (headers or {}))
            answer = connection.getresponse()
            return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
        finally:
            connection.close()

    def post(self, path: str, body: Any, headers: dict[str, str] | None = None) -> tuple[int, dict[str, Any]]:
        status, _, data = self.request("POST", path, body, headers)
        return status, json.loads(data)

    def chat(self, **fields: Any) -> tuple[int, dict[str, Any]]:
        fields.setdefault("messages", [{"role": "user", "content": "hi"}])
        return self.post("/v1/chat/completions", fields)

    @property
    def guard(self) -> Guard:
        app = self.http.config.app
        assert isinstance(app, Guard)
        return app

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=60)


@contextmanager
def serving(
    llm: LLM | None,
    *,
    name: str = "tiny",
    api_key: str | None = None,
    queue: int = 64,
    limits: Limits | None = None,
    drain_s: float = 0.0,
    allowed_hosts: Sequence[str] = (),
    cors_origins: Sequence[str] = (),
) -> Iterator[Server]:
    """Serve `llm`, or a model that is still loading; the LLM stays open afterwards."""
    options = ServeOptions(
        name, "127.0.0.1", 0, api_key, allowed_hosts, queue, drain_s, limits or Limits(), cors_origins
    )
    service = Service(name, options.limits)
    listening = bind(options.host, options.port)
    server = HttpServer(service, options)
    if llm is not None:
        service.open(llm, queue)
    thread = threading.Thread(target=server.run, args=([listening],), name="uvicorn")
    thread.start()
    try:
        yield Server(service, server, listening.getsockname()[1], api_key)
    finally:
        server.should_exit = True
        thread.join()
        service.close()
        listening.close()
