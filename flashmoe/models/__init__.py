"""The model families we serve, one declarative file each."""

from flashmoe.models import mixtral, olmoe, qwen2_moe, qwen3_moe
from flashmoe.models.family import FamilySpec

FAMILIES: dict[str, FamilySpec] = {
    module.SPEC.model_type: module.SPEC for module in (mixtral, olmoe, qwen2_moe, qwen3_moe)
}
