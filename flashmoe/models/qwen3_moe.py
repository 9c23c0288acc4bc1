"""Qwen3-MoE (arXiv 2505.09388): RMS norm on every query and key head, no shared expert."""

from flashmoe.models.family import FamilySpec

SPEC = FamilySpec(
    model_type="qwen3_moe",
    defaults={"num_key_value_heads": 4, "rms_norm_eps": 1e-6, "max_position_embeddings": 32768},
    moe_blocks=("mlp",),
    qk_norm="head",
    qkv_bias_key="attention_bias",
    o_bias_key="attention_bias",
    sliding_window="flag",
)
