"""The RAM budget: one number for the whole process, planned before anything is allocated.

budget = process (interpreter, libraries) + dense weights + KV cache for the context + workspace + expert
slots. Knows sizes only; refuses with the smallest budget that works, and warns at the two cliffs: below one
token cycle a cache hardly hits, above what the system leaves us paging undoes it.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from flashmoe.config import MAX_DEFAULT_CONTEXT, ModelConfig
from flashmoe.errors import BudgetError, ConfigError
from flashmoe.sizes import format_bytes

PREFILL_CHUNK = 512  # tokens; the same for every budget, or the bits of a long prompt would depend on it
SMALLEST_DEFAULT_CONTEXT = 512
# Share of what is left after the fixed parts that the KV cache may take when the user names no context.
KV_SHARE = 0.25
# Library code and buffers touched only after planning (math library threads, allocator slack).
LATE_PROCESS_BYTES = 96 << 20
LINEAR_SCRATCH_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the plan is made of, in bytes unless said."""

    process_bytes: int
    dense_bytes: int
    slot_bytes: int
    expert_bytes: int
    experts: int  # routed experts of all layers
    available_bytes: int  # what the system, or the process's cgroup, leaves for this process in all


@dataclass(frozen=True, slots=True)
class BudgetPlan:
    """What a budget buys. Bytes unless said."""

    budget_bytes: int
    process_bytes: int
    dense_bytes: int
    kv_cache_bytes: int
    workspace_bytes: int
    slot_bytes: int
    slots: int
    experts: int
    expert_bytes: int
    context: int  # tokens
    smallest_budget_bytes: int
    token_cycle_experts: int  # layers x top-k: the experts one token uses
    warnings: tuple[str, ...]

    @property
    def slots_bytes(self) -> int:
        return self.slots * self.slot_bytes

    @property
    def planned_bytes(self) -> int:
        fixed = self.process_bytes + self.dense_bytes + self.kv_cache_bytes + self.workspace_bytes
        return fixed + self.slots_bytes

    def rows(self) -> list[tuple[str, str, str]]:
        """(part, size, remark) for people."""
        share = self.slots / self.experts
        return [
            ("process", format_bytes(self.process_bytes), "interpreter and libraries"),
            ("dense weights", format_bytes(self.dense_bytes), "attention, router, embeddings"),
            ("KV cache", format_bytes(self.kv_cache_bytes), f"context of {self.context} tokens, fp32"),
            ("workspace", format_bytes(self.workspace_bytes), 
             f"prefill, {min(PREFILL_CHUNK, self.context)} tokens at a time"),
            ("expert slots", format_bytes(self.slots_bytes),
             f"{self.slots} of {self.experts} experts ({share:.0%}), {format_bytes(self.slot_bytes)} each"),
            ("planned", format_bytes(self.planned_bytes), f"of {format_bytes(self.budget_bytes)}"),
        ]  # fmt: skip

    def as_dict(self) -> Mapping[str, Any]:
        """For programs: every field, and the two sums."""
        return {**asdict(self), "slots_bytes": self.slots_bytes, "planned_bytes": self.planned_bytes}


