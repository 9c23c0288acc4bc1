"""`flashmoe pack`: what it writes, that it goes on after a kill, and what it refuses."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from engines import build_engine, greedy
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, make_tiny_checkpoint

from flashmoe import pack as pack_module
from flashmoe import pack_plan
from flashmoe.cli import main
from flashmoe.errors import ConfigError, FlashMoEError, ModelError
from flashmoe.pack import PackOptions, pack
from kernels import native
from kernels.native import Format
from storage.checkpoint import open_checkpoint
from storage.expert_file import JOURNAL_NAME, MANIFEST_NAME, read_manifest, verify
from storage.storage_errors import CheckpointError, StorageError

PROMPT = list(range(3, 60))
SHARD_BYTES = 200_000  # a tiny model then has several shards


def pack_tiny(
    folder: Path, experts: str = "int8", dense: str = "bf16", family: str = "qwen3_moe", **overrides: object
) -> Path:
    """A tiny model in folder/source, packed into folder/packed."""
    source = make_tiny_checkpoint(folder / "source", family, shards=2, **overrides)  # type: ignore[arg-type]
    pack(source, folder / "packed", PackOptions(experts, dense, 2))
    return folder / "packed"


def logits(folder: Path) -> torch.Tensor:
    return build_engine(folder).decoder.forward(PROMPT, all_logits=True).clone()


@pytest.mark.parametrize("experts", ["int4", "int8", "bf16"])
def test_every_expert_is_one_aligned_extent_that_the_library_reads_too(tmp_path: Path, experts: str) -> None:
    packed = pack_tiny(tmp_path, experts)
    source, tensors = load_file_of(tmp_path / "source"), open_checkpoint(packed).tensors
    manifest = read_manifest(packed)
    assert manifest is not None and manifest.experts.format == experts
    for layer in range(3):
        for expert in range(8):
            at = f"model.layers.{layer}.mlp.experts.{expert}"
            info = tensors[f"{at}.packed"]
            assert info.dtype == "U8" and info.shape == (manifest.experts.extent_bytes,)
            assert info.offset % 4096 == 0 and info.nbytes % 4096 == 0
            with safe_open(open_checkpoint(packed).shards[info.shard], framework="pt") as file:
                extent = file.get_tensor(f"{at}.packed")
            parts = [source[f"{at}.{part}_proj.weight"] for part in ("gate", "up", "down")]
            if experts == "bf16":
                whole = torch.cat([part.flatten().view(torch.uint8) for part in parts])
                assert torch.equal(extent[: len(whole)], whole) and not extent[len(whole) :].any()
            else:
                format = Format[experts.upper()]
                size = native.expert_bytes(format, 64, 96)
                assert not extent[size:].any()
                for got, part in zip(native.unpack_expert(extent[:size], format, 64, 96), parts, strict=True):
                    error = (got - part.float()).norm() / part.float().norm()
                    assert error < (0.11 if experts == "int4" else 0.01)
    rest = {name for name in source if ".experts." not in name}
    for name in rest:
        assert torch.equal(load_file_of(packed)[name], source[name])


def load_file_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bf16_pack_has_the_logits_of_its_source_bit_for_bit(tmp_path: Path, family: str) -> None:
    packed = pack_tiny(tmp_path, "bf16", family=family)
    assert torch.equal(logits(packed), logits(tmp_path / "source"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_bf16_keeps_the_dtype_of_the_source(tmp_path: Path, dtype: torch.dtype) -> None:
    packed = pack_tiny(tmp_path, "bf16", dtype=dtype)
    manifest = read_manifest(packed)
    assert manifest is not None and manifest.experts.format == {2: "f16", 4: "f32"}[dtype.itemsize]
    assert torch.equal(logits(packed), logits(tmp_path / "source"))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dense", ["bf16", "int8"])
def test_an_int8_pack_is_close_to_its_source(tmp_path: Path, family: str, dense: str) -> None:
    packed = pack_tiny(tmp_path, "int8", dense, family)
    got, want = logits(packed), logits(tmp_path / "source")
    error = (got - want).norm() / want.norm()
    assert error < 0.06 and error > 0


@pytest.mark.parametrize("experts", ["int4", "int8", "bf16"])
def test_a_packed_model_has_the_same_tokens_under_every_budget(tmp_path: Path, experts: str) -> None:
    packed = pack_tiny(tmp_path, experts, "int8", "mixtral")
    want = greedy(build_engine(packed), PROMPT, 12)
    for slots, reader in ((2, "direct"), (5, "buffered"), (11, "mmap")):
        assert greedy(build_engine(packed, slots=slots, reader=reader), PROMPT, 12) == want


def test_a_manifest_whose_experts_are_not_those_of_the_config_is_refused(tmp_path: Path) -> None:
    packed = pack_tiny(tmp_path)
    raw = json.loads((packed / MANIFEST_NAME).read_text())
    hidden = raw["experts"]["hidden"]
    raw["experts"]["hidden"] = hidden // 2  # its extents would still be large enough
    (packed / MANIFEST_NAME).write_text(json.dumps(raw))
    message = rf"has experts of {hidden // 2} x .*config.json asks for {hidden} x"
    with pytest.raises(ModelError, match=message):
        build_engine(packed)


def test_the_dense_matrices_of_a_layer_are_packed_under_their_names(tmp_path: Path) -> None:
    packed = pack_tiny(tmp_path, "int4", "int4", "qwen2_moe")
    names = set(open_checkpoint(packed).tensors)
    at = "model.layers.0"
    assert {"model.embed_tokens.weight.int8", "lm_head.weight.int8"} <= names
    assert {f"{at}.self_attn.qkv_proj.weight.int4", f"{at}.self_attn.o_proj.weight.int4"} <= names
    assert {f"{at}.mlp.shared_expert.{part}_proj.weight.int4" for part in ("gate", "up", "down")} <= names
    kept = {f"{at}.mlp.gate.weight", f"{at}.mlp.shared_expert_gate.weight", f"{at}.self_attn.q_proj.bias"}
    assert kept <= names and not any(name.endswith("q_proj.weight") for name in names)
    assert greedy(build_engine(packed), PROMPT, 3)


def test_a_large_matrix_made_in_pieces_is_the_same_as_one_made_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also across q, k and v, which become one matrix."""
    whole = pack_tiny(tmp_path, "int8", "int8")
    monkeypatch.setattr(pack_plan, "PIECE_BYTES", 64 * 2 * 16)  # one tile
    pack(tmp_path / "source", tmp_path / "pieces", PackOptions("int8", "int8", 1))
    a, b = read_manifest(whole), read_manifest(tmp_path / "pieces")
    assert a is not None and b is not None and a.tensors == b.tensors


