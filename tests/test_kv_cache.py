"""Keys and values of the tokens so far: what is valid, what is forgotten, and what it costs."""

import pytest
import torch
from torch import Tensor

from flashmoe.config import ModelConfig, parse_model_config
from flashmoe.kv_cache import KVCache

LAYERS, GROUPS, HEAD = 3, 2, 4


def config() -> ModelConfig:
    return parse_model_config(dict(
        model_type="qwen3_moe", vocab_size=9, hidden_size=8, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=GROUPS, head_dim=HEAD, num_experts=2, num_experts_per_tok=1,
        moe_intermediate_size=4,
    ))  # fmt: skip


def tokens(begin: int, end: int) -> Tensor:
    """Entries [T, G, d] that show which position they belong to."""
    return torch.arange(begin, end, dtype=torch.float32)[:, None, None].repeat(1, GROUPS, HEAD)


def append_to_all(kv_cache: KVCache, begin: int, end: int) -> None:
    for layer in range(LAYERS):
        kv_cache.append(layer, tokens(begin, end) + 100 * layer, -tokens(begin, end))
    kv_cache.advance(end - begin)


def test_an_appended_token_is_seen_behind_the_earlier_ones() -> None:
    kv_cache = KVCache(config(), context=10)
    append_to_all(kv_cache, 0, 3)
    keys, values = kv_cache.append(1, tokens(3, 5) + 100, -tokens(3, 5))
    assert torch.equal(keys, tokens(0, 5) + 100) and torch.equal(values, -tokens(0, 5))


def test_tokens_count_only_once_every_layer_has_them() -> None:
    """A layer that fails leaves the KV cache as it was: the next try writes over the half-finished tokens."""
    kv_cache = KVCache(config(), context=10)
    append_to_all(kv_cache, 0, 3)
    kv_cache.append(0, tokens(50, 54), tokens(50, 54))
    assert kv_cache.length == 3
    keys, values = kv_cache.append(0, tokens(3, 4), -tokens(3, 4))
    assert torch.equal(keys, tokens(0, 4)) and torch.equal(values, -tokens(0, 4))


def test_truncating_forgets_the_end_and_never_makes_longer() -> None:
    kv_cache = KVCache(config(), context=10)
    append_to_all(kv_cache, 0, 6)
    kv_cache.truncate(8)
    assert kv_cache.length == 6
    kv_cache.truncate(2)
    assert kv_cache.length == 2
    keys, _ = kv_cache.append(0, tokens(7, 8), tokens(7, 8))
    assert torch.equal(keys, torch.cat((tokens(0, 2), tokens(7, 8))))
    kv_cache.truncate(0)
    assert kv_cache.length == 0


def test_the_context_can_be_filled_to_its_last_token_and_no_further() -> None:
    kv_cache = KVCache(config(), context=5)
    append_to_all(kv_cache, 0, 4)
    append_to_all(kv_cache, 4, 5)
    assert kv_cache.length == kv_cache.context == 5
    for end in (6, 7):  # a single token would be broadcast away without a word
        with pytest.raises(AssertionError, match="more tokens than the context holds"):
            kv_cache.append(0, tokens(5, end), tokens(5, end))


def test_layers_do_not_share_memory() -> None:
    kv_cache = KVCache(config(), context=4)
    append_to_all(kv_cache, 0, 2)
    keys, values = zip(
        *(kv_cache.append(layer, tokens(2, 3), tokens(2, 3)) for layer in range(LAYERS)), strict=True
    )
    assert len({t.untyped_storage().data_ptr() for t in (*keys, *values)}) == 2 * LAYERS
    assert [float(k[0, 0, 0]) for k in keys] == [0.0, 100.0, 200.0]


def test_strides_and_bits_do_not_depend_on_the_context() -> None:
    views = []
    for context in (7, 1000):
        kv_cache = KVCache(config(), context)
        append_to_all(kv_cache, 0, 3)
        views.append(kv_cache.append(2, tokens(3, 7), tokens(3, 7)))
    for short, long in zip(*views, strict=True):
        assert short.stride() == long.stride() and torch.equal(short, long)


def test_its_memory_is_what_the_budget_counts() -> None:
    kv_cache = KVCache(config(), context=12)
    held = sum(t.untyped_storage().nbytes() for t in (*kv_cache._keys, *kv_cache._values))
    assert held == 12 * config().kv_bytes_per_token
