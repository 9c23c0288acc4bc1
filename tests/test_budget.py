"""The RAM budget: the plan adds up, keeps to its figure, and says what is the smallest that works."""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from flashmoe.budget import (
    LATE_PROCESS_BYTES,
    PREFILL_CHUNK,
    SMALLEST_DEFAULT_CONTEXT,
    BudgetPlan,
    Sizes,
    plan_budget,
    workspace_bytes,
)
from flashmoe.config import MAX_DEFAULT_CONTEXT, ModelConfig, parse_model_config
from flashmoe.decoder import Decoder
from flashmoe.errors import BudgetError, ConfigError
from flashmoe.sizes import format_bytes, parse_size
from flashmoe.weights import DenseWeights, LayerWeights, Weight
from kernels.expert_ffn import Addresses
from kernels.native import Format, make_context

MIB = 1 << 20
GIB = 1 << 30


def config_of(**changes: Any) -> ModelConfig:
    """smolmoe's shape: 30 layers of 48 experts, top 8."""
    shape = dict(
        model_type="mixtral", vocab_size=49152, hidden_size=576, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, num_local_experts=48, num_experts_per_tok=8, intermediate_size=128,
        max_position_embeddings=8192, head_dim=64,
    )  # fmt: skip
    return parse_model_config(shape | changes)


def sizes_of(config: ModelConfig, **changes: int) -> Sizes:
    values = dict(
        process_bytes=300 * MIB, dense_bytes=110 * MIB, slot_bytes=440 << 10, expert_bytes=432 << 10,
        experts=config.num_moe_layers * config.num_experts, available_bytes=64 * GIB,
    )  # fmt: skip
    return Sizes(**(values | changes))


def smallest(config: ModelConfig, sizes: Sizes, context: int | None = None) -> int:
    """The smallest workable budget, as a plan of plenty reports it."""
    return plan_budget(config, sizes, 1 << 50, context).smallest_budget_bytes


SHAPES = st.builds(
    config_of,
    num_hidden_layers=st.integers(1, 60),
    num_local_experts=st.sampled_from([8, 48, 128]),
    num_experts_per_tok=st.integers(1, 8),
    hidden_size=st.sampled_from([576, 2048, 4096]),
    max_position_embeddings=st.sampled_from([16, 300, 512, 4096, 131072]),
)
SIZES = st.fixed_dictionaries(
    dict(
        process_bytes=st.integers(1, 2 * GIB),
        dense_bytes=st.integers(1, 8 * GIB),
        slot_bytes=st.integers(4096, 400 * MIB),
    )
)


@settings(deadline=None)
@given(config=SHAPES, chosen=SIZES, spare=st.integers(0, 100 * GIB), context=st.none() | st.integers(16, 300))
def test_a_plan_adds_up_and_keeps_to_its_budget(
    config: ModelConfig, chosen: dict[str, int], spare: int, context: int | None
) -> None:
    context = None if context is None else min(context, config.max_position_embeddings)
    sizes = sizes_of(config, **chosen)
    least = smallest(config, sizes, context)
    plan = plan_budget(config, sizes, least + spare, context)
    parts = (
        plan.process_bytes,
        plan.dense_bytes,
        plan.kv_cache_bytes,
        plan.workspace_bytes,
        plan.slots_bytes,
    )
    assert plan.planned_bytes == sum(parts) <= plan.budget_bytes == least + spare
    assert min(parts) > 0
    assert plan.process_bytes == chosen["process_bytes"] + LATE_PROCESS_BYTES
    assert plan.dense_bytes == chosen["dense_bytes"]
    assert plan.kv_cache_bytes == plan.context * config.kv_bytes_per_token
    assert plan.workspace_bytes == workspace_bytes(config, plan.context)
    assert plan.slots_bytes == plan.slots * chosen["slot_bytes"]
    assert min(config.num_experts_per_tok, sizes.experts) <= plan.slots <= sizes.experts
    assert 1 <= plan.context <= config.max_position_embeddings
    if context is not None:
        assert plan.context == context
    if plan.slots < sizes.experts:  # nothing that another expert could use is left over
        assert plan.budget_bytes - plan.planned_bytes < plan.slot_bytes


