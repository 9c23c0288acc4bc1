"""GPTQ: less error in what comes out, where columns go together; the packed model holds what was chosen."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engines import build_engine, greedy
from tiny_models import make_tiny_checkpoint
from torch import Tensor

from flashmoe import calibration, gptq, pack_plan
from flashmoe import pack as pack_module
from flashmoe.calibration import CalibrationText, Hessians, experts_at_a_time
from flashmoe.gptq import Hessian, column_ranges, factorise, quantise
from flashmoe.loader import open_model
from flashmoe.pack import PackOptions, pack
from kernels import native
from kernels.native import Context, Format, make_context
from storage.expert_file import verify
from storage.storage_errors import StorageError


@pytest.fixture(scope="module")
def context() -> Context:
    return make_context(2)


def correlated(tokens: int, columns: int, seed: int = 0) -> Tensor:
    """Inputs [T, K] that are mostly mixtures of a few directions."""
    random = torch.Generator().manual_seed(seed)
    few = torch.randn(tokens, columns // 4, generator=random)
    return few @ torch.randn(columns // 4, columns, generator=random) + 0.1 * torch.randn(
        tokens, columns, generator=random
    )


def hessian(x: Tensor) -> list[Tensor]:
    found = Hessian(x.shape[1])
    for part in x.split(100):
        found.add(part)
    return found.mean()


def rounded(context: Context, weight: Tensor, importance: Tensor | None = None) -> Tensor:
    packed = torch.empty(native.matrix_bytes(Format.INT4, *weight.shape), dtype=torch.uint8)
    native.pack_matrix(context, weight, Format.INT4, packed, importance)
    return native.unpack_matrix(packed, Format.INT4, *weight.shape)


@pytest.mark.parametrize("columns", [32, 96, 200])
def test_the_output_error_is_far_below_that_of_plain_rounding(context: Context, columns: int) -> None:
    x, weight = correlated(1000, columns), torch.randn(48, columns)
    factors = factorise(hessian(x))
    assert factors is not None
    done = quantise(context, weight, factors)
    wanted = x @ weight.T
    error = (x @ (done.values() - weight).T).norm()
    assert error < 0.7 * (x @ (rounded(context, weight) - weight).T).norm()
    assert error < 0.8 * (x @ (rounded(context, weight, x.square().mean(dim=0)) - weight).T).norm()
    reported = (done.sums[0] / done.sums[1]) ** 0.5  # of damped H: a little more
    assert 0.9 * error / wanted.norm() < reported < 2 * error / wanted.norm()


def test_the_error_of_blocks_is_between(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = correlated(1000, 128), torch.randn(48, 128)

    def error() -> float:
        factors = factorise(hessian(x))
        assert factors is not None
        return float((x @ (quantise(context, weight, factors).values() - weight).T).norm())

    whole = error()
    monkeypatch.setattr(gptq, "MAX_COLUMNS", 64)
    monkeypatch.setattr(gptq, "CHUNK_BYTES", 5 * 4 * 128)  # rows in chunks of 5
    assert whole < error() < (x @ (rounded(context, weight) - weight).T).norm()


def test_blocks_are_whole_groups_and_cover_all_columns() -> None:
    for columns in (1, 32, 100, 4096, 4097, 14336):
        ranges = list(column_ranges(columns))
        assert ranges[0][0] == 0 and ranges[-1][1] == columns
        assert all(a[1] == b[0] and a[1] % 32 == 0 for a, b in zip(ranges, ranges[1:], strict=False))
        assert all(end - begin <= gptq.MAX_COLUMNS for begin, end in ranges)


def test_on_inputs_that_do_not_go_together_it_is_plain_rounding(context: Context) -> None:
    weight = torch.randn(20, 96)
    factors = factorise([torch.eye(96)])
    assert factors is not None
    assert torch.equal(quantise(context, weight, factors).values(), rounded(context, weight))


def test_a_dead_column_is_rounded_as_it_is_and_takes_no_errors(context: Context) -> None:
    x, weight = correlated(500, 64), torch.randn(16, 64)
    x[:, [3, 40]] = 0
    factors = factorise(hessian(x))
    assert factors is not None
    done = quantise(context, weight, factors)
    for column in (3, 40):
        scale = done.scales[:, column // 32].float()
        code = (weight[:, column] / scale).round().clamp(-8, 7)
        assert torch.equal(done.codes[:, column].float(), code)
    nothing = factorise([torch.zeros(64, 64)])
    assert nothing is not None
    assert torch.equal(quantise(context, weight, nothing).values(), rounded(context, weight))


def test_damping_is_raised_until_there_are_factors_and_no_number_gives_none() -> None:
    indefinite = torch.eye(32)
    indefinite[0, 1] = indefinite[1, 0] = 1.5  # eigenvalue -0.5
    factors = factorise([indefinite])
    assert factors is not None and torch.isfinite(factors[0].inverse).all()
    assert factorise([torch.full((32, 32), float("nan"))]) is None
    assert factorise([torch.full((32, 32), float("inf"))]) is None


def test_factors_are_those_of_the_damped_hessian() -> None:
    mean = hessian(correlated(500, 64))
    (factors,) = factorise(mean) or []
    damped = mean[0].double() + 0.01 * mean[0].diagonal().double().mean() * torch.eye(64)
    root, inverse = factors.root.double(), factors.inverse.double()
    torch.testing.assert_close(root @ root.T, damped, rtol=1e-4, atol=1e-4 * float(damped.max()))
    torch.testing.assert_close(inverse.T @ inverse @ damped, torch.eye(64).double(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("format", [Format.INT4, Format.INT8])
@pytest.mark.parametrize("hidden, width", [(64, 64), (72, 40), (33, 100)])
def test_laid_out_codes_and_scales_come_back_as_their_product(
    context: Context, format: Format, hidden: int, width: int
) -> None:
    least, most = (-8, 7) if format is Format.INT4 else (-127, 127)
    shapes = [(width, hidden), (width, hidden), (hidden, width)]
    codes = [torch.randint(least, most + 1, shape, dtype=torch.int8) for shape in shapes]
    scales = [torch.randn(n, -(-k // 32)).half() for n, k in shapes]
    want = [
        c * s.float().repeat_interleave(32, dim=1)[:, : c.shape[1]]
        for c, s in zip(codes, scales, strict=True)
    ]
    out = torch.full((native.expert_bytes(format, hidden, width),), 0xEE, dtype=torch.uint8)
    native.lay_out_expert(context, codes, scales, format, out)
    for got, wanted in zip(native.unpack_expert(out, format, hidden, width), want, strict=True):
        assert torch.equal(got, wanted)
    for code, scale, wanted in zip(codes, scales, want, strict=True):
        out = torch.full((native.matrix_bytes(format, *code.shape),), 0xEE, dtype=torch.uint8)
        native.lay_out_matrix(context, code, scale, format, out)
        assert torch.equal(native.unpack_matrix(out, format, *code.shape), wanted)
        rows, columns = (-(-code.shape[0] // 16) * 16, -(-code.shape[1] // 64) * 64)
        padded = native.unpack_matrix(out, format, rows, columns)  # padding is stored, and is zero
        assert not padded[code.shape[0] :].any() and not padded[:, code.shape[1] :].any()


def test_scales_are_those_of_the_packer_and_its_tiles_those_of_the_layout(context: Context) -> None:
    weight, importance = torch.randn(50, 32), torch.rand(32)
    packed = torch.empty(native.matrix_bytes(Format.INT4, 50, 32), dtype=torch.uint8)
    native.pack_matrix(context, weight, Format.INT4, packed, importance)
    scales = native.search_scales(context, weight, importance)
    values = native.unpack_matrix(packed, Format.INT4, 50, 32)
    codes = (values / scales.float()[:, None]).round().to(torch.int8)
    again = torch.empty_like(packed)
    native.lay_out_matrix(context, codes, scales[:, None].contiguous(), Format.INT4, again)
    assert torch.equal(again, packed)


# A model


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    line = "the expert that was used longest ago leaves first, number {} of many "
    path.write_text("".join(json.dumps({"text": line.format(n) * 3}) + "\n" for n in range(12)))
    return path


def options(text: Path, tokens: int = 300) -> PackOptions:
    return PackOptions("int4", threads=2, calibration=CalibrationText(text, tokens))


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_a_packed_model_runs_says_how_it_was_made_and_is_made_the_same_again(
    tmp_path: Path, text: Path, family: str
) -> None:
    source = make_tiny_checkpoint(tmp_path / "source", family)
    pack(source, tmp_path / "a", options(text))
    pack(source, tmp_path / "b", options(text))
    a, b = verify(tmp_path / "a"), verify(tmp_path / "b")
    assert a == b
    assert a.calibration is not None and a.calibration["method"] == "gptq"
    assert a.calibration["tokens"] == 300 and len(a.calibration["sha256"]) == 16
    assert set(a.layer_errors) == {0, 1, 2} and all(0 < e < 0.2 for e in a.layer_errors.values())
    engine = build_engine(tmp_path / "a")
    assert greedy(engine, list(range(3, 40)), 5)


def test_a_layer_without_room_for_all_hessians_is_run_in_parts_and_gives_the_same(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_tiny_checkpoint(tmp_path / "source")
    pack(source, tmp_path / "whole", options(text))
    monkeypatch.setattr(calibration, "HESSIAN_BYTES", 4 * (64 * 64 + 96 * 96 + 3 * 96 * 96))
    assert experts_at_a_time(64, 96, 8, 0) == range(3)
    assert experts_at_a_time(64, 96, 8, 6) == range(6, 8)
    pack(source, tmp_path / "parts", options(text))
    assert verify(tmp_path / "parts") == verify(tmp_path / "whole")
    monkeypatch.setattr(calibration, "HESSIAN_BYTES", 0)
    assert experts_at_a_time(64, 96, 8, 6) == range(6, 7)


def test_hessians_are_those_of_a_plain_run_also_when_layers_are_left_out(tmp_path: Path, text: Path) -> None:
    model = open_model(make_tiny_checkpoint(tmp_path / "source"))
    with Hessians(model, CalibrationText(text, 200), 2) as hessians:
        in_turn = {(layer, 5): hessians.of((layer, 5)) for layer in range(3)}
    with Hessians(model, CalibrationText(text, 200), 2) as hessians:
        inputs, hidden = hessians.of((2, 5))
    assert torch.equal(inputs.blocks[0], in_turn[2, 5][0].blocks[0])
    assert torch.equal(hidden[0], in_turn[2, 5][1][0])
    squares = calibration.calibrate(model, CalibrationText(text, 200), 2)
    mean = inputs.mean()[0].diagonal()
    torch.testing.assert_close(mean + 1e-3 * mean.mean(), squares.inputs[2])


def test_a_pack_that_was_stopped_goes_on_to_the_same_bytes(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack_plan.plan_pack, "__defaults__", (60_000,))
    source = make_tiny_checkpoint(tmp_path / "source")
    pack(source, tmp_path / "whole", options(text))
    write, written = pack_module.write_safetensors, 0

    def stopping(*rest: object) -> None:
        nonlocal written
        if written == 3:
            raise KeyboardInterrupt
        written += 1
        write(*rest)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(pack_module, "write_safetensors", stopping)
        with pytest.raises(KeyboardInterrupt):
            pack(source, tmp_path / "stopped", options(text))
    with pytest.raises(StorageError, match="another pack: --threads was 2, now 1"):
        pack(source, tmp_path / "stopped", replace(options(text), threads=1))
    assert pack(source, tmp_path / "stopped", options(text)).resumed_shards == 3
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "stopped" / path.name).read_bytes() == path.read_bytes()


def test_activations_that_are_no_numbers_fall_back_to_rounding_and_say_so_once(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source = make_tiny_checkpoint(tmp_path / "source")
    pack(source, tmp_path / "plain", PackOptions("int4"))
    monkeypatch.setattr("flashmoe.pack_experts.gptq.factorise", lambda means: None)
    with caplog.at_level(logging.WARNING):
        pack(source, tmp_path / "packed", options(text))
    assert len(caplog.messages) == 1 and "expert 0 of layer 0 is rounded plainly" in caplog.messages[0]
    assert verify(tmp_path / "packed").tensors == verify(tmp_path / "plain").tensors
