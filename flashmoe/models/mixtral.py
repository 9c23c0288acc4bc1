"""Mixtral (arXiv 2401.04088): softmax over the chosen logits, no shared expert, optional sliding window."""

from flashmoe.models.family import FamilySpec

SPEC = FamilySpec(
    model_type="mixtral",
    defaults={
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "max_position_embeddings": 131072,
    },
    moe_blocks=("block_sparse_moe", "mlp"),
    expert_projections=("w1", "w3", "w2"),
    always_renormalise=True,
    sliding_window="all",
    width_keys=("intermediate_size",),
)
