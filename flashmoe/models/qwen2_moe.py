"""Qwen2-MoE (Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B): a shared expert behind a sigmoid gate, qkv biases."""

from flashmoe.models.family import FamilySpec

SPEC = FamilySpec(
    model_type="qwen2_moe",
    defaults={
        "num_key_value_heads": 16,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768,
        "qkv_bias": True,
    },
    moe_blocks=("mlp",),
    qkv_bias_key="qkv_bias",
    shared_expert=True,
    sliding_window="layer_types",
)
