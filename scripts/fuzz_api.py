"""Sends a server requests that its OpenAPI description allows, and others that it does not (schemathesis),
and checks every answer: no 5xx, documented status, documented content type, documented shape.

    python -m scripts.fuzz_api --cases 5000                       # starts flashmoe serve on the demo model
    python -m scripts.fuzz_api --cases 5000 --url http://127.0.0.1:8000 [--api-key KEY]

Prints a table of statuses a path, and the first failures with the curl command that repeats them. Exit code 1
if there is one.
"""

import argparse
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from shutil import copyfileobj
from typing import Any

import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
# Where most of what can go wrong is.
SHARES = {"/v1/chat/completions": 8, "/v1/completions": 5, "/tokenize": 1, "/detokenize": 1}
MOST_SHOWN = 10


@dataclass
class Report:
    """What came back."""

    statuses: dict[str, Counter[int]] = field(default_factory=dict)  # by path
    failures: list[str] = field(default_factory=list)

    @property
    def cases(self) -> int:
        return sum(sum(counter.values()) for counter in self.statuses.values())

    @property
    def server_errors(self) -> int:
        return sum(n for counter in self.statuses.values() for status, n in counter.items() if status >= 500)

    def __str__(self) -> str:
        lines = [
            f"{path:24} " + "  ".join(f"{status}: {n}" for status, n in sorted(counter.items()))
            for path, counter in self.statuses.items()
        ]
        total = f"{self.cases} cases, {self.server_errors} with 5xx, {len(self.failures)} failures"
        return "\n".join([*lines, *self.failures[:MOST_SHOWN], total])


def fuzz(url: str, cases: int, start: int = 0, api_key: str | None = None) -> Report:
    """At least `cases` requests, the same ones for the same `start`."""
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json", headers=headers)
    operations = [result.ok() for result in schema.get_all_operations()]
    report = Report({operation.path: Counter() for operation in operations})
    while report.cases < cases:  # a seed gives fewer where there are few different ones
        try:
            _send_some(report, url, headers, operations, cases - report.cases, start)
        except (requests.ConnectionError, KeyboardInterrupt) as error:  # what was found until then is told
            report.failures.append(f"ended early, no server or by hand: {type(error).__name__} {error}")
            break
        start += 1
    return report


def _send_some(
    report: Report, url: str, headers: dict[str, str], operations: Sequence[Any], cases: int, start: int
) -> None:
    """About `cases`, and one of each kind at the least, of the seed `start`."""
    weight = sum(SHARES.get(operation.path, 0.1) for operation in operations)
    for operation in operations:
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            if mode == GenerationMode.NEGATIVE and operation.method == "get":
                continue  # nothing to get wrong
            most = max(1, round(cases * SHARES.get(operation.path, 0.1) / weight / 2))
            options = settings(
                max_examples=most, deadline=None, database=None, phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )  # fmt: skip

            def send(case: schemathesis.Case) -> None:
                _send(report, url, headers, case)

            seed(start)(options(given(operation.as_strategy(mode))(send)))()


def _send(report: Report, url: str, headers: dict[str, str], case: schemathesis.Case) -> None:
    answer = case.call(base_url=url, headers=headers, timeout=300)
    report.statuses[case.operation.path][answer.status_code] += 1
    try:
        case.validate_response(answer, checks=CHECKS)
    except (AssertionError, BaseExceptionGroup) as failure:
        told = getattr(failure, "exceptions", [failure])
        what = "; ".join(str(one) for one in told)
        report.failures.append(f"{what}\n  {case.as_curl_command()}"[:2000])


@contextmanager
def started(model: Path | None, ram_budget: str, context: int) -> Iterator[str]:
    """`flashmoe serve` on a free port -> its URL. A small context keeps answers without max_tokens short."""
    command = [sys.executable, "-m", "flashmoe", "serve", "--port", "0", "--ram-budget", ram_budget,
               "--context", str(context), *([] if model is None else ["--model", str(model)])]  # fmt: skip
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    try:
        for line in server.stderr:
            if found := re.search(r"http://\S+?:\d+", line):
                # On with its lines: it would wait for ever once the pipe is full.
                threading.Thread(target=copyfileobj, args=(server.stderr, sys.stderr), daemon=True).start()
                yield found[0]
                if server.poll() is not None:
                    print(f"flashmoe serve ended by itself with {server.returncode}")
                return
        raise SystemExit(f"flashmoe serve ended with {server.wait()}")
    finally:
        server.terminate()
        server.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--url", help="of a server that runs (default: start one)")
    parser.add_argument("--api-key")
    parser.add_argument("--model", type=Path, help="for the one to start (default: the demo model)")
    parser.add_argument("--ram-budget", default="2G")
    parser.add_argument("--context", type=int, default=64)
    arguments = parser.parse_args()
    if arguments.url is not None:
        report = fuzz(arguments.url, arguments.cases, arguments.seed, arguments.api_key)
    else:
        with started(arguments.model, arguments.ram_budget, arguments.context) as url:
            report = fuzz(url, arguments.cases, arguments.seed)
    print(report)
    return 1 if report.failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
