#!/usr/bin/env python3
"""Many clients at once: is every answer whole, its own, and the one that a single user gets?

    scripts/load_test.py --clients 64 --requests 50 --ram-budget 1G     # starts a server on the demo model
    scripts/load_test.py --clients 64 --requests 50 --url http://127.0.0.1:8000

First each distinct question is asked alone. Then every client asks one after another: questions of all
lengths, greedy and sampled with a seed, streamed and not; some leave in the middle. Every answer must be what
the single user got, every half one its beginning; a 429 is asked again after Retry-After. At the end nothing
may run or wait on the server, and its peak RSS must be within its budget.

Prints a table, and one JSON object as its last line. Exit status 1 if anything is wrong.
"""

import argparse
import asyncio
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx2

ROOT = Path(__file__).resolve().parents[1]
SYSTEM = (
    "You are the assistant of a lighthouse museum. Visitors ask you about ships, storms, lamps and maps, and "
    "about anything else that comes to their minds. Answer in plain words and stay friendly. "
)
TOPICS = (
    "What is the capital of France?", "Name three colours.", "Tell me about the sea.",
    "How does a lamp work?", "Write a line about a storm.", "What is bread made of?",
    "Who sails a ship?", "Count from one to ten.",
)  # fmt: skip
STORY = "The keeper climbed the stairs, lit the lamp, and wrote the weather of the day into his book. "
SAMPLED = {"temperature": 0.8, "top_p": 0.95, "seed": 7}
GREEDY = {"temperature": 0}
START_S, ANSWER_S, REST_S = 600.0, 600.0, 60.0  # for the model to load, an answer, the server to come to rest
MOST_TRIES = 200  # of one request that gets 429


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked; the answer does not depend on who else asks."""

    messages: tuple[Mapping[str, str], ...]
    max_tokens: int
    sampling: Mapping[str, Any]

    @property
    def body(self) -> dict[str, Any]:
        return {"model": "any", "messages": self.messages, "max_tokens": self.max_tokens, **self.sampling}


@dataclass(frozen=True, slots=True)
class Answer:
    text: str
    finish_reason: str
    tokens: int


@dataclass(slots=True)
class Result:
    """What came of all requests."""

    requests: int = 0
    identical: int = 0
    disconnects: int = 0
    retries_429: int = 0
    tokens: int = 0
    cached_tokens: int = 0
    wrong: list[str] = field(default_factory=list)
    first_token_s: list[float] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)


def questions(most_tokens: int, random_numbers: random.Random) -> list[Question]:
    """Short and long prompts, with and without the long system prompt; every fourth one sampled."""
    asked = []
    for number, topic in enumerate(TOPICS * 3):
        story = STORY * (0, 2, 12)[number // len(TOPICS)]
        messages: list[Mapping[str, str]] = [{"role": "user", "content": f"{story}{topic}"}]
        if number % 2:
            messages.insert(0, {"role": "system", "content": SYSTEM * 3})
        tokens = random_numbers.randint(min(4, most_tokens), most_tokens)
        asked.append(Question(tuple(messages), tokens, SAMPLED if number % 4 == 3 else GREEDY))
    return asked


class Client:
    """Asks a server, one question after another."""

    def __init__(self, http: httpx2.AsyncClient, result: Result) -> None:
        self._http, self._result = http, result

    async def whole(self, question: Question) -> Answer:
        """An answer in one piece."""
        response = await self._post(question.body)
        answer = response.json()
        choice, usage = answer["choices"][0], answer["usage"]
        self._count(usage)
        return Answer(choice["message"]["content"] or "", choice["finish_reason"], usage["completion_tokens"])

    async def streamed(self, question: Question, leave_after: int | None = None) -> Answer | str:
        """A streamed answer; or the text so far if it leaves after so many pieces."""
        body = question.body | {"stream": True, "stream_options": {"include_usage": True}}
        for _ in range(MOST_TRIES):
            begin_s = time.perf_counter()
            async with self._http.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.status_code != 200:
                    await response.aread()
                    await self._wait_or_raise(response)
                    continue
                return await self._read(response, begin_s, leave_after)
        raise ValueError(f"status 429, {MOST_TRIES} times")

    async def whole_but_leaves(self, question: Question, after_s: float) -> None:
        """Hang up while the answer is computed, unless it is there already."""
        try:
            await asyncio.wait_for(self._http.post("/v1/chat/completions", json=question.body), after_s)
        except TimeoutError:
            return

    async def _read(self, response: httpx2.Response, last_s: float, leave_after: int | None) -> Answer | str:
        pieces: list[str] = []
        finish_reason = usage = None
        async for line in response.aiter_lines():
            if not line.startswith("data: "):
                continue
            if line == "data: [DONE]":
                if finish_reason is None or usage is None:
                    raise ValueError("the stream ended without finish_reason or usage")
                self._count(usage)
                return Answer("".join(pieces), finish_reason, usage["completion_tokens"])
            chunk = json.loads(line[6:])
            if "error" in chunk:
                raise ValueError(f"the stream ended with an error: {chunk['error']['message']}")
            usage = chunk.get("usage") or usage
            for choice in chunk["choices"]:
                finish_reason = choice["finish_reason"] or finish_reason
                if content := choice["delta"].get("content"):
                    now_s = time.perf_counter()
                    (self._result.gaps_s if pieces else self._result.first_token_s).append(now_s - last_s)
                    last_s = now_s
                    pieces.append(content)
            if leave_after is not None and len(pieces) >= leave_after:
                return "".join(pieces)
        raise ValueError(f"the stream ended without [DONE] after {len(pieces)} pieces")

    async def _post(self, body: Mapping[str, Any]) -> httpx2.Response:
        for _ in range(MOST_TRIES):
            response = await self._http.post("/v1/chat/completions", json=body)
            if response.status_code == 200:
                return response
            await self._wait_or_raise(response)
        raise ValueError(f"status 429, {MOST_TRIES} times")

    async def _wait_or_raise(self, response: httpx2.Response) -> None:
        if response.status_code != 429:
            raise ValueError(f"status {response.status_code}: {response.text[:200]}")
        self._result.retries_429 += 1
        await asyncio.sleep(float(response.headers["Retry-After"]))

    def _count(self, usage: Mapping[str, Any]) -> None:
        self._result.tokens += usage["completion_tokens"]
        self._result.cached_tokens += usage["prompt_tokens_details"]["cached_tokens"]


async def run_client(
    number: int, client: Client, result: Result, asked: Sequence[tuple[Question, Answer]],
    args: argparse.Namespace,
) -> None:  # fmt: skip
    """One user's requests, one after another."""
    random_numbers = random.Random(args.seed * 1_000_003 + number)
    for _ in range(args.requests):
        question, expected = random_numbers.choice(asked)
        leaves = random_numbers.random() < args.disconnects
        streams = random_numbers.random() < 0.6
        try:
            if leaves and not streams:
                await client.whole_but_leaves(question, random_numbers.uniform(0.01, 0.5))
                result.disconnects += 1
            elif leaves:
                got = await client.streamed(question, random_numbers.randint(1, 6))
                result.disconnects += 1
                text = got if isinstance(got, str) else got.text
                if not expected.text.startswith(text):
                    result.wrong.append(f"half of {text!r} to {_shown(question)}, alone {expected}")
            else:
                got = await (client.streamed(question) if streams else client.whole(question))
                if got == expected:
                    result.identical += 1
                else:
                    result.wrong.append(f"{got} to {_shown(question)}, alone {expected}")
        except (ValueError, KeyError, httpx2.HTTPError) as error:
            result.wrong.append(f"{type(error).__name__}: {error} at {_shown(question)}")
        result.requests += 1


