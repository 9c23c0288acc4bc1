"""What distinguishes one model family from another, as data: tensor names, router, attention, defaults.

A family file holds one `FamilySpec` and no code that loops. Knows nothing about files or tensors.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class FamilySpec:
    """One family, with the names it uses on disk and the defaults its config.json may leave out.

    Names are tried in the order given: the published checkpoints' spelling first, then the one that
    transformers 5 uses in memory and writes when a state dict is saved as it is.
    """

    model_type: str
    defaults: Mapping[str, Any]
    moe_blocks: tuple[str, ...]  # "mlp" in model.layers.0.mlp.experts…
    expert_projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    always_renormalise: bool = False  # top-k weights sum to one whatever norm_topk_prob says
    qk_norm: Literal["none", "head", "full"] = "none"  # RMS norm of each head, or of all heads together
    qkv_bias_key: str | None = None  # config key that switches the biases of q, k and v
    o_bias_key: str | None = None
    shared_expert: bool = False
    sliding_window: Literal["none", "all", "flag", "layer_types"] = "none"
    width_keys: tuple[str, ...] = ("moe_intermediate_size",)  # config keys that hold the expert width
