"""A checkpoint written as GGUF: every weight is where llama.cpp looks for it, bit for bit."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from storage.checkpoint import open_checkpoint
from tests.tiny_models import SPECIAL_TOKENS, make_tiny_checkpoint

gguf = pytest.importorskip("gguf", reason="the converter and its reader need gguf: pip install gguf")
from scripts.gguf_from_checkpoint import ConversionError, convert, write_bf16  # noqa: E402


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("mixtral") / "model", shards=2)


@pytest.fixture(scope="module")
def reader(source: Path) -> Any:
    path = source.with_name("model.gguf")
    write_bf16(source, path, "gpt-2")
    return gguf.GGUFReader(path)


def bits(source: Path, name: str) -> np.ndarray[Any, Any]:
    checkpoint = open_checkpoint(source)
    return np.frombuffer(checkpoint.read_tensor(name), np.uint16).reshape(checkpoint.tensors[name].shape)


def written(reader: Any, name: str) -> Any:
    return next(tensor for tensor in reader.tensors if tensor.name == name)


def as_bits(tensor: Any) -> np.ndarray[Any, Any]:
    assert tensor.tensor_type == gguf.GGMLQuantizationType.BF16
    values: np.ndarray[Any, Any] = tensor.data.view(np.uint16)
    return values


def test_every_tensor_of_the_checkpoint_is_written_once(reader: Any) -> None:
    of_a_layer = {name.split(".", 2)[2] for name in (t.name for t in reader.tensors) if "blk.1." in name}
    attention = {f"attn_{name}.weight" for name in ("norm", "q", "k", "v", "output")}
    experts = {f"ffn_{name}.weight" for name in ("norm", "gate_inp", "gate_exps", "up_exps", "down_exps")}
    assert of_a_layer == attention | experts
    assert len(reader.tensors) == 3 * len(of_a_layer) + 3


@pytest.mark.parametrize(("ours", "theirs"), [("ffn_gate", "w1"), ("ffn_up", "w3"), ("ffn_down", "w2")])
def test_experts_are_stacked_in_order(source: Path, reader: Any, ours: str, theirs: str) -> None:
    stacked = as_bits(written(reader, f"blk.2.{ours}_exps.weight"))
    for expert in range(8):
        name = f"model.layers.2.block_sparse_moe.experts.{expert}.{theirs}.weight"
        assert np.array_equal(stacked[expert], bits(source, name))


@pytest.mark.parametrize(("letter", "heads"), [("q", 4), ("k", 2)])
def test_rotary_pairs_stand_side_by_side(source: Path, reader: Any, letter: str, heads: int) -> None:
    """Dimension i of a head's first half is followed by dimension i of its second half."""
    here = as_bits(written(reader, f"blk.0.attn_{letter}.weight")).reshape(heads, 16, 64)
    there = bits(source, f"model.layers.0.self_attn.{letter}_proj.weight").reshape(heads, 16, 64)
    for i in range(8):
        assert np.array_equal(here[:, 2 * i], there[:, i])
        assert np.array_equal(here[:, 2 * i + 1], there[:, 8 + i])


def test_norms_and_router_are_float32_with_the_same_values(source: Path, reader: Any) -> None:
    for ours, theirs in (("attn_norm", "input_layernorm"), ("ffn_gate_inp", "block_sparse_moe.gate")):
        tensor = written(reader, f"blk.1.{ours}.weight")
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
        expected = bits(source, f"model.layers.1.{theirs}.weight").astype(np.uint32) << 16
        assert np.array_equal(tensor.data.view(np.uint32), expected)


def test_metadata_is_what_the_config_says(reader: Any) -> None:
    expected = {
        "general.architecture": "llama",
        "llama.block_count": 3,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 16,
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 10000.0,
        "llama.expert_count": 8,
        "llama.expert_used_count": 2,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.eos_token_id": 2,
    }
    assert {key: reader.fields[key].contents() for key in expected} == expected


def test_tokens_keep_their_ids_and_special_ones_are_control_tokens(reader: Any) -> None:
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    types = reader.fields["tokenizer.ggml.token_type"].contents()
    assert tokens[:3] == SPECIAL_TOKENS
    assert set(types[:3]) == {int(gguf.TokenType.CONTROL)}
    assert set(types[3:]) == {int(gguf.TokenType.NORMAL)}
    assert all(len(merge.split(" ")) == 2 for merge in reader.fields["tokenizer.ggml.merges"].contents())


def test_another_family_is_refused(tmp_path: Path) -> None:
    qwen = make_tiny_checkpoint(tmp_path / "qwen", "qwen3_moe")
    with pytest.raises(ConversionError, match="only mixtral"):
        list(convert(qwen, tmp_path / "out", ["bf16"], "gpt-2", 1))
    assert not list((tmp_path / "out").glob("*.gguf"))
