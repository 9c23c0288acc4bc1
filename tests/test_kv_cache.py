"""The memory of keys and values: what is valid, what is forgotten, and what it costs."""

import torch

from flashmoe.config import ModelConfig, parse_model_config
from flashmoe.kv_cache import KVCache

LAYERS, GROUPS, HEAD = 3, 2, 4


def config() -> ModelConfig:
    return parse_model_config(dict(
        model_type="qwen3_moe", vocab_size=9, hidden_size=8, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=GROUPS, head_dim=HEAD, num_experts=2, num_experts_per_tok=1,
        moe_intermediate_size=4,
    ))  # fmt: skip


def test_truncating_forgets_the_end_and_never_makes_longer() -> None:
    kv_cache = KVCache(config(), context=10)
    kv_cache.advance(6)
    kv_cache.truncate(8)
    assert kv_cache.length == 6
    kv_cache.truncate(2)
    assert kv_cache.length == 2
    kv_cache.truncate(0)
    assert kv_cache.length == 0


def test_layers_do_not_share_memory_and_have_the_layout_that_native_code_expects() -> None:
    kv_cache = KVCache(config(), context=5)
    tensors = [t for layer in range(LAYERS) for t in kv_cache.tensors(layer)]
    assert len({t.untyped_storage().data_ptr() for t in tensors}) == 2 * LAYERS
    assert all(t.shape == (5, GROUPS, HEAD) and t.is_contiguous() for t in tensors)
    assert all(t.dtype == torch.float32 for t in tensors)


def test_its_memory_is_what_the_budget_counts() -> None:
    kv_cache = KVCache(config(), context=12)
    held = sum(t.untyped_storage().nbytes() for t in (*kv_cache._keys, *kv_cache._values))
    assert held == 12 * config().kv_bytes_per_token
