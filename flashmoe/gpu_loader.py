"""Bring a model up on a GPU: which device, what the VRAM budget buys, and the decoder with its tiers.

The only module that `loader.py` asks for when a run is on a GPU; without one, nothing here is imported and
Triton is not needed.
"""

import ctypes
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from cache_policies.policy import Geometry
from flashmoe.budget import PREFILL_CHUNK
from flashmoe.config import ModelConfig, RunConfig
from flashmoe.copy_engine import CopyEngine, CudaCopyEngine, HostCopyEngine
from flashmoe.errors import BudgetError
from flashmoe.expert_cache import ExpertCache
from flashmoe.expert_placement import Placement, calibrate
from flashmoe.gpu_decoder import MOST_ROWS, GpuDecoder
from flashmoe.gpu_graphs import gpu_seconds
from flashmoe.gpu_kv_cache import GpuPages
from flashmoe.gpu_model import GpuModel
from flashmoe.policies import build_policy
from flashmoe.prefetch import AUTO_GUESSES, PrefetchSwitch
from flashmoe.sizes import format_bytes, parse_size
from flashmoe.vram_budget import VramPlan, plan_vram
from flashmoe.vram_cache import VramCache
from flashmoe.weights import DenseWeights
from kernels.expert_ffn import ExpertFFN
from kernels.expert_slots import slot_layout
from kernels.native import ACTIVATIONS, Context, Experts, Format
from kernels.triton_decode import ExpertDecode
from kernels.triton_moe import ExpertPrefill

SLOT_ALIGNMENT = 256
PCIE_PROBE_BYTES = 32 << 20
# What a layer costs the host when it looks at every layer, beyond the copies (docs/benchmarks.md).
LAYER_BY_LAYER_S = 165e-6
ROUNDED_TO = 16  # tokens of an expert, with --token-rounding: the lowest tile
LOADING = "loading experts"


def vram_plan(
    config: ModelConfig, dense_bytes: int, expert_format: Format, experts: int, run: RunConfig
) -> VramPlan:
    """What `run.vram_budget` buys; starts CUDA, so that its memory is in the process from here on."""
    torch.zeros(1, device="cuda")
    free, total = torch.cuda.mem_get_info()
    budget = parse_size(run.vram_budget, free_bytes=free)
    if budget > total:
        raise BudgetError(
            f"VRAM budget {format_bytes(budget)} is more than the {format_bytes(total)} of"
            f" {torch.cuda.get_device_name()}; try --vram-budget auto"
        )
    of_slot, conversations = slot_bytes(config, expert_format), 1 if run.learn else run.max_batch
    return plan_vram(config, dense_bytes, of_slot, experts, budget, run.context, conversations)


def slot_bytes(config: ModelConfig, expert_format: Format) -> int:
    """Of a VRAM slot."""
    layout = slot_layout(expert_format.name.lower(), config.hidden_size, config.moe_intermediate_size)
    return -(-layout.bytes // SLOT_ALIGNMENT) * SLOT_ALIGNMENT


def limit_vram(plan: VramPlan) -> None:
    """torch then refuses what the plan does not hold."""
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction((plan.budget_bytes - plan.driver_bytes) / total)


def give_back(decoder: GpuDecoder) -> None:
    """Free what a closed run has on the GPU, for others and for the next one in this process."""
    decoder.close()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1.0)


def build_decoder(
    config: ModelConfig,
    weights: DenseWeights,
    ram: ExpertCache,
    kernels: Context,
    expert_format: Format,
    plan: VramPlan,
    run: RunConfig,
    device: torch.device,
    packed: bool,
) -> GpuDecoder:
    """The tiers and the decoder; `weights` are on `device`. On a CPU device (tests) VRAM is ordinary memory
    and the kernels need Triton's interpreter. `packed`: every expert begins where its RAM slot begins."""
    c, on_gpu = config, device.type == "cuda"
    arena = torch.empty(plan.slots, plan.slot_bytes, dtype=torch.uint8, device=device)
    table = torch.full((c.num_moe_layers, c.num_experts), -1, dtype=torch.int32, pin_memory=on_gpu)
    name, top_k = expert_format.name.lower(), c.num_experts_per_tok
    engine = _copy_engine(arena, c, expert_format)
    placement: Placement | None = None
    host_experts = None
    if run.cpu_experts != "never" and not plan.holds_all:
        experts = Experts(
            c.hidden_size, c.moe_intermediate_size, expert_format, ACTIVATIONS[c.hidden_act],
            run.exact_activations,
        )  # fmt: skip
        placement = calibrate(run.cpu_experts, engine, kernels, experts, c.hidden_size, top_k)
        if packed and reads_in_place(placement):
            placement = None
        if placement is not None:
            host_experts = ExpertFFN(kernels, experts, c.hidden_size, top_k, pinned=on_gpu)
    in_place = packed and placement is None and not plan.holds_all
    shape = (c.hidden_size, c.moe_intermediate_size, name, c.hidden_act, top_k)
    chunk, rounding = min(PREFILL_CHUNK, plan.context), ROUNDED_TO if run.token_rounding else 0
    rows = min(plan.conversations, MOST_ROWS)
    pages = GpuPages(c, plan.context, plan.kv_tokens, plan.conversations, device)
    return GpuDecoder(
        GpuModel(c, weights, pages, device, run.exact_activations),
        _open_cache(c, ram, engine, table, placement, in_place, plan, run),
        ExpertDecode(*shape, rows, device, run.exact_activations),
        ExpertPrefill(*shape, c.num_experts, chunk, device, rounding),
        arena,
        table,
        host_experts,
        None if in_place else _prefetcher(plan, run),
        _ram_arena(ram) if in_place else None,
        rows,
    )


