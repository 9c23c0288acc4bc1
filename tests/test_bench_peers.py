"""The comparison with other engines: fair settings, right arithmetic, nothing left behind."""

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scripts import peer_worker
from scripts.bench_peers import (
    ACCELERATE_SHARE,
    Contender,
    Run,
    Setting,
    agreement,
    parse_arguments,
    print_table,
    settings,
    summary,
    text_tokens,
    turns,
)
from scripts.loop_filesystem import LoopFilesystem, LoopUnavailable, bytes_of, image_bytes
from scripts.peer_worker import Job, measure
from tests.tiny_models import make_tiny_checkpoint


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Path]:
    """Files and folders of the sizes that matter, and nothing in them."""
    sizes = {"int4": 900, "int8": 1900, "bf16": 5000, "q4.gguf": 1000, "q8.gguf": 2000}
    for name, size in sizes.items():
        path = tmp_path / name
        if path.suffix:
            path.write_bytes(bytes(size))
        else:
            path.mkdir()
            (path / "model.safetensors").write_bytes(bytes(size))
    return {name: tmp_path / name for name in sizes}


def all_options(models: dict[str, Path], *more: str) -> list[str]:
    given = {"int4": "int4", "int8": "int8", "bf16": "bf16", "gguf-q4": "q4.gguf", "gguf-q8": "q8.gguf"}
    return [word for key, name in given.items() for word in (f"--{key}", str(models[name]))] + list(more)


def test_both_engines_get_the_same_memory_and_ours_the_same_budget(models: dict[str, Path]) -> None:
    options = parse_arguments(all_options(models, "--only", "40,70"))
    limits = [
        [(c.engine, c.limit_bytes, c.memory_bytes) for c in setting.contenders]
        for setting in settings(options)
    ]
    assert limits == [
        [("ours", 400, 400), ("llama.cpp", 400, None)],
        [("ours", 800, 800), ("llama.cpp", 800, None)],
        [("ours", 700, 700), ("llama.cpp", 700, None)],
        [("ours", 1400, 1400), ("llama.cpp", 1400, None)],
    ]


def test_llama_cpp_repacks_only_where_memory_is_ample(models: dict[str, Path]) -> None:
    for setting in settings(parse_arguments(all_options(models))):
        for contender in setting.contenders:
            if contender.engine == "llama.cpp":
                assert contender.options["repack"] == (contender.limit_bytes is None)
                assert (contender.limit_bytes is None) == (setting.part == "resident") == setting.warm


def test_only_the_part_readahead_changes_the_read_ahead(models: dict[str, Path]) -> None:
    options = parse_arguments(all_options(models))
    found = {(setting.part, setting.read_ahead_kb) for setting in settings(options)}
    assert found == {
        ("40", 128), ("70", 128), ("resident", 128), ("readahead", 8192), ("transformers", 128),
    }  # fmt: skip


def test_transformers_meets_ours_in_its_memory_and_in_less(models: dict[str, Path]) -> None:
    (setting,) = settings(parse_arguments(all_options(models, "--only", "transformers")))
    assert [(c.label, c.limit_bytes, c.memory_bytes) for c in setting.contenders] == [
        ("transformers bf16", 2000, int(2000 * ACCELERATE_SHARE)),
        ("ours int4", 2000, 2000),
        ("ours int8", 2000, 2000),
        ("ours int4, 40 % of int4", 400, 400),
    ]


