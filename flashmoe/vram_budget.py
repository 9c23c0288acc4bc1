"""The VRAM budget: one number for everything this process puts on the GPU, planned before it is allocated.

budget = driver and libraries + dense weights + KV cache + workspace + expert slots. Knows
sizes only; refuses with the smallest budget that works.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from flashmoe.budget import (
    FURTHER_KV_SHARE,
    KV_SHARE,
    PREFILL_CHUNK,
    SMALLEST_DEFAULT_CONTEXT,
    advised_budget,
    kv_text,
)
from flashmoe.config import MAX_DEFAULT_CONTEXT, ModelConfig
from flashmoe.errors import BudgetError, ConfigError
from flashmoe.kv_cache import BLOCK
from flashmoe.sizes import format_bytes

# The CUDA context, loaded kernels, cuBLAS's workspace and what torch's allocator rounds up
# (docs/benchmarks.md).
DRIVER_BYTES: Final = 1 << 30
ALLOCATOR_BYTES: Final = 96 << 20  # what torch's allocator rounds up and leaves between tensors
ATTENTION_SPLIT: Final = 128  # keys of a program of a step's attention (kernels/triton_attention.py)
SPARE_SLOTS: Final = 16  # through which a prompt's experts pass and guesses come, where not all experts fit


@dataclass(frozen=True, slots=True)
class VramPlan:
    """What a VRAM budget buys. Bytes unless said."""

    budget_bytes: int
    driver_bytes: int
    dense_bytes: int
    kv_cache_bytes: int
    workspace_bytes: int
    slot_bytes: int
    slots: int
    spare_slots: int  # of `slots`, those that no policy rules
    experts: int
    context: int  # tokens
    kv_tokens: int  # of all conversations
    conversations: int  # that run together

    @property
    def slots_bytes(self) -> int:
        return self.slots * self.slot_bytes

    @property
    def planned_bytes(self) -> int:
        fixed = self.driver_bytes + self.dense_bytes + self.kv_cache_bytes + self.workspace_bytes
        return fixed + self.slots_bytes

    @property
    def holds_all(self) -> bool:
        """Every expert has a slot."""
        return self.slots == self.experts

    def rows(self) -> list[tuple[str, str, str]]:
        """(part, size, remark) for people."""
        each = f"{format_bytes(self.slot_bytes)} each"
        if self.spare_slots:
            each += f", {self.spare_slots} of them to pass through"
        return [
            ("CUDA", format_bytes(self.driver_bytes), "driver, libraries, kernels"),
            ("dense weights", format_bytes(self.dense_bytes), "attention, router, embeddings"),
            ("KV cache", format_bytes(self.kv_cache_bytes), kv_text(self.context, self.kv_tokens, "fp16")),
            ("workspace", format_bytes(self.workspace_bytes),
             f"prefill, {min(PREFILL_CHUNK, self.context)} tokens at a time"),
            ("expert slots", format_bytes(self.slots_bytes),
             f"{self.slots} of {self.experts} experts ({self.slots / self.experts:.0%}), {each}"),
            ("planned", format_bytes(self.planned_bytes), f"of {format_bytes(self.budget_bytes)} VRAM"),
        ]  # fmt: skip

    def as_dict(self) -> Mapping[str, Any]:
        """For programs: every field, and the two sums."""
        return {**asdict(self), "slots_bytes": self.slots_bytes, "planned_bytes": self.planned_bytes}


def plan_vram(
    config: ModelConfig, dense_bytes: int, slot_bytes: int, experts: int, budget_bytes: int,
    context: int | None, conversations: int = 1,
) -> VramPlan:  # fmt: skip
    """Divide the budget; BudgetError names the smallest workable figure and its parts.

    `context` None: as many tokens as the model allows, at most 8192, within a quarter of what is left.
    Further `conversations` may take a tenth of what is left then for their KV cache.
    """
    if context is not None and context > config.max_position_embeddings:
        raise ConfigError(
            f"--context {context} is more than the {config.max_position_embeddings} positions of this model"
        )
    most = context or min(MAX_DEFAULT_CONTEXT, config.max_position_embeddings)
    least = context or min(SMALLEST_DEFAULT_CONTEXT, most)
    least_slots = min(experts, 2 * config.num_experts_per_tok)

    def kv_bytes(tokens: int) -> int:
        return gpu_kv_bytes(config, tokens, conversations)

    def fixed(tokens: int) -> int:
        workspace = vram_workspace_bytes(config, tokens, conversations)
        return DRIVER_BYTES + dense_bytes + kv_bytes(tokens) + workspace

    smallest = fixed(least) + least_slots * slot_bytes
    if budget_bytes < smallest:
        parts = {
            "CUDA": DRIVER_BYTES,
            "dense weights": dense_bytes,
            f"KV cache for {least} tokens": kv_bytes(least),
            "workspace": vram_workspace_bytes(config, least, conversations),
            f"{least_slots} expert slots": least_slots * slot_bytes,
        }
        raise BudgetError(
            f"VRAM budget {format_bytes(budget_bytes)} is below the {format_bytes(smallest)} that this"
            f" {config.model_type} model needs on a GPU:"
            f" {', '.join(f'{part} {format_bytes(size)}' for part, size in parts.items())};"
            f" try --vram-budget {advised_budget(smallest)}"
            + ("" if context is None else ", a smaller --context") + " or --device cpu"
        )  # fmt: skip
    share = KV_SHARE * (budget_bytes - smallest)
    tokens = most
    while tokens > least and fixed(tokens) - fixed(least) > share:
        tokens = max(least, tokens - BLOCK)
    left = budget_bytes - fixed(tokens) - least_slots * slot_bytes
    further = int(FURTHER_KV_SHARE * left / (kv_bytes(BLOCK) - kv_bytes(0))) * BLOCK
    kv_tokens = tokens + min(further, (conversations - 1) * tokens)
    left -= kv_bytes(kv_tokens) - kv_bytes(tokens)
    slots = min(experts, least_slots + left // slot_bytes)
    spare = 0 if slots == experts else max(1, min(SPARE_SLOTS, slots // 8))
    return VramPlan(
        budget_bytes=budget_bytes,
        driver_bytes=DRIVER_BYTES,
        dense_bytes=dense_bytes,
        kv_cache_bytes=kv_bytes(kv_tokens),
        workspace_bytes=vram_workspace_bytes(config, tokens, conversations),
        slot_bytes=slot_bytes,
        slots=slots,
        spare_slots=spare,
        experts=experts,
        context=tokens,
        kv_tokens=kv_tokens,
        conversations=conversations,
    )


def gpu_kv_bytes(config: ModelConfig, tokens: int, sequences: int) -> int:
    """Keys and values of all layers in fp16: so many tokens in all, of sequences that run together."""
    per_token = 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return page_count(tokens, sequences) * BLOCK * per_token


def page_count(tokens: int, sequences: int) -> int:
    """Pages of BLOCK tokens. A sequence as long as the context may end in the middle of one."""
    return -(-tokens // BLOCK) + sequences


def vram_workspace_bytes(config: ModelConfig, context: int, rows: int = 1) -> int:
    """Upper bound of temporary memory: what a layer of a prefill chunk needs, and the buffers of steps of so
    many tokens."""
    c, tokens = config, min(PREFILL_CHUNK, context)
    heads, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    width = max(c.moe_intermediate_size, c.intermediate_size, c.shared_expert_intermediate_size)
    hidden = 6 * 4 * tokens * c.hidden_size  # residual stream, norms, products of dense matrices
    # A chunk's, with keys and values gathered from their pages, then once per head.
    attention = 3 * 4 * tokens * (heads + 2 * kv) + 2 * 2 * context * (heads + kv) + 4 * tokens * context
    experts = tokens * c.num_experts_per_tok * (4 * c.hidden_size + 2 * c.moe_intermediate_size)
    unpacked = 2 * c.hidden_size * max(heads + 2 * kv, width)  # a dense matrix, in 16 bits
    routing = 16 * tokens * (c.num_experts + c.num_experts_per_tok) * 4
    tables = 2 * 4 * context * c.head_dim + 16 * c.vocab_size
    layers = c.num_moe_layers * (2 * c.hidden_size + 2 * c.num_experts + 8 * c.num_experts_per_tok)
    splits = -(-context // ATTENTION_SPLIT) * (heads + 2 * c.num_attention_heads)
    of_row = c.vocab_size + layers + splits + 8 * (c.hidden_size + heads + kv + width)
    of_row += 8 * c.num_experts_per_tok * (c.hidden_size + width)
    steps = 4 * rows * of_row
    return hidden + attention + experts + unpacked + routing + tables + steps + ALLOCATOR_BYTES
