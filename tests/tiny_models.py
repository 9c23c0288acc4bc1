"""Random checkpoints of a few hundred kB, with tokenizer and chat template, as Hugging Face folders.

Written with the `safetensors` library and the published names, independent of our own reading code. The rows
of the special tokens are zero, so that a greedy answer never ends by itself, only by a limit or a Ctrl-C.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = [
    "the expert that was used longest ago leaves first",
    "what is the capital of France",
    "user system assistant",
]
SHAPE = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 8, "intermediate_size": 96},
    "qwen3_moe": {
        "num_experts": 8, "moe_intermediate_size": 96, "intermediate_size": 128,
        "head_dim": 16, "norm_topk_prob": True,
    },
    "qwen2_moe": {
        "num_experts": 8, "moe_intermediate_size": 96, "intermediate_size": 128,
        "shared_expert_intermediate_size": 80, "norm_topk_prob": False,
    },
    "olmoe": {"num_experts": 8, "intermediate_size": 96, "norm_topk_prob": False},
}  # fmt: skip


def make_tiny_checkpoint(
    folder: Path,
    family: str = "mixtral",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    shards: int = 1,
    **overrides: Any,
) -> Path:
    """Write a random model of `family` to `folder` and return it; `overrides` change its config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = write_tokenizer(folder)
    eos = tokenizer.token_to_id("<|im_end|>")
    config = {"model_type": family, "vocab_size": tokenizer.get_vocab_size(), "eos_token_id": eos}
    config |= SHAPE | FAMILIES[family] | overrides
    config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", {"eos_token_id": eos, "do_sample": False})
    torch_random = torch.Generator().manual_seed(seed)
    tensors = {name: _random(name, shape, torch_random).to(dtype) for name, shape in _tensors(config)}
    _write_shards(folder, tensors, shards)
    return folder


def write_tokenizer(folder: Path) -> Tokenizer:
    """A byte-level BPE of 300-odd tokens with the ChatML template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"bos_token": None, "eos_token": "<|im_end|>", "chat_template": CHATML}
    _write_json(folder / "tokenizer_config.json", named)
    return tokenizer


def _tensors(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of every tensor, named as the published checkpoints of the family name them."""
    family, d, head = config["model_type"], config["hidden_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    yield "model.embed_tokens.weight", (config["vocab_size"], d)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        yield f"{at}.input_layernorm.weight", (d,)
        yield f"{at}.post_attention_layernorm.weight", (d,)
        for name, rows in (("q", q), ("k", kv), ("v", kv)):
            yield f"{at}.self_attn.{name}_proj.weight", (rows, d)
            if family == "qwen2_moe":
                yield f"{at}.self_attn.{name}_proj.bias", (rows,)
        yield f"{at}.self_attn.o_proj.weight", (d, q)
        if family in ("qwen3_moe", "olmoe"):
            yield f"{at}.self_attn.q_norm.weight", (q if family == "olmoe" else head,)
            yield f"{at}.self_attn.k_norm.weight", (kv if family == "olmoe" else head,)
        if layer in config.get("mlp_only_layers", ()):
            yield from _mlp(f"{at}.mlp", config["intermediate_size"], d)
        else:
            yield from _feed_forward(f"{at}.{'block_sparse_moe' if family == 'mixtral' else 'mlp'}", config)
    yield "model.norm.weight", (d,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (config["vocab_size"], d)


def _feed_forward(block: str, config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    d, mixtral = config["hidden_size"], config["model_type"] == "mixtral"
    experts = config["num_local_experts"] if mixtral else config["num_experts"]
    width = config.get("moe_intermediate_size", config["intermediate_size"])
    gate, up, down = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    yield f"{block}.gate.weight", (experts, d)
    for expert in range(experts):
        yield f"{block}.experts.{expert}.{gate}.weight", (width, d)
        yield f"{block}.experts.{expert}.{up}.weight", (width, d)
        yield f"{block}.experts.{expert}.{down}.weight", (d, width)
    if config["model_type"] == "qwen2_moe":
        shared = config["shared_expert_intermediate_size"]
        yield from _mlp(f"{block}.shared_expert", shared, d)
        yield f"{block}.shared_expert_gate.weight", (1, d)


def _mlp(block: str, width: int, d: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{block}.gate_proj.weight", (width, d)
    yield f"{block}.up_proj.weight", (width, d)
    yield f"{block}.down_proj.weight", (d, width)


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    values = torch.randn(shape, generator=generator)
    if name.endswith("norm.weight"):
        return 1 + values / 10
    if name in ("model.embed_tokens.weight", "lm_head.weight"):
        values[: len(SPECIAL_TOKENS)] = 0
        return values
    return values / shape[-1] ** 0.5


def _write_shards(folder: Path, tensors: dict[str, Tensor], shards: int) -> None:
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return
    weight_map = {}
    for i in range(shards):
        shard = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        names = list(tensors)[i::shards]
        save_file({name: tensors[name] for name in names}, folder / shard, {"format": "pt"})
        weight_map |= dict.fromkeys(names, shard)
    _write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1), "utf-8")