@settings(deadline=None)
@given(config=SHAPES, chosen=SIZES, context=st.none() | st.integers(16, 300))
def test_the_smallest_workable_budget_works_and_one_byte_less_does_not(
    config: ModelConfig, chosen: dict[str, int], context: int | None
) -> None:
    context = None if context is None else min(context, config.max_position_embeddings)
    sizes = sizes_of(config, **chosen)
    least = smallest(config, sizes, context)
    plan = plan_budget(config, sizes, least, context)
    assert plan.planned_bytes == least == plan.smallest_budget_bytes
    assert plan.slots == config.num_experts_per_tok
    assert plan.context == (context or min(SMALLEST_DEFAULT_CONTEXT, config.max_position_embeddings))
    with pytest.raises(BudgetError):
        plan_budget(config, sizes, least - 1, context)


@settings(deadline=None)
@given(config=SHAPES, chosen=SIZES, budget=st.integers(1, 10 * MIB))
def test_the_budget_that_a_refusal_suggests_works(
    config: ModelConfig, chosen: dict[str, int], budget: int
) -> None:
    sizes = sizes_of(config, **chosen)
    with pytest.raises(BudgetError) as caught:
        plan_budget(config, sizes, budget, None)
    suggested = re.search(r"try --ram-budget (\w+)$", str(caught.value))
    assert suggested is not None
    asked = parse_size(suggested[1], free_bytes=None)
    plan = plan_budget(config, sizes, asked, None)
    assert 0 <= asked - plan.smallest_budget_bytes < 16 * MIB


def test_a_refusal_names_every_part_and_the_next_step() -> None:
    config = config_of()
    with pytest.raises(BudgetError) as caught:
        plan_budget(config, sizes_of(config), 100 * MIB, None)
    text = str(caught.value)
    least = smallest(config, sizes_of(config))
    parts = {
        "RAM budget": 100 * MIB,
        "is below the": least,
        "process": 300 * MIB + LATE_PROCESS_BYTES,
        "dense weights": 110 * MIB,
        "KV cache for 512 tokens": 512 * config.kv_bytes_per_token,
        "workspace": workspace_bytes(config, 512),
        "8 expert slots": 8 * (440 << 10),
    }
    for name, nbytes in parts.items():
        assert f"{name} {format_bytes(nbytes)}" in text, name
    assert "mixtral" in text and "\n" not in text
    with pytest.raises(BudgetError, match="or a smaller --context$"):
        plan_budget(config, sizes_of(config), 100 * MIB, 8192)


def test_a_context_beyond_the_models_positions_is_refused() -> None:
    config = config_of(max_position_embeddings=4096)
    message = "--context 4097 is more than the 4096 positions of this model"
    with pytest.raises(ConfigError, match=message):
        plan_budget(config, sizes_of(config), 16 * GIB, 4097)
    assert plan_budget(config, sizes_of(config), 16 * GIB, 4096).context == 4096


def test_the_default_context_is_what_model_and_budget_allow() -> None:
    def context(budget: int, positions: int = 131072) -> int:
        config = config_of(max_position_embeddings=positions)
        return plan_budget(config, sizes_of(config), budget, None).context

    config = config_of(max_position_embeddings=131072)
    assert context(64 * GIB) == MAX_DEFAULT_CONTEXT
    assert context(64 * GIB, positions=4096) == 4096
    assert context(64 * GIB, positions=300) == 300  # fewer than the usual least
    assert context(smallest(config, sizes_of(config))) == SMALLEST_DEFAULT_CONTEXT
    between = context(smallest(config, sizes_of(config)) + 200 * MIB)
    assert SMALLEST_DEFAULT_CONTEXT < between < MAX_DEFAULT_CONTEXT


@settings(deadline=None)
@given(spare=st.integers(0, 4 * GIB))
def test_the_default_kv_cache_takes_at_most_a_quarter_of_what_the_fixed_parts_leave(spare: int) -> None:
    config = config_of(max_position_embeddings=131072)
    sizes = sizes_of(config)
    plan = plan_budget(config, sizes, smallest(config, sizes) + spare, None)
    least_kv = SMALLEST_DEFAULT_CONTEXT * config.kv_bytes_per_token
    left = spare + 8 * sizes.slot_bytes
    assert plan.kv_cache_bytes - least_kv <= left / 4
    assert plan.slots >= config.num_experts_per_tok