def reads_in_place(placement: Placement) -> bool:
    """Whether a token is faster if the GPU reads experts in RAM over PCIe, and the host is not in the
    way, than if the host looks at every layer to have the CPU compute them."""
    on_cpu_s = LAYER_BY_LAYER_S + placement.round_trip_s + placement.cpu_s
    return placement.mode == "auto" and placement.copy_s < on_cpu_s


def use_policy(
    decoder: GpuDecoder, ram: ExpertCache, expert_format: Format, plan: VramPlan, run: RunConfig
) -> VramCache:
    """Go on with empty slots under `run.policy` and `run.prefetch`; the cache before has been closed."""
    engine = _copy_engine(decoder.arena, decoder.config, expert_format)
    before = decoder.experts
    cache = _open_cache(
        decoder.config, ram, engine, decoder.table, before.placement, before.in_place, plan, run
    )
    prefetcher, ram_arena = (None, _ram_arena(ram)) if before.in_place else (_prefetcher(plan, run), None)
    decoder.use_cache(cache, prefetcher, ram_arena)
    if ram.slots + plan.slots >= plan.experts:
        read_all(cache, decoder.config, None)
    return cache


def _copy_engine(arena: Tensor, config: ModelConfig, expert_format: Format) -> CopyEngine:
    name = expert_format.name.lower()
    layout = slot_layout(name, config.hidden_size, config.moe_intermediate_size)
    return CudaCopyEngine(arena, layout) if arena.is_cuda else HostCopyEngine(arena, layout)


def _open_cache(
    config: ModelConfig, ram: ExpertCache, engine: CopyEngine, table: Tensor, placement: Placement | None,
    in_place: bool, plan: VramPlan, run: RunConfig,
) -> VramCache:  # fmt: skip
    layers, per_layer = config.num_moe_layers, run.scope == "layer"
    capacity = plan.slots - plan.spare_slots
    if per_layer:
        capacity //= layers
        if capacity < config.num_experts_per_tok:
            raise BudgetError(
                f"{plan.slots} VRAM slots for {layers} layers are fewer than the {config.num_experts_per_tok}"
                " experts that each needs; try a larger --vram-budget or the global scope"
            )
    geometry = Geometry(layers, config.num_experts, config.num_experts_per_tok, capacity, per_layer)
    policy = build_policy(vram_policy(run.policy), geometry, run.seed)
    return VramCache(ram, policy, geometry, engine, table.numpy(), placement, plan.spare_slots, in_place)


def _ram_arena(ram: ExpertCache) -> Tensor:
    """[slots, slot bytes] uint8: the RAM slots, which the copy engine has pinned."""
    address, nbytes = ram.arena
    slots = torch.frombuffer((ctypes.c_uint8 * nbytes).from_address(address), dtype=torch.uint8)
    return slots.view(ram.slots, -1)


def vram_policy(policy: str) -> str:
    """The learned policy is for drives: to weigh thousands of residents takes it longer than a copy over PCIe
    takes (docs/benchmarks.md). VRAM then has the best of the simple ones."""
    return "lfu-aged" if policy.partition(":")[0] == "learned" else policy


def _prefetcher(plan: VramPlan, run: RunConfig) -> PrefetchSwitch | None:
    if run.prefetch == "off" or not plan.spare_slots:
        return None
    automatic = run.prefetch == "auto"
    return PrefetchSwitch(AUTO_GUESSES if automatic else int(run.prefetch), automatic)


def read_all(
    cache: VramCache, config: ModelConfig, progress: Callable[[str, int, int], None] | None
) -> None:
    """Where every expert has a slot in VRAM or RAM: read them all, so that no token waits for the drive."""
    layers = [i for i, moe in enumerate(config.moe_layers) if moe]
    for done, layer in enumerate(layers, 1):
        for _ in cache.stream(layer, range(config.num_experts)):
            pass
        if progress is not None:
            progress(LOADING, done, len(layers))


def pcie_mb_per_s() -> float:
    """Of large copies from pinned memory, MB/s; the median of five."""
    source = torch.empty(PCIE_PROBE_BYTES, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device="cuda")
    seconds = [gpu_seconds(lambda: target.copy_(source, non_blocking=True)) for _ in range(6)]
    return PCIE_PROBE_BYTES / statistics.median(seconds[1:]) / 1e6  # the first one warms up


@contextmanager
def allocating(plan: VramPlan) -> Iterator[None]:
    """Turn a refusal of memory by the GPU into a BudgetError."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise BudgetError(
            f"the GPU does not give the {format_bytes(plan.planned_bytes)} that this plan needs within"
            f" --vram-budget {format_bytes(plan.budget_bytes)}; end other programs on it or try a smaller"
            " --vram-budget"
        ) from error
