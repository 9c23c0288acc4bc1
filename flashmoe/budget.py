"""The RAM budget: one number for the whole process, planned before anything is allocated.

budget = process (interpreter, libraries) + dense weights + KV cache for the context + workspace + expert
slots. Knows sizes only; refuses with the smallest budget that works, and warns at the two cliffs: below one
token cycle a cache hardly hits, above what the system leaves us paging undoes it.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from flashmoe.config import MAX_DEFAULT_CONTEXT, ModelConfig
from flashmoe.errors import BudgetError, ConfigError
from flashmoe.sizes import format_bytes

if TYPE_CHECKING:
    from flashmoe.vram_budget import VramPlan

MOST_PASSING = 8  # slots for the experts of prompts that run while others decode
# Tokens of one step of several sequences whose experts are asked for as decode does: all at once, and what
# misses stays. More are a prefill's: expert by expert, most of them passing through.
MOST_STEP_TOKENS = 64
PREFILL_CHUNK = 512  # tokens; the same for every budget, or the bits of a long prompt would depend on it
SMALLEST_DEFAULT_CONTEXT = 512
# Share of what is left after the fixed parts that the KV cache may take when the user names no context.
KV_SHARE = 0.25
FURTHER_KV_SHARE = 0.1  # and that further conversations may take beside it
# Library code and buffers touched only after planning: math library threads, allocator slack. With two
# threads they took up to 80 MiB (docs/benchmarks.md); the rest is for more threads.
LATE_PROCESS_BYTES = 48 << 20
# With a GPU: what driver, kernels and pinned buffers take of RAM after planning (docs/benchmarks.md).
GPU_HOST_BYTES = 640 << 20


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the plan is made of, in bytes unless said."""

    process_bytes: int
    dense_bytes: int
    slot_bytes: int
    expert_bytes: int
    experts: int  # routed experts of all layers
    available_bytes: int  # what the system, or the process's cgroup, leaves for this process in all
    on_gpu: bool = False  # dense weights, KV cache and workspace are elsewhere: flashmoe/vram_budget.py


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
    context: int  # tokens of one conversation
    kv_tokens: int  # of all conversations together
    smallest_budget_bytes: int
    token_cycle_experts: int  # layers x top-k: the experts one token uses
    warnings: tuple[str, ...]
    staging_slots: int = 0  # of `slots`, those that guesses are read into
    passing_slots: int = 0  # beside `slots`: for prompts that run while others decode
    vram: "VramPlan | None" = None  # of a run on a GPU: dense weights and KV cache are there

    @property
    def slots_bytes(self) -> int:
        return (self.slots + self.passing_slots) * self.slot_bytes

    @property
    def planned_bytes(self) -> int:
        fixed = self.process_bytes + self.dense_bytes + self.kv_cache_bytes + self.workspace_bytes
        return fixed + self.slots_bytes

    def rows(self) -> list[tuple[str, str, str]]:
        """(part, size, remark) for people."""
        share = self.slots / self.experts
        each = f"{format_bytes(self.slot_bytes)} each"
        if self.staging_slots:
            each += f", {self.staging_slots} of them for guesses"
        if self.passing_slots:
            each += f"; {self.passing_slots} more for prompts beside others"
        slots = ("expert slots", format_bytes(self.slots_bytes),
                 f"{self.slots} of {self.experts} experts ({share:.0%}), {each}")  # fmt: skip
        process = ("process", format_bytes(self.process_bytes), "interpreter and libraries")
        planned = ("planned", format_bytes(self.planned_bytes), f"of {format_bytes(self.budget_bytes)}")
        workspace = format_bytes(self.workspace_bytes)
        if self.vram is not None:
            buffers = ("workspace", workspace, "what the driver and pinned buffers take of RAM")
            return [*self.vram.rows(), process, buffers, slots, (*planned[:2], f"{planned[2]} RAM")]
        return [
            process,
            ("dense weights", format_bytes(self.dense_bytes), "attention, router, embeddings"),
            ("KV cache", format_bytes(self.kv_cache_bytes), kv_text(self.context, self.kv_tokens, "fp32")),
            ("workspace", workspace, f"prefill, {min(PREFILL_CHUNK, self.context)} tokens at a time"),
            slots,
            planned,
        ]

    def as_dict(self) -> Mapping[str, Any]:
        """For programs: every field, and the two sums."""
        return {**asdict(self), "slots_bytes": self.slots_bytes, "planned_bytes": self.planned_bytes}


