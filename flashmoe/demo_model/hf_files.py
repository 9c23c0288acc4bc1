"""The small files of a Hugging Face model folder: config, generation defaults, tokenizer, template, licence.

They come from the base GGUF's metadata and the shapes of the difference, so that no number is written twice.
"""

import json
from importlib.resources import files
from typing import Any

from flashmoe.demo_model.delta import Delta
from flashmoe.demo_model.gguf_base import BaseModel

TOP_K = 8
SPECIAL = 3  # GGUF's token type "control"


def model_config(base: BaseModel, delta: Delta) -> dict[str, Any]:
    """config.json of a MixtralForCausalLM, in the spellings of transformers 4 and 5."""
    rope_theta = base.field("llama.rope.freq_base")
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "vocab_size": base.field("llama.vocab_size"),
        "hidden_size": delta.hidden_size,
        "intermediate_size": delta.neurons(0).shape[1],
        "num_hidden_layers": delta.num_layers,
        "num_attention_heads": base.field("llama.attention.head_count"),
        "num_key_value_heads": base.field("llama.attention.head_count_kv"),
        "head_dim": base.field("llama.rope.dimension_count"),
        "hidden_act": "silu",
        "max_position_embeddings": base.field("llama.context_length"),
        "rms_norm_eps": float(f"{base.field('llama.attention.layer_norm_rms_epsilon'):.6g}"),  # was float32
        "num_local_experts": delta.num_experts,
        "num_experts_per_tok": TOP_K,
        "rope_theta": rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": rope_theta},
        "sliding_window": None,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "use_cache": True,
        "bos_token_id": base.field("tokenizer.ggml.bos_token_id"),
        "eos_token_id": base.field("tokenizer.ggml.eos_token_id"),
        "pad_token_id": base.field("tokenizer.ggml.padding_token_id"),
        "torch_dtype": "bfloat16",
        "dtype": "bfloat16",
    }


def generation_config(base: BaseModel) -> dict[str, Any]:
    """Sampling defaults: temperature and top-p from the base's model card, and a penalty against loops.

    Without the penalty a 135M model repeats itself after a few sentences.
    """
    return {
        "do_sample": True,
        "temperature": 0.2,
        "top_p": 0.9,
        "repetition_penalty": 1.1,
        "bos_token_id": base.field("tokenizer.ggml.bos_token_id"),
        "eos_token_id": base.field("tokenizer.ggml.eos_token_id"),
        "pad_token_id": base.field("tokenizer.ggml.padding_token_id"),
    }


def tokenizer(base: BaseModel) -> dict[str, Any]:
    """tokenizer.json: byte-level BPE that splits digits one by one (in llama.cpp `smollm`)."""
    tokens: list[str] = base.field("tokenizer.ggml.tokens")
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": token_id, "content": tokens[token_id], "special": True} | _MATCH_AS_IT_IS
            for token_id in _special_ids(base)
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,  # the vocabulary lacks 21 bytes that text hardly has; they are dropped
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: token_id for token_id, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in base.field("tokenizer.ggml.merges")],
        },
    }


def tokenizer_config(base: BaseModel) -> dict[str, Any]:
    """tokenizer_config.json, with the chat template and its default system prompt."""
    tokens: list[str] = base.field("tokenizer.ggml.tokens")
    return {
        # Not GPT2Tokenizer: transformers 5 would rebuild that one's pre-tokenizer and join the digits again.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": base.field("llama.context_length"),
        "bos_token": tokens[base.field("tokenizer.ggml.bos_token_id")],
        "eos_token": tokens[base.field("tokenizer.ggml.eos_token_id")],
        "pad_token": tokens[base.field("tokenizer.ggml.padding_token_id")],
        "unk_token": tokens[base.field("tokenizer.ggml.unknown_token_id")],
        "added_tokens_decoder": {
            str(token_id): {"content": tokens[token_id], "special": True} | _MATCH_AS_IT_IS
            for token_id in _special_ids(base)
        },
        "chat_template": base.field("tokenizer.chat_template"),
    }


def small_files(base: BaseModel, config: dict[str, Any]) -> dict[str, bytes]:
    """File name -> content, of everything but the weights."""
    package = files("flashmoe.demo_model")
    return {
        "config.json": _json(config, indent=2),
        "generation_config.json": _json(generation_config(base), indent=2),
        "tokenizer_config.json": _json(tokenizer_config(base), indent=2),
        "tokenizer.json": _json(tokenizer(base)),
        "NOTICE": (package / "NOTICE").read_bytes(),
        "LICENSE": (package / "LICENSE.txt").read_bytes(),
    }


def _json(content: dict[str, Any], indent: int | None = None) -> bytes:
    return json.dumps(content, indent=indent, ensure_ascii=False).encode() + b"\n"


_MATCH_AS_IT_IS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


def _special_ids(base: BaseModel) -> list[int]:
    kinds = base.field("tokenizer.ggml.token_type")
    return [token_id for token_id, kind in enumerate(kinds) if kind == SPECIAL]
