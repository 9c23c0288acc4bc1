"""What a user, a download or a drive can break: one clear line each, and nothing is lost."""

import errno
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import make_tiny_checkpoint

from flashmoe import LLM
from flashmoe.errors import BudgetError, ConfigError, ModelError, TokenizerError
from storage.storage_errors import CheckpointError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_tiny_checkpoint(tmp_path / "model", shards=2)


def open_model(folder: Path, **options: object) -> LLM:
    return LLM(folder, **{"ram_budget": "8G", "context": 64, **options})  # type: ignore[arg-type]


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def change_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_truncated_shard_is_named_with_both_sizes(folder: Path) -> None:
    shard = shards(folder)[1]
    whole = shard.stat().st_size
    with shard.open("r+b") as file:
        file.truncate(whole - 1000)
    with pytest.raises(CheckpointError, match=rf"(?s){shard.name}.*\d") as caught:
        open_model(folder)
    assert str(whole - 1000) in str(caught.value)


def test_a_missing_shard_is_named(folder: Path) -> None:
    shard = shards(folder)[0]
    shard.unlink()
    with pytest.raises(CheckpointError, match=shard.name):
        open_model(folder)


def test_a_folder_without_weights_says_what_it_lacks(folder: Path) -> None:
    for file in [*shards(folder), folder / "model.safetensors.index.json"]:
        file.unlink()
    with pytest.raises(CheckpointError, match="safetensors"):
        open_model(folder)


def test_a_tensor_of_a_wrong_dtype_is_named_with_the_supported_ones(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.block_sparse_moe.experts.3.w1.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"experts\.3\.w1.*F8_E4M3.*BF16"):
        open_model(folder)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.2.self_attn.o_proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"layers\.2\.self_attn\.o_proj"):
        open_model(folder)


def test_a_config_that_does_not_fit_the_weights_is_a_clear_error(folder: Path) -> None:
    change_config(folder, intermediate_size=95)
    with pytest.raises(ModelError, match=r"\[96, 64\].*\[95, 64\]"):
        open_model(folder)


def test_an_unknown_architecture_names_the_supported_ones(folder: Path) -> None:
    change_config(folder, model_type="llama")
    with pytest.raises(ConfigError, match="'llama'.*mixtral.*olmoe.*qwen2_moe.*qwen3_moe"):
        open_model(folder)


def test_a_budget_too_small_names_the_smallest_that_works_and_that_one_works(folder: Path) -> None:
    with pytest.raises(BudgetError, match=r"try --ram-budget \d+M") as caught:
        open_model(folder, ram_budget="100M")
    smallest = str(caught.value).rsplit("--ram-budget ", 1)[1].split()[0]
    # this process grew a little since then, and counts: a few MiB more
    with open_model(folder, ram_budget=f"{int(smallest[:-1]) + 64}M") as llm:
        assert llm.generate("what", max_tokens=3).stats.decode_tokens == 3


@pytest.mark.parametrize("budget", ["16Q", "lots", "-3G", "", "0", "nan", "1e400G", "101%%"])
def test_a_nonsense_budget_is_refused_with_an_example(folder: Path, budget: str) -> None:
    with pytest.raises(BudgetError, match="16G"):
        open_model(folder, ram_budget=budget)


def test_an_unknown_policy_names_the_known_ones(folder: Path) -> None:
    with pytest.raises(ConfigError, match="'clairvoyant'.*lru, lfu"):
        open_model(folder, policy="clairvoyant")


def test_a_missing_tokenizer_is_named(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        open_model(folder)


def test_a_tokenizer_of_another_model_is_noticed(folder: Path) -> None:
    change_config(folder, vocab_size=200)
    weights = {}
    for shard in shards(folder):
        weights |= load_file(shard)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = weights[name][:200].contiguous()
    (folder / "model.safetensors.index.json").unlink()
    for shard in shards(folder):
        shard.unlink()
    save_file(weights, folder / "model.safetensors")
    with open_model(folder) as llm, pytest.raises(ModelError, match="do not belong together"):
        llm.generate("what is the capital of France, the expert that was used longest ago leaves first")


def test_weights_that_make_no_numbers_are_an_error_and_not_a_token(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"].fill_(float("nan"))
    save_file(tensors, folder / "model.safetensors")
    with open_model(folder) as llm, pytest.raises(ModelError, match="(?i)nan"):
        llm.generate("what")


def test_memory_that_the_system_refuses_is_a_budget_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(nbytes: int) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr("flashmoe.expert_cache.allocate_aligned", refuse)
    with pytest.raises(BudgetError, match="does not give.*smaller --ram-budget"):
        open_model(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json"])
def test_a_folder_in_the_place_of_a_file_is_a_clear_error(folder: Path, name: str) -> None:
    (folder / name).unlink()
    (folder / name).mkdir()
    with pytest.raises((ConfigError, TokenizerError), match=name):
        open_model(folder)


def test_a_file_that_may_not_be_read_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As root everything may be read, so the refusal is made here."""
    real = Path.read_text

    def read_text(path: Path, *args: str) -> str:
        if path.name == "config.json":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *args)

    monkeypatch.setattr(Path, "read_text", read_text)
    with pytest.raises(ConfigError, match=r"config\.json cannot be read: Permission denied"):
        open_model(folder)
