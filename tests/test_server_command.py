"""`flashmoe serve` as a process: its lines, its signals, its end."""

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from flashmoe import cli

ROOT = Path(__file__).parent.parent


@contextmanager
def command(*options: str, **environment: str) -> Iterator[tuple["subprocess.Popen[str]", str, list[str]]]:
    """(process, its URL, the lines it said before it was ready)"""
    process = subprocess.Popen(
        [sys.executable, "-m", "flashmoe", "serve", "--port", "0", *options],
        cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | environment,
    )  # fmt: skip
    assert process.stderr is not None and process.stdout is not None
    lines: list[str] = []
    try:
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"http://127.0.0.1:\d+", line):
                yield process, found[0], lines
                return
        raise AssertionError(f"it ended: {lines}")
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
        process.stdout.close()


def test_sigterm_lets_an_answer_finish_and_ends_with_0(tiny_model: Path):
    with (
        command("--model", str(tiny_model), "--ram-budget", "2G") as (process, url, lines),
        OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        assert lines[-1].startswith("mixtral: http://127.0.0.1:")
        messages = [{"role": "user", "content": "hi"}]
        stream = client.chat.completions.create(model="x", messages=messages, max_tokens=300, stream=True)  # type: ignore[call-overload]
        chunks = [next(stream)]
        process.send_signal(signal.SIGTERM)
        chunks += list(stream)
        assert chunks[-1].choices[0].finish_reason == "length"
        assert process.wait(timeout=60) == 0
        assert process.stderr is not None and process.stderr.read() == ""
        assert process.stdout is not None and process.stdout.read() == "", "stdout is for what is asked for"


def test_ctrl_c_ends_with_130_and_the_key_may_come_from_the_environment(tiny_model: Path):
    options = ("--model", str(tiny_model), "--ram-budget", "2G", "--served-model-name", "mine", "--quiet")
    with command(*options, FLASHMOE_API_KEY="sesame") as (process, url, _):
        asked = urllib.request.Request(f"{url}/v1/models", headers={"Authorization": "Bearer sesame"})
        with urllib.request.urlopen(asked, timeout=60) as answer:
            assert json.load(answer)["data"][0]["id"] == "mine"
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{url}/v1/models", timeout=60)
        assert refused.value.code == 401
        refused.value.close()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130


def test_verbose_tells_a_line_about_each_request_and_nothing_that_was_said(tiny_model: Path):
    with command("--model", str(tiny_model), "--ram-budget", "2G", "-v") as (process, url, _):
        with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            asked: Any = {"messages": [{"role": "user", "content": "a secret"}], "max_tokens": 5}
            client.chat.completions.create(model="x", **asked)
            list(client.chat.completions.create(model="x", stream=True, **asked))
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{url}/no%0Awhere?word=secret", timeout=60)
        refused.value.close()
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None
        lines = process.stderr.read().splitlines()
    told = [re.sub(r"[\d.]+ s$", "TIME", line) for line in lines]
    answered = "POST /v1/chat/completions 200, 5 tokens, TIME"
    assert told == [answered, answered, "GET /no%0Awhere 404, 0 tokens, TIME"]


def test_a_model_that_does_not_load_ends_the_server_with_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "config.json").write_text("{}")
    assert cli.main(["serve", "--model", str(tmp_path), "--port", "0"]) == 1
    assert "architecture None is not supported" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, message",
    [
        (["--port", "70000"], "--port 70000 is not from 0 to 65535"),
        (["--max-batch", "65"], "--max-batch 65 is too large; the most is 64"),
        (["--host", "203.0.113.1"], "cannot listen on 203.0.113.1 port 8000"),
    ],
)
def test_an_impossible_option_ends_with_one_line_before_anything_loads(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    assert cli.main(["serve", "--model", "/nowhere", *options]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_other_commands_load_nothing_of_it():
    """`flashmoe --help` answers at once."""
    code = "import sys, flashmoe.cli; flashmoe.cli.build_parser().format_help()\n"
    code += "print(*{'fastapi', 'uvicorn', 'pydantic', 'llguidance', 'prometheus_client'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_a_size_without_a_folder_is_wrong_usage(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as left:
        cli.main(["serve", "--session-cache-size", "1G"])
    assert left.value.code == 2 and "--session-cache DIR" in capsys.readouterr().err
