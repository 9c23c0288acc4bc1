"""Asking for a GPU: what happens where there is none, and that nothing of it is loaded then."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flashmoe import cli
from flashmoe.config import RunConfig
from flashmoe.errors import BudgetError, ConfigError, GpuError
from flashmoe.loader import uses_gpu

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


@needs_no_gpu
def test_a_gpu_that_is_not_there_is_one_clear_line(
    tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["run", "--model", str(tiny_model), "--device", "cuda", "--prompt", "hello"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "sees no NVIDIA GPU" in error and "--device cpu" in error


@needs_no_gpu
def test_auto_takes_the_cpu_where_there_is_no_gpu() -> None:
    assert not uses_gpu(RunConfig(device="auto"))


def test_the_cpu_is_taken_if_asked_for() -> None:
    assert not uses_gpu(RunConfig(device="cpu"))


def test_a_gpu_without_triton_or_with_mmap_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert uses_gpu(RunConfig(device="auto"))

    def refused(message: str, **options: str) -> None:
        assert not uses_gpu(RunConfig(device="auto", **options))  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=message):
            uses_gpu(RunConfig(device="cuda", **options))  # type: ignore[arg-type]

    refused("mmap has no RAM slots.*or take --device cpu", reader="mmap")
    refused("maps guesses on the CPU only", predictor="maps")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused(r"Triton is missing; pip install \"flashmoe\[gpu\]\"")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    refused("7.5 is below compute capability 8.0")


def test_a_run_on_the_cpu_imports_no_triton(tiny_model: Path) -> None:
    script = (
        "import sys; from flashmoe.cli import main\n"
        f"code = main(['run', '--model', {str(tiny_model)!r}, '--ram-budget', '4G', '--device', 'auto',"
        " '--prompt', 'hi', '--max-tokens', '2'])\n"
        "loaded = [name for name in sys.modules if name.partition('.')[0] == 'triton']\n"
        "sys.exit(code or (len(loaded) > 0))"
    )
    if torch.cuda.is_available():
        script = script.replace("'auto'", "'cpu'")
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parent.parent)


def test_memory_that_the_gpu_refuses_is_an_error_that_names_the_figure() -> None:
    from flashmoe.gpu_loader import allocating
    from flashmoe.vram_budget import VramPlan

    plan = VramPlan(8 << 30, 1 << 30, 1 << 30, 0, 0, 1 << 20, 100, 0, 200, 512, 512, 1)
    message = r"--vram-budget 8\.0 GiB.*try a smaller --vram-budget"
    with pytest.raises(BudgetError, match=message), allocating(plan):
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_a_gpu_that_runs_out_of_memory_in_mid_answer_names_the_figure_to_change() -> None:
    from flashmoe.gpu_decoder import out_of_memory_named

    with pytest.raises(GpuError, match="--vram-budget"), out_of_memory_named():
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_a_live_comparison_sums_what_a_gpu_counts() -> None:
    """It asked its own sums for counters that only a GPU's cache has."""
    from flashmoe.compare_live import _Answers
    from flashmoe.tier_copies import VramCounters

    answers = _Answers()
    for _ in range(2):
        answers.add(4, 1.0, VramCounters(hits=5, misses=3, ram_hits=2))
    repetition = answers.repetition(1000.0)
    assert (repetition.tokens, repetition.hits, repetition.misses) == (8, 10, 6)