def _shown(question: Question) -> str:
    return f"{question.messages[-1]['content'][-40:]!r} ({question.max_tokens} tokens)"


async def test(url: str, args: argparse.Namespace) -> tuple[Result, float, dict[str, Any]]:
    """(what came of it, seconds under load, /v1/stats once the server rests)."""
    headers = {"Authorization": f"Bearer {args.api_key}"} if args.api_key else {}
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=args.clients)
    async with httpx2.AsyncClient(base_url=url, headers=headers, timeout=ANSWER_S, limits=limits) as http:
        alone = Client(http, Result())
        pool = questions(args.max_tokens, random.Random(args.seed))
        asked = [(question, await alone.whole(question)) for question in pool]
        distinct = len({answer.text for _, answer in asked})
        print(f"{len(asked)} questions asked alone, {distinct} distinct answers", file=sys.stderr)
        result, begin_s = Result(), time.perf_counter()
        clients = [run_client(i, Client(http, result), result, asked, args) for i in range(args.clients)]
        await asyncio.gather(*clients)
        took_s = time.perf_counter() - begin_s
        return result, took_s, await _at_rest(http, result)


async def _at_rest(http: httpx2.AsyncClient, result: Result) -> dict[str, Any]:
    """Who has left is noticed within a moment; then nothing may be left over."""
    end_s = time.perf_counter() + REST_S
    while True:
        stats: dict[str, Any] = (await http.get("/v1/stats")).json()
        running, waiting = stats["requests"]["running"], stats["requests"]["waiting"]
        if not running and not waiting:
            return stats
        if time.perf_counter() > end_s:
            result.wrong.append(f"{running} run and {waiting} wait {REST_S:g} s after the last client left")
            return stats
        await asyncio.sleep(0.1)


