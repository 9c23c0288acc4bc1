"""The commands as a user types them: streams, exit codes, files, one-line errors."""

import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest

import flashmoe
from cache_policies.registry import POLICY_NAMES
from flashmoe import cli
from flashmoe.arguments import build_parser
from flashmoe.config import PREDICTOR_NAMES
from flashmoe.errors import ConfigError
from flashmoe.stats import GenerationStats
from flashmoe.stats_file import StatsFile
from storage.storage_errors import StorageError

ROOT = Path(__file__).parent.parent
PROMPT = "what is the capital of France?"
FIGURES = (
    "text", "token_ids", "prompt_tokens", "decode_tokens", "prefill_tokens_per_s", "decode_tokens_per_s",
    "time_to_first_token_s", "hit_rate", "hits", "misses", "expert_bytes_read", "stall_s",
    "bound_tokens_per_s", "peak_rss_bytes", "ram_budget_bytes", "policy", "reader",
)  # fmt: skip


@pytest.fixture
def model(tiny_model: Path) -> list[str]:
    """Options that every command here begins with; the budget leaves room for what pytest has loaded."""
    return ["--model", str(tiny_model), "--ram-budget", "4G"]


def set_stdin(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="ascii"))


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def usage_error(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as left:
        cli.main(arguments)
    assert left.value.code == 2
    return capsys.readouterr().err


# Help and usage


def test_help_imports_nothing_heavy():
    script = (
        "import sys; from flashmoe.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print({'torch', 'numpy', 'rich', 'prompt_toolkit', 'tokenizers', 'psutil'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.startswith("usage: flashmoe ")
    assert done.stdout.splitlines()[-1] == "set()"


def test_the_readme_shows_the_real_help(monkeypatch: pytest.MonkeyPatch):
    readme = ROOT / "README.md"
    text = readme.read_text("utf-8") if readme.is_file() else ""
    shown = re.search(r"<!-- help -->\s*```\w*\n(.*?)```\s*<!-- /help -->", text, re.DOTALL)
    if shown is None:
        pytest.skip("README.md has no help between <!-- help --> and <!-- /help -->")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_COLOR", "1")
    assert shown[1].strip() == build_parser().format_help().strip()


def test_version(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as left:
        cli.main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out == f"flashmoe {flashmoe.__version__}\n"


def test_the_help_of_run_names_the_policies_and_predictors_there_are(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        cli.main(["run", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert ", ".join(POLICY_NAMES) in shown and ", ".join(PREDICTOR_NAMES) in shown


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "COMMAND"),
        (["walk"], "invalid choice: 'walk'"),
        (["run", "--temperature", "x"], "--temperature: invalid float value: 'x'"),
        (["run", "--policy", "best"], "--policy: invalid choice: 'best'"),
        (["run", "--reader", "tape"], "--reader: invalid choice: 'tape'"),
        (["run", "--prefetch", "2", "--predictor", "dice"], "--predictor: invalid choice: 'dice'"),
        (["run", "--prefetch", "off", "--predictor", "maps"], "--predictor says who guesses for --prefetch"),
        (["bench", "--prefetch", "off", "--predictor", "maps"], "--predictor says who guesses for"),
        (["run", "--per-token"], "--per-token adds to --stats-json FILE"),
        (["run", "--raw", "--prompt", "x", "--system", "y"], "no place for --system"),
        (["bench", "--repeat", "0"], "'0' is not a whole number from 1"),
        (["bench", "--prompt-tokens", "64,"], "'' is not a whole number from 1"),
        (["bench", "--decode-tokens", "1e3"], "'1e3' is not a whole number from 1"),
        (["plan", "--policy", "lru"], "unrecognized arguments: --policy lru"),
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]):
    assert complaint in usage_error(arguments, capsys)


def test_raw_without_a_prompt_on_a_terminal_is_wrong_usage(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    set_stdin(monkeypatch, b"")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    assert "--raw continues a text" in usage_error(["run", "--raw"], capsys)


# Errors


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--ram-budget", "16Q"], "'16Q' is not a size"),
        (["--ram-budget", "1M"], "try --ram-budget "),
        (["--model", "/no/such/folder"], "no folder /no/such/folder"),
        (["--context", "3"], "--context 3 is too small"),
        (["--context", "5000"], "more than the 4096 positions"),
        (["--temperature", "-1"], "temperature -1.0 should be"),
        (["--temperature", "nan"], "temperature nan should be"),
        (["--stop", ""], "stop ('',) should be"),
        (["--threads", "0"], "--threads 0 is too small; the least is 1"),
        (["--stats-json", "/no/such/folder/s.json"], "cannot write statistics to /no/such/folder/s.json"),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_exit_1(
    options: list[str], complaint: str, model: list[str], capsys: pytest.CaptureFixture[str]
):
    assert cli.main(["run", *model, "--prompt", PROMPT, *options]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("flashmoe: error: ")
    assert err.count("\n") == 1
    assert complaint in err


@pytest.mark.parametrize("options", [["--temperature", "-1"], ["--stats-json", "/no/such/folder/s"]])
def test_bad_options_are_found_before_the_model_is_looked_for(
    options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def too_late(*arguments: object) -> NoReturn:
        raise AssertionError("the model was looked for")

    monkeypatch.setattr("flashmoe.api.find_model", too_late)
    assert cli.main(["run", "--prompt", PROMPT, *options]) == 1
    assert "flashmoe: error: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"), [(ConfigError("no"), 1), (KeyboardInterrupt(), 130), (BrokenPipeError(), 141)]
)
def test_exit_codes(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def fail(*arguments: object) -> NoReturn:
        raise error

    monkeypatch.setitem(cli.COMMANDS, "plan", fail)
    assert cli.main(["plan"]) == code
    assert capsys.readouterr().err == ("flashmoe: error: no\n" if code == 1 else "")


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch):
    def bug(*arguments: object) -> NoReturn:
        raise ZeroDivisionError

    monkeypatch.setitem(cli.COMMANDS, "plan", bug)
    with pytest.raises(ZeroDivisionError):
        cli.main(["plan"])


# run


def test_the_answer_alone_is_on_stdout(model: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    stats_file = tmp_path / "stats.jsonl"
    options = ["--prompt", PROMPT, "--max-tokens", "12", "--stats-json", str(stats_file)]
    assert cli.main(["run", *model, *options]) == 0
    out, err = capsys.readouterr()
    [stats] = read_lines(stats_file)
    assert out == stats["text"] + "\n"
    assert stats["decode_tokens"] == 12
    assert stats["finish_reason"] == "length"
    assert set(FIGURES) <= set(stats)
    assert "tokens" not in stats
    assert "expert slots " in err
    assert "[stopped at the limit of 12 tokens]" in err
    assert "tok/s" in err
    assert "\x1b" not in err


def test_per_token_figures_add_up(model: list[str], tmp_path: Path):
    stats_file = tmp_path / "stats.jsonl"
    options = ["--prompt", PROMPT, "--max-tokens", "5", "--stats-json", str(stats_file), "--per-token"]
    assert cli.main(["run", *model, *options]) == 0
    [stats] = read_lines(stats_file)
    assert [token["token_id"] for token in stats["tokens"]] == stats["token_ids"]
    assert sum(token["misses"] for token in stats["tokens"]) == stats["misses"]
    assert "".join(token["text"] for token in stats["tokens"]) == stats["text"]


def test_an_answers_figures_are_in_the_file_before_the_next_answer_begins(tmp_path: Path):
    path = tmp_path / "stats.jsonl"
    with StatsFile(path, per_token=False) as stats_file:
        stats_file.write(GenerationStats(text="one"))
        assert [stats["text"] for stats in read_lines(path)] == ["one"]
        stats_file.write(GenerationStats(text="two"), ConfigError("no"))
    one, two = read_lines(path)
    assert "error" not in one
    assert (two["text"], two["error"]) == ("two", "no")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full to stand for a full disk")
def test_a_full_disk_behind_the_figures_is_an_error():
    stats_file = StatsFile(Path("/dev/full"), per_token=False)
    with pytest.raises(StorageError, match="cannot write statistics to /dev/full: No space"), stats_file:
        stats_file.write(GenerationStats())


def test_quiet_leaves_out_plan_and_speed_but_not_why_the_answer_ended(
    model: list[str], capsys: pytest.CaptureFixture[str]
):
    assert cli.main(["run", *model, "--prompt", PROMPT, "--max-tokens", "3", "--quiet"]) == 0
    assert capsys.readouterr().err == "[stopped at the limit of 3 tokens]\n"


def test_verbose_tells_what_was_probed(model: list[str], capsys: pytest.CaptureFixture[str]):
    options = ["--prompt", PROMPT, "--max-tokens", "1", "--reader", "buffered", "-v"]
    assert cli.main(["run", *model, *options]) == 0
    err = capsys.readouterr().err
    assert "probe: buffered " in err
    assert "dense weights loaded in " in err


@pytest.mark.parametrize("options", [[], ["--prompt", "-"]])
def test_stdin_is_the_prompt_where_it_is_no_terminal(
    options: list[str], model: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert cli.main(["run", *model, "--max-tokens", "8", "--prompt", "été\ntwo"]) == 0
    expected = capsys.readouterr().out
    set_stdin(monkeypatch, "été\ntwo\n".encode())
    assert cli.main(["run", *model, "--max-tokens", "8", *options]) == 0
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize("content", [b"", b" \n\n"])
def test_a_stdin_without_text_is_an_error(
    content: bytes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    set_stdin(monkeypatch, content)
    assert cli.main(["run"]) == 1
    assert "stdin holds no text" in capsys.readouterr().err


def test_stdin_that_is_not_utf8_is_read_all_the_same(
    model: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    set_stdin(monkeypatch, b"caf\xe9")
    assert cli.main(["run", *model, "--max-tokens", "1"]) == 0


def test_raw_continues_the_text_without_a_template(model: list[str], tmp_path: Path):
    stats_file = tmp_path / "stats.jsonl"
    options = ["--prompt", "the", "--max-tokens", "1", "--stats-json", str(stats_file)]
    assert cli.main(["run", *model, *options]) == 0
    [chat] = read_lines(stats_file)
    assert cli.main(["run", *model, *options, "--raw"]) == 0
    [raw] = read_lines(stats_file)  # the second run's alone
    assert raw["prompt_tokens"] == 1
    assert chat["prompt_tokens"] > 5


def test_a_system_prompt_is_part_of_the_prompt(model: list[str], tmp_path: Path):
    stats_file = tmp_path / "stats.jsonl"
    options = ["--prompt", PROMPT, "--max-tokens", "1", "--stats-json", str(stats_file)]
    assert cli.main(["run", *model, *options]) == 0
    [without] = read_lines(stats_file)
    assert cli.main(["run", *model, *options, "--system", "the expert"]) == 0
    [with_system] = read_lines(stats_file)
    assert with_system["prompt_tokens"] > without["prompt_tokens"]


def test_the_same_seed_gives_the_same_answer_and_another_one_another(
    model: list[str], capsys: pytest.CaptureFixture[str]
):
    def answer(seed: int) -> str:
        options = ["--prompt", PROMPT, "--max-tokens", "12", "--temperature", "1", "--seed", str(seed)]
        assert cli.main(["run", *model, *options]) == 0
        return capsys.readouterr().out

    assert answer(1) == answer(1) != answer(2)


def test_an_answer_ends_before_a_stop_string(model: list[str], capsys: pytest.CaptureFixture[str]):
    options = ["--prompt", PROMPT, "--max-tokens", "12"]
    assert cli.main(["run", *model, *options]) == 0
    whole = capsys.readouterr().out.rstrip("\n")
    stop = whole[len(whole) // 2 :][:3]
    assert cli.main(["run", *model, *options, "--stop", "never said", "--stop", stop]) == 0
    assert capsys.readouterr().out.rstrip("\n") == whole[: whole.index(stop)].rstrip("\n")


def test_a_prompt_longer_than_the_context_is_one_line_and_recorded(
    model: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    stats_file = tmp_path / "stats.jsonl"
    options = ["--prompt", PROMPT * 9, "--context", "16", "--quiet", "--stats-json", str(stats_file)]
    assert cli.main(["run", *model, *options]) == 1
    assert "the context holds 16" in capsys.readouterr().err
    [stats] = read_lines(stats_file)
    assert "the context holds 16" in stats["error"]
    assert stats["finish_reason"] is None


def test_a_full_context_ends_the_answer_with_the_reason(model: list[str], capsys: pytest.CaptureFixture[str]):
    assert cli.main(["run", *model, "--prompt", PROMPT, "--context", "32"]) == 0
    assert "[context of 32 tokens is full; --context N holds more]" in capsys.readouterr().err


# plan


def test_plan_shows_what_the_budget_buys_without_loading_weights(
    model: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def too_much(*arguments: object) -> NoReturn:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("flashmoe.loader.load_dense", too_much)
    assert cli.main(["plan", *model]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0].startswith("mixtral: mixtral, 1.0 MiB, 3 layers, 8 experts, top-2")
    assert any(line.startswith("expert slots   960.0 KiB  24 of 24 experts (100%)") for line in lines)
    assert lines[-1].endswith("of 4.0 GiB")
    assert err == ""


def test_plan_as_json_has_the_plan_and_the_models_facts(model: list[str], capsys: pytest.CaptureFixture[str]):
    assert cli.main(["plan", *model, "--context", "256", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["model_type"] == "mixtral"
    assert (values["layers"], values["top_k"], values["slots"], values["context"]) == (3, 2, 24, 256)
    assert values["budget_bytes"] == 4 << 30
    assert values["planned_bytes"] <= values["budget_bytes"]
    assert values["model_bytes"] > 10**6


def test_plan_warns_on_stderr_of_a_budget_that_the_system_does_not_have(
    model: list[str], capsys: pytest.CaptureFixture[str]
):
    assert cli.main(["plan", *model, "--ram-budget", "900T", "--json"]) == 0
    out, err = capsys.readouterr()
    assert err.startswith("warning: RAM budget 900.0 TiB is more than ")
    assert len(json.loads(out)["warnings"]) == 1


def test_a_plan_that_cannot_work_exits_with_1_and_says_what_would(
    model: list[str], capsys: pytest.CaptureFixture[str]
):
    assert cli.main(["plan", *model, "--ram-budget", "1M"]) == 1
    assert re.search(r"try --ram-budget \d+M$", capsys.readouterr().err)


# bench


def test_bench_states_the_bound_and_then_a_table(model: list[str], capsys: pytest.CaptureFixture[str]):
    options = ["--prompt-tokens", "16,32", "--decode-tokens", "8", "--repeat", "2", "--policy", "lfu"]
    assert cli.main(["bench", *model, *options]) == 0
    out, err = capsys.readouterr()
    bound, header, *rows, note = out.splitlines()
    assert re.match(r"drive \d+ MB/s \(\w+\), 6 experts of 0.04 MB a token", bound)
    assert [cell.strip() for cell in header.split("|")][5:7] == ["test", "t/s"]
    cells = [[cell.strip() for cell in row.split("|")] for row in rows]
    assert [row[5] for row in cells] == ["pp16", "pp32", "tg8"]
    assert {row[3] for row in cells} == {"lfu"}
    assert "empty slots" in note
    assert "tg8, 2 of 2" in err


def test_bench_as_json_has_stdout_to_itself(
    model: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("the expert that was used longest ago leaves first", "utf-8")
    options = ["--prompt-tokens", "16", "--decode-tokens", "8", "--repeat", "1", "--prompts", str(prompts)]
    assert cli.main(["bench", *model, *options, "--json"]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert [test["test"] for test in report["tests"]] == ["pp16", "tg8"]
    assert report["model"] == "mixtral"
    assert "| tg8" in err


# As a process of its own


def start(arguments: list[str], **streams: Any) -> subprocess.Popen[bytes]:
    """With buffered streams, as users have them: what is left in a buffer at exit must not cause noise."""
    command = [sys.executable, "-m", "flashmoe", *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, env=environment, **streams)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has other signals")
def test_ctrl_c_during_one_answer_keeps_what_came_and_exits_with_130(tiny_model: Path, tmp_path: Path):
    stats_file = tmp_path / "stats.jsonl"
    options = ["--ram-budget", "2G", "--prompt", PROMPT, "--stats-json", str(stats_file)]
    process = start(["run", "--model", str(tiny_model), *options], stdout=subprocess.PIPE)
    assert process.stdout is not None
    begun = os.read(process.stdout.fileno(), 1000)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"[stopped by Ctrl-C]" in err
    [stats] = read_lines(stats_file)
    assert stats["finish_reason"] == "cancelled"
    assert (begun + out).decode() == stats["text"] + "\n"


@pytest.mark.parametrize("arguments", [["--help"], ["plan"]])
def test_a_reader_that_has_gone_is_no_reason_for_noise(arguments: list[str], tiny_model: Path):
    read_end, write_end = os.pipe()
    os.close(read_end)
    options = ["--model", str(tiny_model), "--ram-budget", "2G"] if arguments == ["plan"] else []
    process = start([*arguments, *options], stdout=write_end)
    os.close(write_end)
    _, err = process.communicate(timeout=60)
    assert err == b""
    assert process.returncode == (141 if options else 0)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full to stand for a full disk")
def test_a_full_disk_behind_stdout_is_one_line(tiny_model: Path):
    with open("/dev/full", "w") as full:
        process = start(["plan", "--model", str(tiny_model), "--ram-budget", "2G"], stdout=full)
        _, err = process.communicate(timeout=60)
    assert err == b"flashmoe: error: cannot write to stdout: No space left on device\n"
    assert process.returncode == 1
