"""Calibration: what is recorded is what a plain computation of the same layer sees, and packing uses it."""

import json
from pathlib import Path

import pytest
import torch
from tiny_models import make_tiny_checkpoint

from flashmoe.calibration import CalibrationText, calibrate, take_windows
from flashmoe.cli import main
from flashmoe.errors import ConfigError
from flashmoe.loader import open_model
from flashmoe.pack import PackOptions, pack
from kernels.expert_ffn import ExpertFFN
from storage.expert_file import read_manifest, verify
from storage.storage_errors import StorageError

LINES = [f"the expert that was used longest ago leaves first, number {n} of many" for n in range(12)]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": line * 3}) + "\n" for line in LINES))
    return path


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_the_squares_are_those_of_a_plain_computation(
    tmp_path: Path, text: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file

    source = make_tiny_checkpoint(tmp_path / "source", family, decoder_sparse_step=1)
    seen: list[torch.Tensor] = []
    begin = ExpertFFN.begin
    monkeypatch.setattr(ExpertFFN, "begin", lambda ffn, x: (seen.append(x.clone()), begin(ffn, x))[1])
    found = calibrate(open_model(source), CalibrationText(text, 200), 2)
    assert found.tokens == 200
    windows = len(seen) // 3  # all of them pass a layer before the next

    def inputs(layer: int) -> torch.Tensor:
        return torch.cat(seen[layer * windows : (layer + 1) * windows])

    for layer in range(3):
        x = inputs(layer)
        mean = x.square().mean(dim=0)
        torch.testing.assert_close(found.inputs[layer], mean + 1e-3 * mean.mean())
    block = "block_sparse_moe" if family == "mixtral" else "mlp"
    names = ("w1", "w3") if family == "mixtral" else ("gate_proj", "up_proj")
    weights = load_file(source / "model.safetensors")
    layer, total = 1, torch.zeros(96)
    for expert in range(
        8
    ):  # top-2 of 8: each token counts for two experts; the sum over all is easy to check
        gate, up = (
            weights[f"model.layers.{layer}.{block}.experts.{expert}.{n}.weight"].float() for n in names
        )
        h = torch.nn.functional.silu(inputs(layer) @ gate.T) * (inputs(layer) @ up.T)
        assert (found.hidden[layer, expert] > 0).all()
        total += h.square().mean(dim=0)
    ratio = sum(found.hidden[layer, expert] for expert in range(8)) / total
    assert 0.4 < float(ratio.median()) < 2.5  # routed tokens only, so not the same, but of the same size


def test_a_calibrated_pack_says_so_and_differs_from_a_plain_one(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_tiny_checkpoint(tmp_path / "source")
    plain, weighted = tmp_path / "plain", tmp_path / "weighted"
    pack(source, plain, PackOptions("int4"))
    command = ["pack", "--model", str(source), "--output", str(weighted), "--calibration", str(text)]
    assert main([*command, "--calibration-tokens", "300"]) == 0
    assert "relative rms weighted by activations" in capsys.readouterr().out
    a, b = read_manifest(plain), verify(weighted)
    assert a is not None and a.calibration is None and b.calibration is not None
    assert b.calibration["text"] == "text.jsonl"
    assert {n for n in a.tensors if a.tensors[n] != b.tensors[n]} >= {n for n in a.tensors if "packed" in n}


def test_a_pack_begun_with_another_text_is_not_gone_on_with(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, output = make_tiny_checkpoint(tmp_path / "source"), tmp_path / "packed"

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("flashmoe.pack.write_safetensors", interrupt)
        with pytest.raises(KeyboardInterrupt):
            pack(source, output, PackOptions("int4", calibration=CalibrationText(text, 64)))
    with pytest.raises(
        StorageError, match="another pack: --calibration was [0-9a-f]{16}, 64 tokens, now none"
    ):
        pack(source, output, PackOptions("int4"))


def test_windows_are_spread_over_the_texts_and_end_at_the_count(tmp_path: Path, text: Path) -> None:
    tokenizer = open_model(make_tiny_checkpoint(tmp_path / "source")).tokenizer
    windows = list(take_windows(tokenizer, [line * 3 for line in LINES], 100))
    assert sum(map(len, windows)) <= 100 and all(len(window) >= 32 for window in windows)
    assert list(take_windows(tokenizer, ["short"], 100)) == []


def test_a_text_that_cannot_be_used_is_one_line(tmp_path: Path) -> None:
    source, empty = make_tiny_checkpoint(tmp_path / "source"), tmp_path / "empty.txt"
    empty.write_text("short")
    with pytest.raises(ConfigError, match="no text of 32 tokens"):
        pack(source, tmp_path / "packed", PackOptions("int4", calibration=CalibrationText(empty)))
    with pytest.raises(ConfigError, match="cannot read"):
        pack(source, tmp_path / "other", PackOptions("int4", calibration=CalibrationText(tmp_path / "none")))


@pytest.mark.parametrize(
    "options, words",
    [
        (["--output", "x", "--calibration-tokens", "5"], "--calibration FILE, which is missing"),
        (["--output", "x", "--format", "bf16", "--calibration", "y"], "--format bf16 has none"),
        (["--verify", "x", "--calibration-tokens", "5"], "no place for --calibration-tokens"),
    ],
)
def test_wrong_usage_exits_with_2(options: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["pack", *options])
    assert exit.value.code == 2 and words in capsys.readouterr().err
