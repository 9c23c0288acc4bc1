"""Our decoder against transformers, the oracle: random tiny models of each family in fp32."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import build_engine, greedy

transformers = pytest.importorskip("transformers", reason="transformers is the oracle; pip install -e .[dev]")

SHAPE = dict(
    vocab_size=97, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=256, num_experts_per_tok=2, tie_word_embeddings=False,
)  # fmt: skip
MIXTRAL = SHAPE | dict(intermediate_size=48, num_local_experts=6)
QWEN = SHAPE | dict(moe_intermediate_size=24, intermediate_size=40, num_experts=7, norm_topk_prob=True)
QWEN2 = QWEN | dict(shared_expert_intermediate_size=20)
OLMOE = SHAPE | dict(intermediate_size=24, num_experts=7)
YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=64)
LLAMA3 = dict(rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=64)  # fmt: skip

VARIATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", MIXTRAL),
    "mixtral tied": ("Mixtral", MIXTRAL | dict(tie_word_embeddings=True)),
    "mixtral sliding window": ("Mixtral", MIXTRAL | dict(sliding_window=7)),
    "mixtral one kv head": ("Mixtral", MIXTRAL | dict(num_key_value_heads=1)),
    "mixtral head size of its own": ("Mixtral", MIXTRAL | dict(head_dim=24)),
    "mixtral linear rope": (
        "Mixtral", MIXTRAL | dict(rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=2.0))),
    "qwen3": ("Qwen3Moe", QWEN | dict(head_dim=16)),
    "qwen3 no renormalisation": ("Qwen3Moe", QWEN | dict(head_dim=8, norm_topk_prob=False)),
    "qwen3 biases": ("Qwen3Moe", QWEN | dict(head_dim=8, attention_bias=True)),
    "qwen3 dense layers": ("Qwen3Moe", QWEN | dict(head_dim=8, mlp_only_layers=[1])),
    "qwen3 every second layer sparse": ("Qwen3Moe", QWEN | dict(head_dim=8, decoder_sparse_step=2)),
    "qwen3 sliding window": ("Qwen3Moe", QWEN | dict(head_dim=8, use_sliding_window=True, sliding_window=5)),
    "qwen3 tied, yarn": ("Qwen3Moe", QWEN | dict(head_dim=8, tie_word_embeddings=True, rope_parameters=YARN)),
    "qwen2": ("Qwen2Moe", QWEN2),
    "qwen2 unbiased": ("Qwen2Moe", QWEN2 | dict(qkv_bias=False)),
    "qwen2 sliding window": (
        "Qwen2Moe",
        QWEN2 | dict(use_sliding_window=True, sliding_window=5, max_window_layers=3),
    ),
    "qwen2 no renormalisation": ("Qwen2Moe", QWEN2 | dict(norm_topk_prob=False)),
    "olmoe": ("Olmoe", OLMOE),
    "olmoe clipped": ("Olmoe", OLMOE | dict(clip_qkv=0.05)),
    "olmoe renormalised": ("Olmoe", OLMOE | dict(norm_topk_prob=True, num_key_value_heads=4)),
    "olmoe biases, llama3 rope": ("Olmoe", OLMOE | dict(attention_bias=True, rope_parameters=LLAMA3)),
}  # fmt: skip


def save_random_model(folder: Path, family: str, config: dict[str, Any]) -> Any:
    """A model whose layers all matter: weights far larger than the default init, norms and biases off their
    defaults."""
    torch.manual_seed(0)
    made = getattr(transformers, f"{family}Config")(**config)
    model = getattr(transformers, f"{family}ForCausalLM")(made).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("norm.weight"):
                weight.copy_(1 + 0.3 * torch.randn_like(weight))
            else:
                weight.normal_(std=0.3 if weight.ndim > 1 else 0.1)
    model.save_pretrained(folder)
    return model


@pytest.fixture(params=VARIATIONS, scope="module")
def variation(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    family, config = VARIATIONS[request.param]
    folder = tmp_path_factory.mktemp("model")
    return folder, save_random_model(folder, family, config)


def reference_logits(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([ids])).logits[0]
    return logits


def relative_difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference over the range of the oracle's logits."""
    return float((ours - theirs).abs().max() / (theirs.max() - theirs.min()))


def test_logits_equal_those_of_transformers(variation: tuple[Path, Any]) -> None:
    folder, model = variation
    ids = torch.randint(97, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    expected = reference_logits(model, ids)
    engine = build_engine(folder)
    assert relative_difference(engine.decoder.forward(ids, all_logits=True), expected) <= 1e-4
    engine.reset()
    prefill = engine.prefill(ids[:30])  # and the same through prefill and single steps
    steps = torch.stack([prefill, *(engine.decode_one_token(i) for i in ids[30:])])
    assert relative_difference(steps, expected[29:]) <= 1e-4


def test_greedy_text_equals_that_of_transformers_for_64_tokens(variation: tuple[Path, Any]) -> None:
    folder, model = variation
    prompt = [5, 80, 33, 2, 61]
    with torch.no_grad():
        theirs = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False, max_new_tokens=64, min_new_tokens=64, eos_token_id=None, pad_token_id=0,
            repetition_penalty=1.0,
        )[0, len(prompt) :].tolist()  # fmt: skip
    assert greedy(build_engine(folder, slots=3), prompt, 64) == theirs


def test_logits_do_not_depend_on_the_spelling_of_config_json(tmp_path: Path) -> None:
    save_random_model(tmp_path, "Qwen3Moe", QWEN | dict(head_dim=8, rope_parameters=YARN))
    new = json.loads((tmp_path / "config.json").read_text())
    expected = build_engine(tmp_path).prefill(list(range(20)))
    old = {k: v for k, v in new.items() if k not in ("rope_parameters", "num_local_experts", "dtype")}
    scaling = dict(type="yarn", factor=4.0, original_max_position_embeddings=64)
    old |= dict(num_experts=7, torch_dtype="float32", rope_theta=1e4, rope_scaling=scaling)
    assert old != new
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert torch.equal(build_engine(tmp_path).prefill(list(range(20))), expected)


@pytest.mark.parametrize(
    "family, config", [("Mixtral", MIXTRAL), ("Qwen3Moe", QWEN | dict(head_dim=8)), ("Olmoe", OLMOE)]
)
def test_fused_expert_tensors_give_the_same_logits_as_separate_ones(
    family: str, config: dict[str, Any], tmp_path: Path
) -> None:
    """transformers 5 keeps all experts of a layer in one tensor; a saved state dict has it so on disk."""
    from safetensors.torch import save_file

    separate, fused = tmp_path / "separate", tmp_path / "fused"
    model = save_random_model(separate, family, config)
    fused.mkdir()
    (fused / "config.json").write_bytes((separate / "config.json").read_bytes())
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    assert any(name.endswith("experts.gate_up_proj") for name in tensors)
    save_file(tensors, fused / "model.safetensors")
    ids = list(range(30))
    assert torch.equal(build_engine(fused).prefill(ids), build_engine(separate).prefill(ids))