def test_more_budget_never_buys_fewer_slots_for_one_context() -> None:
    config = config_of()
    sizes = sizes_of(config)
    least = smallest(config, sizes, 2048)
    slots = [plan_budget(config, sizes, least + n * 100_001, 2048).slots for n in range(100)]
    assert slots == sorted(slots) and slots[0] == 8 and slots[-1] == 8 + 99 * 100_001 // sizes.slot_bytes


def test_a_mebibyte_more_never_buys_a_smaller_default_context_or_fewer_slots() -> None:
    config = config_of(max_position_embeddings=131072)
    sizes = sizes_of(config)
    least = smallest(config, sizes)
    plans = [plan_budget(config, sizes, least + n * MIB, None) for n in range(2000)]
    for smaller, larger in zip(plans, plans[1:], strict=False):
        assert smaller.slots <= larger.slots and smaller.context <= larger.context
    assert plans[-1].context == MAX_DEFAULT_CONTEXT and plans[-1].slots == plans[-1].experts


def test_enough_budget_makes_every_expert_resident_and_no_more() -> None:
    config = config_of()
    plan = plan_budget(config, sizes_of(config), 32 * GIB, None)
    assert plan.slots == plan.experts == 30 * 48
    assert plan.warnings == ()


def test_fewer_slots_than_one_token_uses_is_warned_of() -> None:
    config = config_of()
    sizes = sizes_of(config)
    least = smallest(config, sizes, 512)
    cycle = 30 * 8
    assert plan_budget(config, sizes, least, 512).token_cycle_experts == cycle
    (warning,) = plan_budget(config, sizes, least + 100 * sizes.slot_bytes, 512).warnings
    assert "108 slots are fewer than the 240 experts one token uses" in warning
    assert plan_budget(config, sizes, least + (cycle - 8 - 1) * sizes.slot_bytes, 512).warnings
    assert plan_budget(config, sizes, least + (cycle - 8) * sizes.slot_bytes, 512).warnings == ()


@pytest.mark.parametrize("context", [None, 512, 4096])
def test_the_budget_that_the_cliff_warning_names_is_enough_and_hardly_more(context: int | None) -> None:
    """The context may grow with the budget, so that the missing slots alone would not do."""
    config = config_of(max_position_embeddings=131072)
    sizes = sizes_of(config)
    (warning,) = plan_budget(config, sizes, smallest(config, sizes, context) + 40 * MIB, context).warnings
    named = re.search(r"few hits below a budget of ([\d.]+) MiB$", warning)
    assert named is not None
    enough = int(float(named[1])) * MIB
    assert plan_budget(config, sizes, enough, context).warnings == ()
    assert plan_budget(config, sizes, enough - 2 * MIB, context).warnings


def test_a_budget_above_what_the_system_leaves_is_warned_of() -> None:
    config = config_of()
    sizes = sizes_of(config, available_bytes=2 * GIB)
    assert plan_budget(config, sizes, 2 * GIB, None).warnings == ()
    (warning,) = plan_budget(config, sizes, 2 * GIB + 1, None).warnings
    assert "is more than the 2.0 GiB that the system leaves" in warning


def test_both_cliffs_may_be_warned_of_at_once() -> None:
    config = config_of()
    sizes = sizes_of(config, available_bytes=400 * MIB)
    plan = plan_budget(config, sizes, smallest(config, sizes), None)
    assert len(plan.warnings) == 2


def test_a_plan_is_told_to_people_and_to_programs_alike() -> None:
    config = config_of()
    plan = plan_budget(config, sizes_of(config), 1 * GIB, None)
    table = {part: (size, remark) for part, size, remark in plan.rows()}
    assert table["planned"] == (format_bytes(plan.planned_bytes), "of 1.0 GiB")
    assert f"{plan.slots} of 1440 experts" in table["expert slots"][1]
    assert "guesses" not in table["expert slots"][1]
    assert replace(plan, staging_slots=4).rows()[4][2] == table["expert slots"][1] + ", 4 of them for guesses"
    assert f"context of {plan.context} tokens" in table["KV cache"][1]
    values = json.loads(json.dumps(plan.as_dict()))
    assert set(values) == {*BudgetPlan.__slots__, "slots_bytes", "planned_bytes"}
    assert values["planned_bytes"] == plan.planned_bytes and values["slots_bytes"] == plan.slots_bytes


