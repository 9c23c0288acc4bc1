"""A widened checkpoint: the same function, whole pages, and nothing left of a failure."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scripts.widen_checkpoint import WidenError, main, widen
from storage.checkpoint import Checkpoint, open_checkpoint

HIDDEN, WIDTH = 48, 20
WIDE_HIDDEN, WIDE_WIDTH = 128, 64  # three matrices of 16 KiB each: experts of whole pages
SHARD_BYTES = 200_000


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random bf16 Mixtral of 2 layers and 4 experts, head size given only by hidden size / heads."""
    transformers = pytest.importorskip(
        "transformers", reason="transformers makes the source and is the oracle"
    )
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=61,
        hidden_size=HIDDEN,
        intermediate_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        rms_norm_eps=1e-2,  # large enough to be missed if it were not scaled
    )
    model = transformers.MixtralForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.mul_(10) if weight.dim() > 1 else weight.add_(torch.randn_like(weight) * 0.3)
            assert weight.dim() > 1 or "norm" in name
    folder = tmp_path_factory.mktemp("narrow") / "model"
    model.bfloat16().save_pretrained(folder)
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "README.md").write_text("not copied")
    return folder


@pytest.fixture(scope="module")
def wide(narrow: Path) -> Path:
    folder = narrow.with_name("wide")
    widen(narrow, folder, WIDE_HIDDEN, WIDE_WIDTH, SHARD_BYTES)
    return folder