def test_a_fused_checkpoint_packs_to_the_same_experts(tmp_path: Path) -> None:
    packed = pack_tiny(tmp_path, "int4")
    tensors = load_file_of(tmp_path / "source")
    fused = {name: t for name, t in tensors.items() if ".experts." not in name}
    for layer in range(3):
        at = f"model.layers.{layer}.mlp.experts"
        parts = {
            part: [tensors[f"{at}.{e}.{part}_proj.weight"] for e in range(8)]
            for part in ("gate", "up", "down")
        }
        pairs = zip(parts["gate"], parts["up"], strict=True)
        fused[f"{at}.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in pairs])
        fused[f"{at}.down_proj"] = torch.stack(parts["down"])
    folder = tmp_path / "fused"
    shutil.copytree(tmp_path / "source", folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file(fused, folder / "model.safetensors")
    pack(folder, tmp_path / "packed-fused", PackOptions("int4"))
    a, b = read_manifest(packed), read_manifest(tmp_path / "packed-fused")
    assert a is not None and b is not None
    experts = [{n: c for n, c in m.tensors.items() if n.endswith(".packed")} for m in (a, b)]
    assert experts[0] == experts[1] and len(experts[0]) == 24


def test_the_report_names_sizes_and_the_error_of_each_layer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_tiny_checkpoint(tmp_path / "source", "mixtral")
    assert (
        main(["pack", "--model", str(source), "--output", str(tmp_path / "p"), "--json", "--dense", "int8"])
        == 0
    )
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert [entry["layer"] for entry in report["layer_errors"]] == [0, 1, 2]
    assert all(0.05 < entry["relative_error"] < 0.11 for entry in report["layer_errors"])
    assert report["packed_bytes"] == sum(p.stat().st_size for p in (tmp_path / "p").glob("*.safetensors"))
    assert "relative rms, by layer" in err and 0 < report["dense_error"] < 0.01
    assert main(["pack", "--verify", str(tmp_path / "p")]) == 0
    assert "as they were packed" in capsys.readouterr().out


def test_the_source_stays_as_it_is_and_its_small_files_travel(tmp_path: Path) -> None:
    source = make_tiny_checkpoint(tmp_path / "source")
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in source.iterdir()}
    pack(source, tmp_path / "packed", PackOptions("int4"))
    assert before == {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in source.iterdir()}
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "packed" / name).read_bytes() == before[name][0]


