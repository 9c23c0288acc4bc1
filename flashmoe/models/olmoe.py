"""OLMoE (arXiv 2409.02060): RMS norm over the full width of q and of k, optional clipping of q, k and v."""

from flashmoe.models.family import FamilySpec

SPEC = FamilySpec(
    model_type="olmoe",
    defaults={"rms_norm_eps": 1e-5, "max_position_embeddings": 4096},
    moe_blocks=("mlp",),
    qk_norm="full",
    qkv_bias_key="attention_bias",
    o_bias_key="attention_bias",
    width_keys=("intermediate_size",),
)