def plan_budget(config: ModelConfig, sizes: Sizes, budget_bytes: int, context: int | None) -> BudgetPlan:
    """Divide the budget; BudgetError names the smallest workable figure and its parts.

    `context` None: as many tokens as the model allows, at most 8192, within a quarter of what the fixed parts
    leave.
    """
    if context is not None and context > config.max_position_embeddings:
        raise ConfigError(
            f"--context {context} is more than the {config.max_position_embeddings} positions of this model"
        )
    process = sizes.process_bytes + LATE_PROCESS_BYTES
    least_slots = min(config.num_experts_per_tok, sizes.experts)
    least_context = context or min(SMALLEST_DEFAULT_CONTEXT, config.max_position_embeddings)

    def fixed(tokens: int) -> int:
        return (
            process + sizes.dense_bytes + tokens * config.kv_bytes_per_token + workspace_bytes(config, tokens)
        )

    smallest = fixed(least_context) + least_slots * sizes.slot_bytes
    if budget_bytes < smallest:
        raise BudgetError(
            f"RAM budget {format_bytes(budget_bytes)} is below the {format_bytes(smallest)} that this"
            f" {config.model_type} model needs: process {format_bytes(process)}, dense weights"
            f" {format_bytes(sizes.dense_bytes)}, KV cache for {least_context} tokens"
            f" {format_bytes(least_context * config.kv_bytes_per_token)}, workspace"
            f" {format_bytes(workspace_bytes(config, least_context))}, {least_slots} expert slots"
            f" {format_bytes(least_slots * sizes.slot_bytes)}; try --ram-budget {-(-smallest >> 20)}M"
            + ("" if context is None else " or a smaller --context")
        )
    tokens = context or _default_context(config, budget_bytes - fixed(least_context), least_context)
    slots = min(sizes.experts, (budget_bytes - fixed(tokens)) // sizes.slot_bytes)
    if slots < least_slots:  # a default context never takes the last slots
        tokens = least_context
        slots = min(sizes.experts, (budget_bytes - fixed(tokens)) // sizes.slot_bytes)
    cycle = config.num_moe_layers * config.num_experts_per_tok
    return BudgetPlan(
        budget_bytes=budget_bytes,
        process_bytes=process,
        dense_bytes=sizes.dense_bytes,
        kv_cache_bytes=tokens * config.kv_bytes_per_token,
        workspace_bytes=workspace_bytes(config, tokens),
        slot_bytes=sizes.slot_bytes,
        slots=slots,
        experts=sizes.experts,
        expert_bytes=sizes.expert_bytes,
        context=tokens,
        smallest_budget_bytes=smallest,
        token_cycle_experts=cycle,
        warnings=tuple(_warnings(sizes, budget_bytes, slots, cycle)),
    )


def _default_context(config: ModelConfig, spare_bytes: int, least: int) -> int:
    most = min(MAX_DEFAULT_CONTEXT, config.max_position_embeddings)
    affordable = least + int(spare_bytes * KV_SHARE) // config.kv_bytes_per_token
    return max(least, min(most, affordable) // 256 * 256)


def _warnings(sizes: Sizes, budget_bytes: int, slots: int, cycle: int) -> list[str]:
    found = []
    if budget_bytes > sizes.available_bytes:
        found.append(
            f"RAM budget {format_bytes(budget_bytes)} is more than the {format_bytes(sizes.available_bytes)}"
            " that the system leaves; paging would undo the cache"
        )
    if slots < min(cycle, sizes.experts):
        found.append(
            f"{slots} slots are fewer than the {cycle} experts one token uses; expect few hits until the"
            f" budget is {format_bytes((cycle - slots) * sizes.slot_bytes)} larger"
        )
    return found


def workspace_bytes(config: ModelConfig, context: int) -> int:
    """Upper bound of temporary tensors: one prefill chunk in fp32, rotary tables, logits and the sampler's
    copies."""
    c, tokens = config, min(PREFILL_CHUNK, context)
    heads = c.num_attention_heads * c.head_dim
    width = max(c.moe_intermediate_size, c.intermediate_size if not all(c.moe_layers) else 0,
                c.shared_expert_intermediate_size)  # fmt: skip
    hidden = 8 * tokens * c.hidden_size
    attention = tokens * 6 * (heads + 2 * c.num_key_value_heads * c.head_dim) + 2 * tokens * context
    experts = 2 * tokens * c.num_experts_per_tok * c.hidden_size + 4 * tokens * width
    tables = 4 * context * c.head_dim
    logits = 6 * c.vocab_size
    return LINEAR_SCRATCH_BYTES + 4 * (hidden + attention + experts + tables + logits)