def test_a_snapshot_of_the_hugging_face_cache_keeps_name_and_revision(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--some--Model-1" / "snapshots" / "0123abc"
    pack(make_tiny_checkpoint(snapshot), tmp_path / "packed", PackOptions("int8"))
    manifest = read_manifest(tmp_path / "packed")
    assert manifest is not None
    assert (manifest.source.name, manifest.source.revision) == ("some/Model-1", "0123abc")


# Interrupted


def stop_after(monkeypatch: pytest.MonkeyPatch, shards: int, error: BaseException) -> None:
    """Let `error` happen while shard number `shards` (from 0) is written."""
    write, done = pack_module.write_safetensors, iter(range(100))

    def failing(path: Path, *rest: object) -> None:
        if next(done) == shards:
            path.with_name(f".{path.name}.1.partial").write_bytes(b"half")
            raise error
        write(path, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(pack_module, "write_safetensors", failing)


def test_the_same_command_goes_on_with_the_finished_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack_plan.plan_pack, "__defaults__", (SHARD_BYTES,))
    whole = pack_tiny(tmp_path)
    output = tmp_path / "interrupted"
    with monkeypatch.context() as patch:
        stop_after(patch, 2, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            pack(tmp_path / "source", output, PackOptions("int8"))
    with pytest.raises(CheckpointError, match="incomplete pack; run the same `flashmoe pack` command again"):
        read_manifest(output)
    kept = {path.name: path.stat().st_mtime_ns for path in output.glob("model-*")}
    assert len(kept) == 2
    report = pack(tmp_path / "source", output, PackOptions("int8"))
    assert report.resumed_shards == 2 and report.shards > 3
    assert {name: (output / name).stat().st_mtime_ns for name in kept} == kept
    for path in whole.iterdir():
        assert (output / path.name).read_bytes() == path.read_bytes()
    assert {path.name for path in output.iterdir()} == {path.name for path in whole.iterdir()}


def test_a_finished_shard_of_another_size_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack_plan.plan_pack, "__defaults__", (SHARD_BYTES,))
    source, output = make_tiny_checkpoint(tmp_path / "source"), tmp_path / "packed"
    with monkeypatch.context() as patch:
        stop_after(patch, 2, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            pack(source, output, PackOptions("int8"))
    first = min(output.glob("model-*"))
    first.write_bytes(first.read_bytes()[:-1])
    assert pack(source, output, PackOptions("int8")).resumed_shards == 1
    verify(output)


def test_another_command_does_not_touch_a_pack_that_was_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, output = make_tiny_checkpoint(tmp_path / "source"), tmp_path / "packed"
    with monkeypatch.context() as patch:
        stop_after(patch, 0, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            pack(source, output, PackOptions("int8"))
    with pytest.raises(StorageError, match="another pack: --format was int8, now int4"):
        pack(source, output, PackOptions("int4"))
    other = make_tiny_checkpoint(tmp_path / "other", seed=1)
    with pytest.raises(StorageError, match="another pack: times was"):
        pack(other, output, PackOptions("int8"))
    (output / JOURNAL_NAME).write_text('{"job": 3, "shards": {}}')
    with pytest.raises(StorageError, match="cannot be used .*; remove the folder and pack again"):
        pack(source, output, PackOptions("int8"))


def test_ctrl_c_leaves_one_line_and_a_folder_to_go_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = make_tiny_checkpoint(tmp_path / "source"), tmp_path / "packed"
    command = ["pack", "--model", str(source), "--output", str(output)]
    with monkeypatch.context() as patch:
        stop_after(patch, 0, KeyboardInterrupt())
        assert main(command) == 130
    assert capsys.readouterr().err.splitlines() == [
        f"interrupted; {output} keeps what is finished, the same command goes on there"
    ]
    assert main(["run", "--model", str(output), "--prompt", "x"]) == 1
    assert "is an incomplete pack" in capsys.readouterr().err
    assert main(command) == 0


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_a_pack_killed_at_any_moment_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real kills, each a little later than the one before, until one comes too late."""
    source, output = (
        make_tiny_checkpoint(tmp_path / "source", num_local_experts=48, shards=2),
        tmp_path / "packed",
    )
    code = (
        "import sys; from pathlib import Path; from flashmoe import pack_plan, pack;"
        f"pack_plan.plan_pack.__defaults__ = ({SHARD_BYTES},); print('ready', flush=True);"
        "pack.pack(Path(sys.argv[1]), Path(sys.argv[2]), pack.PackOptions('int8'))"
    )
    kills = 0
    for delay_s in (0.02, 0.1, 0.25, 60.0):
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(source), str(output)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        try:
            assert process.wait(delay_s) == 0
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
            assert not (output / MANIFEST_NAME).exists() or read_manifest(output) is not None
        finally:
            process.stdout.close()
        if (output / MANIFEST_NAME).exists():
            break
    assert kills > 0
    verify(output)


# Refused


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_tiny_checkpoint(tmp_path / "source")


def test_a_full_drive_is_found_before_the_first_byte(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100, 60, 40))
    with pytest.raises(StorageError, match=r"packed needs 1\d\.\d MiB more, its drive has 40 B free"):
        pack(source, tmp_path / "packed", PackOptions())
    assert not (tmp_path / "packed").exists()


def test_an_existing_pack_a_full_folder_a_file_and_the_source_are_refused(
    source: Path, tmp_path: Path
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    (tmp_path / "file").write_text("")
    pack(source, tmp_path / "packed", PackOptions())
    for output, words in (
        (tmp_path / "packed", "holds a packed model already"),
        (tmp_path / "full", "is not empty"),
        (tmp_path / "file", "is a file"),
        (source, "lies in the source"),
        (source / "deeper" / "still", "lies in the source"),
    ):
        with pytest.raises((StorageError, FlashMoEError), match=words):
            pack(source, output, PackOptions())
    with pytest.raises(ConfigError, match="is packed already"):
        pack(tmp_path / "packed", tmp_path / "again", PackOptions())
    assert os.listdir(tmp_path / "full") == ["letter.txt"]


@pytest.mark.parametrize("experts", ["int4", "bf16"])
@pytest.mark.parametrize(
    "name", ["model.layers.1.block_sparse_moe.experts.5.w3.weight", "model.embed_tokens.weight"]
)
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_no_numbers_are_refused_by_name(
    source: Path, tmp_path: Path, experts: str, name: str, value: float
) -> None:
    tensors = load_file(source / "model.safetensors")
    tensors[name][3, 7] = value
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(ModelError, match=rf"model\.safetensors: tensor {name} holds NaN or infinity"):
        pack(source, tmp_path / "packed", PackOptions(experts, "int8" if experts == "int4" else "bf16"))


def test_a_quantised_source_is_refused(source: Path, tmp_path: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(ConfigError, match="awq quantised checkpoints are not supported"):
        pack(source, tmp_path / "packed", PackOptions())


def test_a_drive_that_keeps_something_else_is_found_while_packing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = pack_module.write_safetensors

    def lying(path: Path, *rest: object) -> None:
        write(path, *rest)  # type: ignore[arg-type]
        flip(path, 9000)

    monkeypatch.setattr(pack_module, "write_safetensors", lying)
    with pytest.raises(StorageError, match="did not keep what was written for expert 0 of layer 0"):
        pack(source, tmp_path / "packed", PackOptions("int8"))


@pytest.mark.parametrize(
    "options, words",
    [
        ([], "--output DIR"),
        (["--verify", "x", "--output", "y"], "no place for --output"),
        (["--verify", "x", "--format", "int8"], "no place for --format"),
        (["--output", "x", "--format", "int3"], "invalid choice"),
        (["--output", "x", "--threads", "0"], "whole number"),
        (["--output", "x", "--ram-budget", "1G"], "unrecognized"),
    ],
)
def test_wrong_usage_exits_with_2(options: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["pack", *options])
    assert exit.value.code == 2 and words in capsys.readouterr().err


def flip(path: Path, at: int, bits: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= bits
    path.write_bytes(content)