def plan_budget(
    config: ModelConfig, sizes: Sizes, budget_bytes: int, context: int | None, conversations: int = 1
) -> BudgetPlan:
    """Divide the budget; BudgetError names the smallest workable figure and its parts.

    `context` None: as many tokens as the model allows, at most 8192, within a quarter of what the fixed parts
    leave. Further `conversations` may take a tenth of what is left then for their KV cache.
    """
    if context is not None and context > config.max_position_embeddings:
        raise ConfigError(
            f"--context {context} is more than the {config.max_position_embeddings} positions of this model"
        )
    least_slots = config.num_experts_per_tok
    least_context = context or min(SMALLEST_DEFAULT_CONTEXT, config.max_position_embeddings)
    smallest = _fixed_bytes(config, sizes, least_context) + least_slots * sizes.slot_bytes
    if budget_bytes < smallest:
        parts = {
            "process": sizes.process_bytes + LATE_PROCESS_BYTES,
            "dense weights": sizes.dense_bytes,
            f"KV cache for {least_context} tokens": _kv_bytes(config, sizes, least_context),
            "workspace": _workspace_bytes(config, sizes, least_context),
            f"{least_slots} expert slots": least_slots * sizes.slot_bytes,
        }
        raise BudgetError(
            f"RAM budget {format_bytes(budget_bytes)} is below the {format_bytes(smallest)} that this"
            f" {config.model_type} model needs:"
            f" {', '.join(f'{part} {format_bytes(size)}' for part, size in parts.items() if size)};"
            f" try --ram-budget {advised_budget(smallest)}"
            + ("" if context is None or sizes.on_gpu else " or a smaller --context")
        )
    tokens, slots = _divide(config, sizes, budget_bytes, context)
    kv_tokens, passing, step_workspace = tokens, 0, 0
    if conversations > 1 and not sizes.on_gpu:
        spare = budget_bytes - _fixed_bytes(config, sizes, tokens) - least_slots * sizes.slot_bytes
        further = int(FURTHER_KV_SHARE * max(0, spare) / config.kv_bytes_per_token)
        kv_tokens += min(further, (conversations - 1) * tokens)
        spare -= _kv_bytes(config, sizes, kv_tokens - tokens)
        step_workspace = workspace_bytes(config, MOST_STEP_TOKENS)
        step_workspace += 2 * 4 * conversations * config.vocab_size  # logits, and a copy to sample from
        spare -= step_workspace
        passing = min(MOST_PASSING, max(0, spare // sizes.slot_bytes) // 16)
        slots = least_slots + max(0, spare // sizes.slot_bytes - passing)
        slots = min(sizes.experts, slots)
    return BudgetPlan(
        budget_bytes=budget_bytes,
        process_bytes=sizes.process_bytes + LATE_PROCESS_BYTES,
        dense_bytes=sizes.dense_bytes,
        kv_cache_bytes=_kv_bytes(config, sizes, kv_tokens),
        workspace_bytes=_workspace_bytes(config, sizes, tokens) + step_workspace,
        slot_bytes=sizes.slot_bytes,
        slots=slots,
        experts=sizes.experts,
        expert_bytes=sizes.expert_bytes,
        context=tokens,
        kv_tokens=kv_tokens,
        passing_slots=passing,
        smallest_budget_bytes=smallest,
        token_cycle_experts=config.num_moe_layers * config.num_experts_per_tok,
        warnings=tuple(_warnings(config, sizes, budget_bytes, context)),
    )


def kv_text(context: int, tokens: int, kind: str) -> str:
    """What a KV cache of so many tokens holds, for people."""
    if tokens == context:
        return f"context of {context} tokens, {kind}"
    return f"{tokens} tokens in all, {context} a conversation, {kind}"


def advised_budget(nbytes: int) -> str:
    """As text: a budget to try, rounded up to 16 MiB: no two processes are of quite the same size."""
    return f"{-(-nbytes // (16 << 20)) * 16}M"


def _fixed_bytes(config: ModelConfig, sizes: Sizes, tokens: int) -> int:
    """All but the slots, for a context of `tokens`."""
    process = sizes.process_bytes + LATE_PROCESS_BYTES
    workspace = _workspace_bytes(config, sizes, tokens)
    return process + sizes.dense_bytes + _kv_bytes(config, sizes, tokens) + workspace


def _kv_bytes(config: ModelConfig, sizes: Sizes, tokens: int) -> int:
    return 0 if sizes.on_gpu else tokens * config.kv_bytes_per_token


def _workspace_bytes(config: ModelConfig, sizes: Sizes, tokens: int) -> int:
    return GPU_HOST_BYTES if sizes.on_gpu else workspace_bytes(config, tokens)


def _divide(config: ModelConfig, sizes: Sizes, budget_bytes: int, context: int | None) -> tuple[int, int]:
    """(tokens of context, expert slots) that a budget buys; a MiB more never buys fewer of either."""
    tokens = context or _default_context(config, sizes, budget_bytes)
    slots = (budget_bytes - _fixed_bytes(config, sizes, tokens)) // sizes.slot_bytes
    return tokens, min(sizes.experts, slots)


def _default_context(config: ModelConfig, sizes: Sizes, budget_bytes: int) -> int:
    """As many tokens as a quarter of what is left pays for, once the least context and slots are paid."""
    most = min(MAX_DEFAULT_CONTEXT, config.max_position_embeddings)
    least = min(SMALLEST_DEFAULT_CONTEXT, most)
    paid = _fixed_bytes(config, sizes, least)
    spare = budget_bytes - paid - config.num_experts_per_tok * sizes.slot_bytes
    if spare <= 0 or most == least:
        return least
    whole = _fixed_bytes(config, sizes, most) - paid  # linear in the tokens beyond `least`
    if not whole:
        return most
    return least + min(most - least, int((most - least) * KV_SHARE * spare / whole))


def _warnings(config: ModelConfig, sizes: Sizes, budget_bytes: int, context: int | None) -> list[str]:
    found = []
    if budget_bytes > sizes.available_bytes:
        found.append(
            f"RAM budget {format_bytes(budget_bytes)} is more than the {format_bytes(sizes.available_bytes)}"
            " that the system leaves; paging would undo the cache"
        )
    cycle = min(config.num_moe_layers * config.num_experts_per_tok, sizes.experts)
    slots = _divide(config, sizes, budget_bytes, context)[1]
    if slots < cycle:
        enough = _smallest_with_slots(config, sizes, cycle, budget_bytes, context)
        found.append(
            f"{slots} slots are fewer than the {cycle} experts one token uses: expect few hits below a budget"
            f" of {format_bytes(enough)}"
        )
    return found


def _smallest_with_slots(
    config: ModelConfig, sizes: Sizes, slots: int, too_small: int, context: int | None
) -> int:
    """The smallest budget, to the MiB, that buys this many slots."""
    low, high = too_small >> 20, (too_small + 2 * slots * sizes.slot_bytes >> 20) + 1
    while low + 1 < high:
        middle = (low + high) // 2
        enough = _divide(config, sizes, middle << 20, context)[1] >= slots
        low, high = (low, middle) if enough else (middle, high)
    return high << 20


def workspace_bytes(config: ModelConfig, context: int) -> int:
    """Upper bound of temporary memory: a prefill chunk in fp32, rotary tables, logits, sampling."""
    c, tokens = config, min(PREFILL_CHUNK, context)
    heads = c.num_attention_heads * c.head_dim
    width = max(c.moe_intermediate_size, c.intermediate_size if not all(c.moe_layers) else 0,
                c.shared_expert_intermediate_size)  # fmt: skip
    hidden = 4 * tokens * c.hidden_size  # residual stream, its norms, what the router hands on
    attention = tokens * 2 * (heads + c.num_key_value_heads * c.head_dim)
    # The experts' products; activations made ready for the kernels, in fp32 at most: of a matrix, of one
    # expert, and those between its matrices.
    products = tokens * c.num_experts_per_tok * c.hidden_size
    ready = tokens * (max(heads, c.hidden_size) + c.hidden_size + width)
    routing = tokens * (c.num_experts + 16 * c.num_experts_per_tok)
    tables = 4 * context * c.head_dim
    logits = 6 * c.vocab_size
    scores = 16 * 6 * context  # of a block of queries, in each of up to 16 threads
    return 4 * (hidden + attention + products + ready + routing + tables + logits + scores)