def test_a_contender_without_its_model_is_left_out(models: dict[str, Path]) -> None:
    options = parse_arguments(["--bf16", str(models["bf16"]), "--gguf-q4", str(models["q4.gguf"])])
    found = {setting.part: [c.label for c in setting.contenders] for setting in settings(options)}
    alone = ["llama.cpp Q4_0"]
    assert found == {
        "40": alone, "70": alone, "resident": alone, "readahead": alone,
        "transformers": ["transformers bf16"],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no models given"),
        (["--gguf-q4", "q4.gguf"], "needs a tokenizer"),
        (["--bf16", "bf16", "--only", "40,90"], "not 90"),
        (["--bf16", "bf16", "--only", "40"], "nothing to run"),
        (["--bf16", "bf16", "--int4", "elsewhere"], "not there: elsewhere"),
    ],
)
def test_wrong_usage_says_what_is_wrong(
    models: dict[str, Path], arguments: list[str], message: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(models["bf16"].parent)
    with pytest.raises(SystemExit):
        parse_arguments(arguments)
    assert message in capsys.readouterr().err


def contender(label: str, engine: str = "ours") -> Contender:
    return Contender(label, engine, "python", label, 1000, None)


def test_who_begins_changes_from_round_to_round() -> None:
    order = [(number, c.label) for number, c in turns([contender("a"), contender("b")], 3)]
    assert order == [(0, "a"), (0, "b"), (1, "b"), (1, "a"), (2, "a"), (2, "b")]


def answer(seconds: float, predicted: list[int] | None = None) -> dict[str, Any]:
    """Two decoded tokens of `seconds` each, four experts of 10 MB, of which three were missed."""
    return {
        "load_s": 1.0, "prefill_s": 2.0, "token_s": [seconds, seconds], "predicted": predicted or [7, 8],
        "surprise": [math.log(2), math.log(8)],
        "decode_read_bytes": 40_000_000, "total_read_bytes": 3_000_000_000, "decode_major_faults": 10,
        "peak_rss_bytes": 2_000_000_000,
        "decode_counters": {"hits": 1, "misses": 3, "bytes_read": 30_000_000, "read_s": 0.1, "stall_s": 0.05},
        "facts": {"expert_bytes": 10_000_000},
    }  # fmt: skip


def test_figures_are_per_decoded_token() -> None:
    figures = Run("s", "ours", None, answer(0.25), {"peak_bytes": 2_500_000_000}, 128).figures()
    expected = {
        "decode_tok_per_s": 4.0, "prefill_tok_per_s": 64.0, "mb_per_token": 20.0, "mb_per_s": 80.0,
        "faults_per_token": 5.0, "hit_rate": 0.25, "missed_mb_per_token": 15.0, "stall_share": 0.1,
        "mb_per_s_reading": 300.0, "mb_per_s_stalled": 600.0, "peak_rss_gb": 2.0, "cgroup_peak_gb": 2.5,
        "perplexity": 4.0,
    }  # fmt: skip
    assert {name: figures[name] for name in expected} == pytest.approx(expected)


def test_a_summary_has_medians_and_says_which_runs_failed(capsys: pytest.CaptureFixture[str]) -> None:
    setting = Setting("40", "int4, 40 %", (contender("ours"), contender("peer")), 128, 2, False, 128)
    killed = Run("s", "peer", "killed, out of memory (status -9)", cgroup={"oom_kills": 1})
    runs = [*(Run("s", "ours", None, answer(seconds), {}, 128) for seconds in (0.5, 0.25, 1.0)), killed]
    found = summary(setting, runs)
    ours, peer = found["contenders"]
    speed = ours["figures"]["decode_tok_per_s"]
    assert (speed["least"], speed["median"], speed["most"]) == (1.0, 2.0, 4.0)
    assert (ours["runs"], peer["runs"], peer["oom_kills"]) == (3, 0, 1)
    json.dumps(found)
    print_table(found)
    table = capsys.readouterr().out
    assert "2.00 (1.00–4.00)" in table
    assert "peer failed: killed, out of memory" in table


def test_agreement_counts_the_same_most_likely_tokens() -> None:
    runs = [
        Run("s", "a", None, answer(1.0, [1, 2, 3, 4])),
        Run("s", "b", None, answer(1.0, [1, 2, 3, 5])),
        Run("s", "c", "killed"),
    ]
    assert agreement(runs) == {"a": 1.0, "b": 0.75}


def test_the_text_goes_round_when_it_is_too_short(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path / "model")
    long = text_tokens(folder, 20_000)
    assert len(long) == 20_000
    assert text_tokens(folder, 5) == long[:5]


class CountingEngine:
    """Predicts, as sure as e to 1, the number of tokens that it was given so far; knows 9 tokens."""

    def __init__(self, job: Job) -> None:
        self.calls: list[Any] = []
        self.given = 0

    def prefill(self, tokens: list[int]) -> Any:
        self.calls.append(list(tokens))
        self.given += len(tokens)
        return np.eye(9, dtype=np.float32)[self.given]

    def decode(self, token: int) -> Any:
        self.calls.append(token)
        self.given += 1
        return np.eye(9, dtype=np.float32)[self.given]

    def reset(self) -> None:
        self.calls.append("reset")
        self.given = 0

    def counters(self) -> dict[str, float]:
        return {"hits": float(self.given)}

    def facts(self) -> dict[str, Any]:
        return {"calls": self.calls}


def test_a_warm_run_sees_every_token_before_it_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(peer_worker.ENGINES, "counting", CountingEngine)  # type: ignore[arg-type]
    if not Path("/proc/self/io").exists():
        pytest.skip("no /proc/self/io: not Linux")
    found = measure(Job("counting", "model", [5, 6, 7, 3], prompt_tokens=2, threads=1, warm=True))
    assert found["facts"]["calls"] == [[5, 6, 7, 3], "reset", [5, 6], 7, 3]
    assert found["predicted"] == [2, 3]
    wrong, right = math.log(math.e + 8), math.log(math.e + 8) - 1
    assert found["surprise"] == pytest.approx([wrong, right])
    assert len(found["token_s"]) == 2
    assert found["decode_counters"] == {"hits": 2.0}  # what prefill did is not counted


def test_an_image_holds_its_files_in_whole_blocks() -> None:
    assert image_bytes(10**9) > 10**9
    assert image_bytes(10**9 + 1) % 4096 == 0


@pytest.mark.root
def test_a_loop_filesystem_leaves_nothing_behind(tmp_path: Path) -> None:
    file, folder = tmp_path / "a.gguf", tmp_path / "model"
    file.write_bytes(os.urandom(100_000))
    folder.mkdir()
    (folder / "b").write_bytes(b"b" * 5000)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    filesystem = LoopFilesystem(scratch, bytes_of(file) + bytes_of(folder))
    with pytest.raises(KeyboardInterrupt):  # noqa: SIM117  (the filesystem must be gone after it)
        try:
            with filesystem:
                assert filesystem.copy(file, "a.gguf").read_bytes() == file.read_bytes()
                assert (filesystem.copy(folder, "model") / "b").stat().st_size == 5000
                filesystem.set_read_ahead(256)
                assert filesystem.read_ahead() == 256
                raise KeyboardInterrupt
        except LoopUnavailable as error:
            pytest.skip(f"no loop device: {error}")
    assert not list(scratch.iterdir())
    assert str(scratch) not in Path("/proc/mounts").read_text()