# The workspace against what really is allocated


def peak_allocated(tmp_path: Path, work: Callable[[], object]) -> int:
    """The most bytes of tensors that `work()` has alive at once beyond those before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    trace = tmp_path / "trace.json"
    profiled.export_chrome_trace(str(trace))
    events = [e for e in json.loads(trace.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: float(e["ts"])):
        now += event["args"]["Bytes"]
        most = max(most, now)
    assert events, "the profiler saw no allocation"
    return most


class InMemoryExperts:
    """Stands for the expert cache: every expert resident, all with the same weights."""

    def __init__(self, matrices: list[Tensor]) -> None:
        self.matrices = matrices

    def observe(self, layer: int, *tokens: object) -> None:
        pass

    def stream(self, layer: int, experts: list[int]) -> Iterator[tuple[int, Addresses]]:
        gate, up, down = (matrix.data_ptr() for matrix in self.matrices)
        return ((expert, (gate, up, down)) for expert in experts)


def decoder_of(config: ModelConfig, context: int) -> Decoder:
    """A decoder with weights of zero in bf16, whose layers share them; Mixtral only."""

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.bfloat16)

    d, f, heads = config.hidden_size, config.moe_intermediate_size, config.num_attention_heads
    rows = (heads + 2 * config.num_key_value_heads) * config.head_dim
    layer = LayerWeights(
        input_norm=torch.ones(d), post_attention_norm=torch.ones(d), qkv=Weight.of(zeros(rows, d)),
        qkv_bias=None, o=Weight.of(zeros(d, heads * config.head_dim)), o_bias=None, q_norm=None, k_norm=None,
        router=torch.randn(config.num_experts, d, generator=torch.Generator().manual_seed(0)),
        mlp=None, shared_gate=None,
    )  # fmt: skip
    embedding = Weight.of(torch.ones(config.vocab_size, d, dtype=torch.bfloat16))
    weights = DenseWeights(embedding, torch.ones(d), embedding, [layer] * config.num_hidden_layers)
    experts: Any = InMemoryExperts([zeros(f, d), zeros(f, d), zeros(d, f)])
    return Decoder(config, weights, experts, context, make_context(2), Format.BF16)


def peak_of_the_last_chunk(config: ModelConfig, context: int, tmp_path: Path) -> int:
    """Bytes of temporary tensors while the last chunk of a full context is prefilled."""
    decoder = decoder_of(config, context)
    tokens = min(PREFILL_CHUNK, context)
    decoder.kv_cache.append([0] * (context - tokens))
    of_torch = peak_allocated(tmp_path, lambda: decoder.forward(list(range(tokens))))
    return of_torch + decoder.kernels.workspace_bytes


SHAPES_OF_CHUNKS: dict[str, dict[str, Any]] = {
    "smolmoe": {},
    "widened smolmoe": dict(hidden_size=2048, intermediate_size=768),
    "one wide group": dict(num_attention_heads=16, num_key_value_heads=1),
    "hardly anything but the mask": dict(
        hidden_size=128, num_attention_heads=2, num_key_value_heads=1, num_experts_per_tok=1
    ),
}


@pytest.mark.parametrize("context", [PREFILL_CHUNK, 2048, 8192])
@pytest.mark.parametrize("shape", SHAPES_OF_CHUNKS)
def test_the_last_chunk_of_a_context_stays_within_the_workspace(
    shape: str, context: int, tmp_path: Path
) -> None:
    """All heads' scores at once took seven times the workspace at the end of 8192 tokens.

    The two rotary tables are part of the workspace, but allocated beforehand.
    """
    config = config_of(num_hidden_layers=1, vocab_size=1000, **SHAPES_OF_CHUNKS[shape])
    before = 2 * 4 * context * config.head_dim
    assert peak_of_the_last_chunk(config, context, tmp_path) <= workspace_bytes(config, context) - before