def test_widened_model_gives_the_same_logits(narrow: Path, wide: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle")
    ids = torch.randint(0, 61, (1, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before, after = (
            transformers.MixtralForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
            for folder in (narrow, wide)
        )
    assert before.std() > 0.1
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5 * (before.max() - before.min()).item())


def test_everything_beyond_the_old_sizes_is_zero_and_the_rest_unchanged(narrow: Path, wide: Path) -> None:
    old, new = open_checkpoint(narrow), open_checkpoint(wide)
    assert set(old.tensors) == set(new.tensors)
    for name in old.tensors:
        before, after = _bits(old, name), _bits(new, name)
        inside = tuple(slice(size) for size in before.shape)
        if "norm" not in name:
            np.testing.assert_array_equal(after[inside], before)
        after[inside] = 0
        assert not after.any(), name
    assert new.tensors["model.embed_tokens.weight"].shape == (61, WIDE_HIDDEN)


def test_norm_weights_are_float32_since_their_factor_is_no_power_of_two(narrow: Path, wide: Path) -> None:
    old, new = open_checkpoint(narrow), open_checkpoint(wide)
    norms = [name for name in new.tensors if "norm" in name]
    assert len(norms) == 5
    for name in norms:
        before = torch.frombuffer(old.read_tensor(name), dtype=torch.bfloat16).double()
        after = torch.frombuffer(new.read_tensor(name), dtype=torch.float32)[:HIDDEN].double()
        torch.testing.assert_close(after, before * (HIDDEN / WIDE_HIDDEN) ** 0.5, rtol=2**-24, atol=0)
        assert new.tensors[name].dtype == "F32"
    assert {info.dtype for name, info in new.tensors.items() if name not in norms} == {"BF16"}


def test_every_expert_is_one_extent_of_whole_pages_in_one_shard(wide: Path) -> None:
    checkpoint = open_checkpoint(wide)
    assert len(checkpoint.shards) > 1
    for layer in range(2):
        for expert in range(4):
            prefix = f"model.layers.{layer}.block_sparse_moe.experts.{expert}"
            w1, w3, w2 = (checkpoint.tensors[f"{prefix}.{matrix}.weight"] for matrix in ("w1", "w3", "w2"))
            assert w1.offset % 4096 == 0
            assert [w3.offset, w2.offset] == [w1.offset + w1.nbytes, w3.offset + w3.nbytes]
            assert w1.shard == w3.shard == w2.shard


def test_config_says_the_new_sizes_and_the_old_heads(narrow: Path, wide: Path) -> None:
    before, after = (json.loads((folder / "config.json").read_bytes()) for folder in (narrow, wide))
    changed = {key: after[key] for key in after if after[key] != before.get(key)}
    assert changed == {
        "hidden_size": WIDE_HIDDEN,
        "intermediate_size": WIDE_WIDTH,
        "head_dim": HIDDEN // 4,
        "rms_norm_eps": 1e-2 * HIDDEN / WIDE_HIDDEN,
    }


def test_tokenizer_files_are_copied_and_others_are_not(wide: Path) -> None:
    assert (wide / "tokenizer.json").read_text() == '{"version": "1.0"}'
    assert not (wide / "README.md").exists()


def test_the_first_layers_alone_can_be_kept(narrow: Path, tmp_path: Path) -> None:
    widen(narrow, tmp_path / "wide", WIDE_HIDDEN, WIDE_WIDTH, SHARD_BYTES, layers=1)
    names = open_checkpoint(tmp_path / "wide").tensors
    assert not any(name.startswith("model.layers.1.") for name in names)
    assert "lm_head.weight" in names and "model.layers.0.self_attn.q_proj.weight" in names
    assert json.loads((tmp_path / "wide" / "config.json").read_bytes())["num_hidden_layers"] == 1


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (dict(hidden=40), "40 x 64 is narrower than the source's 48 x 20"),
        (dict(width=19), "128 x 19 is narrower"),
        (dict(layers=3), "cannot keep 3 of 2 layers"),
        (dict(layers=0), "cannot keep 0 of 2 layers"),
    ],
)
def test_impossible_sizes_are_refused(
    narrow: Path, tmp_path: Path, sizes: dict[str, int], message: str
) -> None:
    options = dict(hidden=WIDE_HIDDEN, width=WIDE_WIDTH, shard_bytes=SHARD_BYTES) | sizes
    with pytest.raises(WidenError, match=message):
        widen(narrow, tmp_path / "wide", **options)
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_refused_and_kept(narrow: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    with pytest.raises(WidenError, match="exists; delete it or name another folder"):
        widen(narrow, tmp_path, WIDE_HIDDEN, WIDE_WIDTH, SHARD_BYTES)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "qwen3_moe"}, "'qwen3_moe'; only mixtral can be widened"),
        ({"hidden_size": 44}, "hidden size 44, width 20 don't fit"),
        ({"hidden_size": "48"}, "hidden_size is '48', not a positive number"),
        ({"intermediate_size": 18}, "hidden size 48, width 18 don't fit"),
    ],
)
def test_a_source_that_is_not_what_its_config_says_is_refused(
    narrow: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for path in narrow.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    config = json.loads((source / "config.json").read_bytes())
    (source / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(WidenError, match=message):
        widen(source, tmp_path / "wide", WIDE_HIDDEN, WIDE_WIDTH, SHARD_BYTES)
    assert not (tmp_path / "wide").exists()


def test_a_failure_in_the_middle_leaves_nothing(narrow: Path, tmp_path: Path) -> None:
    def interrupt(what: str, done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        widen(narrow, tmp_path / "wide", WIDE_HIDDEN, WIDE_WIDTH, SHARD_BYTES, progress=interrupt)
    assert not list(tmp_path.iterdir())


def test_too_little_room_is_refused_in_one_line(
    narrow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = ["--hidden", "1000000000", "--width", "64"]
    monkeypatch.setattr("sys.argv", ["widen_checkpoint.py", str(narrow), str(tmp_path / "wide"), *sizes])
    with pytest.raises(SystemExit, match="error: cannot write .*too full; needs .* are free"):
        main()
    assert not list(tmp_path.iterdir())


def _bits(checkpoint: Checkpoint, name: str) -> np.ndarray[Any, Any]:
    info = checkpoint.tensors[name]
    dtype = {"BF16": "<u2", "F32": "<u4"}[info.dtype]
    return np.frombuffer(checkpoint.read_tensor(name), dtype).reshape(info.shape).copy()