@contextmanager
def server(args: argparse.Namespace) -> Iterator[str]:
    """The URL of a server of our own, ended with SIGTERM; it must end well."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, "-m", "flashmoe", "serve", "--port", str(port), "--ram-budget", args.ram_budget,
        "--max-batch", str(args.max_batch), "--queue", str(args.queue),
    ]  # fmt: skip
    if args.model:
        command += ["--model", args.model]
    environment = os.environ | ({"FLASHMOE_API_KEY": args.api_key} if args.api_key else {})
    process = subprocess.Popen([*command, *args.serve_option], cwd=ROOT, env=environment)
    try:
        url, end_s = f"http://127.0.0.1:{port}", time.monotonic() + START_S
        while not _is_healthy(url):
            if process.poll() is not None or time.monotonic() > end_s:
                raise SystemExit(f"flashmoe serve did not come up (status {process.poll()})")
            time.sleep(0.2)
        yield url
        process.terminate()
        if process.wait(timeout=60) != 0:
            raise SystemExit(f"flashmoe serve ended with status {process.returncode}")
    finally:
        process.kill()
        process.wait()


def _is_healthy(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/health").status_code == 200
    except httpx2.HTTPError:
        return False


def report(
    result: Result, took_s: float, stats: Mapping[str, Any], args: argparse.Namespace
) -> dict[str, Any]:
    """The table for people; the same for machines."""
    memory = stats["memory"]
    peak, budget = memory["peak_rss_bytes"], memory["ram_budget_bytes"]
    if peak > budget:
        result.wrong.append(f"peak RSS {peak} is above the budget of {budget} bytes")
    if result.requests != args.clients * args.requests:
        result.wrong.append(f"{result.requests} of {args.clients * args.requests} requests came to an end")
    gaps, firsts = _percentiles(result.gaps_s), _percentiles(result.first_token_s)
    rows = {
        "clients": args.clients, "requests": result.requests, "identical": result.identical,
        "disconnects": result.disconnects, "wrong": len(result.wrong), "429, asked again": result.retries_429,
        "tokens a second": f"{result.tokens / took_s:.1f}",
        "prompt tokens from the KV cache": result.cached_tokens,
        "first token, p50 / p95": f"{firsts[0] * 1e3:.0f} / {firsts[1] * 1e3:.0f} ms",
        "between tokens, p50 / p95": f"{gaps[0] * 1e3:.1f} / {gaps[1] * 1e3:.1f} ms",
        "peak RSS of budget": f"{peak / 2**20:.0f} of {budget / 2**20:.0f} MiB",
    }  # fmt: skip
    for name, value in rows.items():
        print(f"{name:<34}{value}")
    for line in result.wrong[:20]:
        print(f"wrong: {line}")
    summary = {name: value for name, value in asdict(result).items() if name != "gaps_s"}
    return summary | {
        "wrong": len(result.wrong), "clients": args.clients, "took_s": took_s,
        "tokens_per_s": result.tokens / took_s, "first_token_s": firsts, "between_tokens_s": gaps,
        "peak_rss_bytes": peak, "ram_budget_bytes": budget,
    }  # fmt: skip


def _percentiles(values: Sequence[float]) -> tuple[float, float]:
    """p50 and p95."""
    if len(values) < 2:
        return (values[0], values[0]) if values else (0.0, 0.0)
    cuts = statistics.quantiles(values, n=20, method="inclusive")
    return cuts[9], cuts[18]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--url", help="a running server; without it one is started")
    add("--api-key")
    add("--clients", type=int, default=64)
    add("--requests", type=int, default=50, help="of each client")
    add("--max-tokens", type=int, default=48, help="of the longest answer")
    add("--disconnects", type=float, default=0.1, help="share of requests whose client leaves")
    add("--seed", type=int, default=0)
    add("--model", help="of the server to start; without it the demo model")
    add("--ram-budget", default="1G")
    add("--max-batch", type=int, default=8)
    add("--queue", type=int, default=64)
    add("--serve-option", action="append", default=[], help="of flashmoe serve: --serve-option=--check-reads")
    args = parser.parse_args(argv)
    if args.url:
        result, took_s, stats = asyncio.run(test(args.url, args))
    else:
        with server(args) as url:
            result, took_s, stats = asyncio.run(test(url, args))
    summary = report(result, took_s, stats, args)
    print(json.dumps(summary))
    return 1 if result.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
