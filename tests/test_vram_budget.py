"""The VRAM plan: what it buys, and what it refuses."""

import dataclasses

import pytest

from flashmoe.budget import Sizes, plan_budget
from flashmoe.config import ModelConfig, RunConfig, parse_model_config
from flashmoe.errors import BudgetError, ConfigError
from flashmoe.vram_budget import ATTENTION_SPLIT, DRIVER_BYTES, gpu_kv_bytes, plan_vram

MIB = 1 << 20
DENSE, SLOT, EXPERTS = 1200 * MIB, 3 * MIB, 48 * 128


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    """Qwen3-30B-A3B's shape."""
    return parse_model_config({
        "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048, "num_hidden_layers": 48,
        "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
        "num_experts_per_tok": 8, "moe_intermediate_size": 768, "intermediate_size": 6144,
        "norm_topk_prob": True, "max_position_embeddings": 40960, "hidden_act": "silu",
    })  # fmt: skip


def test_a_plan_never_exceeds_its_budget_and_a_larger_one_buys_no_less(config: ModelConfig) -> None:
    before = None
    for mib in range(5000, 24000, 777):
        plan = plan_vram(config, DENSE, SLOT, EXPERTS, mib * MIB, None)
        assert plan.planned_bytes <= mib * MIB
        assert 2 * config.num_experts_per_tok <= plan.slots <= EXPERTS
        assert plan.spare_slots < plan.slots
        if before is not None:
            assert plan.slots >= before.slots and plan.context >= before.context
        before = plan


def test_all_experts_leave_no_slot_to_pass_through(config: ModelConfig) -> None:
    plan = plan_vram(config, DENSE, SLOT, EXPERTS, 60 << 30, 4096)
    assert plan.holds_all and plan.slots == EXPERTS and plan.spare_slots == 0 and plan.context == 4096


def test_too_small_a_budget_is_refused_with_one_that_works(config: ModelConfig) -> None:
    message = r"VRAM budget 2\.0 GiB is below .* try --vram-budget (\d+)M"
    with pytest.raises(BudgetError, match=message) as caught:
        plan_vram(config, DENSE, SLOT, EXPERTS, 2 << 30, None)
    advised = int(str(caught.value).split("--vram-budget ")[1].split("M")[0])
    assert plan_vram(config, DENSE, SLOT, EXPERTS, advised * MIB, None).slots >= 16
    with pytest.raises(BudgetError):
        plan_vram(config, DENSE, SLOT, EXPERTS, (advised - 32) * MIB, None)


@pytest.mark.parametrize("top_k", [1, 2, 8])
def test_the_smallest_budget_has_a_slot_for_what_is_on_its_way(config: ModelConfig, top_k: int) -> None:
    """With top-2 it had none, and the cache could not begin."""
    small = dataclasses.replace(config, num_experts_per_tok=top_k)
    with pytest.raises(BudgetError) as caught:
        plan_vram(small, DENSE, SLOT, EXPERTS, 2 << 30, 512)
    advised = int(str(caught.value).split("--vram-budget ")[1].split("M")[0])
    plan = plan_vram(small, DENSE, SLOT, EXPERTS, advised * MIB, 512)
    assert plan.spare_slots >= 1 and plan.slots - plan.spare_slots >= top_k


def test_a_context_beyond_the_models_positions_is_refused(config: ModelConfig) -> None:
    with pytest.raises(ConfigError, match="--context 50000 is more than the 40960 positions"):
        plan_vram(config, DENSE, SLOT, EXPERTS, 60 << 30, 50000)


def test_keys_and_values_take_half_of_what_they_take_on_the_cpu(config: ModelConfig) -> None:
    page = 64 * config.kv_bytes_per_token // 2
    assert gpu_kv_bytes(config, 1024, 1) == 17 * page  # one for the end of a context in the middle of a page
    assert gpu_kv_bytes(config, 1000, 8) == 24 * page


@pytest.mark.parametrize("budget", [6 << 30, 12 << 30, 60 << 30])
def test_further_conversations_take_a_tenth_of_what_is_left_and_none_of_the_context(
    budget: int, config: ModelConfig
) -> None:
    alone, eight = (plan_vram(config, DENSE, SLOT, EXPERTS, budget, None, n) for n in (1, 8))
    assert alone.kv_tokens == alone.context
    assert eight.context <= eight.kv_tokens <= 8 * eight.context
    assert eight.planned_bytes <= budget and eight.slots > 0.8 * alone.slots
    per_token = config.kv_bytes_per_token // 2
    assert (eight.kv_tokens - eight.context) * per_token <= 0.1 * (budget - eight.driver_bytes)
    if budget == 60 << 30:
        assert eight.kv_tokens == 8 * eight.context and eight.holds_all


def test_the_plan_knows_how_many_keys_a_program_of_attention_sees() -> None:
    pytest.importorskip("triton")
    from kernels.triton_attention import SPLIT_KEYS

    assert ATTENTION_SPLIT == SPLIT_KEYS


def test_the_rows_add_up_to_what_is_planned(config: ModelConfig) -> None:
    plan = plan_vram(config, DENSE, SLOT, EXPERTS, 12 << 30, 2048)
    parts = (plan.dense_bytes, plan.kv_cache_bytes, plan.workspace_bytes, plan.slots_bytes)
    assert plan.planned_bytes == DRIVER_BYTES + sum(parts) == plan.as_dict()["planned_bytes"]
    assert [row[0] for row in plan.rows()][-1] == "planned"


def test_the_ram_of_a_run_on_a_gpu_holds_neither_dense_weights_nor_kv_cache(config: ModelConfig) -> None:
    vram = plan_vram(config, DENSE, SLOT, EXPERTS, 12 << 30, 2048)
    sizes = Sizes(700 * MIB, 0, SLOT, SLOT, EXPERTS, 32 << 30, on_gpu=True)
    plan = dataclasses.replace(plan_budget(config, sizes, 8 << 30, vram.context), vram=vram)
    assert plan.kv_cache_bytes == plan.dense_bytes == 0
    assert plan.slots * SLOT > 6 << 30
    names = [row[0] for row in plan.rows()]
    assert names.count("planned") == 2 and names.count("dense weights") == 1


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"device": "tpu"}, "unknown device 'tpu'"),
        ({"vram_budget": 8}, "vram_budget is 8, not text"),
        ({"cpu_experts": "some"}, "--cpu-experts 'some'"),
    ],
)
def test_an_impossible_option_is_named(option: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RunConfig(**option)  # type: ignore[arg-type]
