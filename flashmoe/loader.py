"""Open a checkpoint, plan the budget, and bring the model up: everything between a folder and an `Engine`.

`open_model` reads headers only, so `flashmoe plan` costs no weights; `load_engine` allocates what the plan
says.
"""

import errno
import importlib.util
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from cache_policies.policy import Geometry
from flashmoe.budget import BudgetPlan, Sizes, plan_budget
from flashmoe.config import PREDICTOR_NAMES, ModelConfig, RunConfig, load_model_config
from flashmoe.decoder import Decoder
from flashmoe.engine import Engine
from flashmoe.errors import BudgetError, ConfigError
from flashmoe.expert_cache import ExpertCache
from flashmoe.policies import build_policy, policy_bytes
from flashmoe.predictors import PREDICTORS, predictor_bytes
from flashmoe.prefetch import AUTO_GUESSES, MAX_STAGING, Prefetcher
from flashmoe.sizes import format_bytes, parse_size
from flashmoe.tokenizer import Tokenizer
from flashmoe.weights import CPU, CheckpointLayout, DenseWeights, ExpertId, load_dense
from kernels.native import ISA_VARIABLE, Context, Format, make_context
from storage import host
from storage.checkpoint import open_checkpoint
from storage.drive_probe import ProbeResult, probe
from storage.expert_file import CheckedReader, read_manifest
from storage.expert_reader import ExpertReader, ReadPlan, open_reader, plan_read
from storage.read_queue import ReadQueue

if TYPE_CHECKING:
    from flashmoe.vram_budget import VramPlan
    from flashmoe.vram_cache import VramCache

Progress = Callable[[str, int, int], None]  # what, done, total
# What `auto` chooses from. Not mmap: its pages are the system's to take back; it keeps a budget only by luck.
AUTO_READERS = ("direct", "buffered")
PROBED_EXPERTS = 64
LEAST_CAPABILITY = (8, 0)  # Ampere: bf16 and asynchronous copies
PASSING_SLOTS = 4  # RAM slots for each of a token's experts, where VRAM holds all experts


@dataclass(frozen=True, slots=True)
class OpenedModel:
    """A checkpoint whose headers, config and tokenizer have been read and checked; no weights yet."""

    folder: Path
    config: ModelConfig
    tokenizer: Tokenizer
    layout: CheckpointLayout
    read_plans: dict[ExpertId, ReadPlan]

    @property
    def slot_bytes(self) -> int:
        return max(plan.slot_bytes for plan in self.read_plans.values())

    @property
    def expert_format(self) -> Format:
        """How the routed experts are stored; all of them alike."""
        return next(iter(self.layout.experts.values())).format

    @property
    def model_bytes(self) -> int:
        return sum(self.layout.checkpoint.shard_bytes)


def open_model(folder: Path) -> OpenedModel:
    """Read and check all but the weights; ConfigError, ModelError, TokenizerError or CheckpointError."""
    try:
        config = load_model_config(folder)
        tokenizer = Tokenizer(folder)
        packed = read_manifest(folder)
        layout = CheckpointLayout(open_checkpoint(folder), config, packed)
    except OSError as error:
        raise ConfigError(f"{error.filename or folder} cannot be read: {error.strerror}") from error
    shard_bytes = layout.checkpoint.shard_bytes
    plans = {key: plan_read(expert.extents, shard_bytes) for key, expert in layout.experts.items()}
    return OpenedModel(folder, config, tokenizer, layout, plans)


def plan_model(model: OpenedModel, run: RunConfig) -> BudgetPlan:
    """What `run.ram_budget` buys for this model, in this process as it stands, and `run.vram_budget` if it
    runs on a GPU."""
    c, vram = model.config, None
    if uses_gpu(run):
        from flashmoe.gpu_loader import vram_plan

        vram = vram_plan(c, model.layout.dense_bytes, model.expert_format, len(model.read_plans), run)
    process = host.rss_bytes()
    whole = Geometry(c.num_moe_layers, c.num_experts, c.num_experts_per_tok, len(model.read_plans))
    available = host.memory_limit().available_bytes + process
    predictor = 0 if run.prefetch == "off" or vram else predictor_bytes(run.predictor, c)
    sizes = Sizes(
        process_bytes=process + (1 + (vram is not None)) * policy_bytes(run.policy, whole) + predictor,
        dense_bytes=0 if vram else model.layout.dense_bytes,
        slot_bytes=model.slot_bytes,
        expert_bytes=max(plan.expert_bytes for plan in model.read_plans.values()),
        experts=len(model.read_plans),
        available_bytes=available,
        on_gpu=vram is not None,
    )
    budget = parse_size(run.ram_budget, free_bytes=available)
    conversations = 1 if run.learn else run.max_batch
    plan = plan_budget(c, sizes, budget, run.context if vram is None else vram.context, conversations)
    if vram is not None:
        plan = replace(plan, kv_tokens=vram.kv_tokens)
    if vram is not None and vram.holds_all:  # RAM is only what experts pass through on their way
        plan = replace(plan, slots=min(plan.slots, PASSING_SLOTS * c.num_experts_per_tok))
    return share_slots(replace(plan, vram=vram), c, run)


def uses_gpu(run: RunConfig) -> bool:
    """Whether `run.device` means an NVIDIA GPU here: "auto" where there is one that can do all that `run`
    asks for. ConfigError if "cuda" is asked for in vain."""
    if run.device == "cpu":
        return False
    hindrance = _why_no_gpu(run)
    if hindrance is not None and run.device == "cuda":
        raise ConfigError(f"--device cuda: {hindrance}, or take --device cpu")
    return hindrance is None


def _why_no_gpu(run: RunConfig) -> str | None:
    if not torch.cuda.is_available():
        return (
            f"torch {torch.__version__} sees no NVIDIA GPU; install a CUDA build of torch and a driver"
        )
    capability = torch.cuda.get_device_capability()
    if capability < LEAST_CAPABILITY:
        found, least = (".".join(map(str, version)) for version in (capability, LEAST_CAPABILITY))
        return f"{found} is below compute capability {least}; take another GPU"
    if importlib.util.find_spec("triton") is None:
        return 'Triton is missing; pip install "flashmoe[gpu]"'
    if run.prefetch != "off" and run.predictor != PREDICTOR_NAMES[0]:
        return f"--predictor {run.predictor} guesses on the CPU only; take {PREDICTOR_NAMES[0]}"
    if run.reader == "mmap":
        return "--reader mmap has no RAM slots to copy from; take direct or buffered"
    return None


def share_slots(plan: BudgetPlan, config: ModelConfig, run: RunConfig) -> BudgetPlan:
    """The plan with as many slots for guesses as `run.prefetch` wants; none where all experts have theirs, or
    every slot is needed to run at all."""
    if plan.vram is not None:  # guesses are copied into spare slots of VRAM
        return replace(plan, staging_slots=0)
    least = config.num_experts_per_tok * (config.num_moe_layers if run.scope == "layer" else 1)
    staging = max(0, min(2 * _guesses(run), MAX_STAGING, plan.slots // 16, plan.slots - least))
    return replace(plan, staging_slots=staging if plan.slots < plan.experts else 0)


@dataclass(frozen=True, slots=True)
class LoadedEngine:
    """An engine ready for tokens, and what was measured on the way."""

    engine: Engine
    weights: DenseWeights
    cache: "ExpertCache | VramCache"
    probed: ProbeResult
    dense_load_s: float
    pcie_mb_per_s: float = 0.0  # of copies RAM -> VRAM, where there is a GPU


def load_engine(
    model: OpenedModel,
    plan: BudgetPlan,
    run: RunConfig,
    progress: Progress | None = None,
) -> LoadedEngine:
    """Probe the drive, read the dense weights, allocate KV cache and slots; `progress` counts bytes."""
    if run.check_reads and model.layout.packed is None:
        raise ConfigError(
            f"--check-reads needs the checksums of a packed model; {model.folder} is not packed:"
            f" flashmoe pack --model {model.folder} --output DIR makes one"
        )
    if run.threads is not None:
        torch.set_num_threads(run.threads)
    try:
        kernels = make_context(torch.get_num_threads())
    except ValueError as error:
        raise ConfigError(f"{ISA_VARIABLE}: {error}") from error
    paths, shard_bytes = model.layout.checkpoint.shards, model.layout.checkpoint.shard_bytes
    sample = random.Random(run.seed).sample(
        list(model.read_plans.values()), min(PROBED_EXPERTS, plan.experts)
    )
    probed = probe(paths, shard_bytes, sample, AUTO_READERS if run.reader == "auto" else (run.reader,))
    if plan.vram is not None:
        return _load_on_gpu(model, plan, plan.vram, run, kernels, probed, progress)
    with _allocating(plan):
        weights, dense_load_s = _load_dense(model, CPU, progress)
        cache = open_cache(model, plan, run, probed.reader)
        decoder = Decoder(
            model.config, weights, cache, plan.context, kernels, model.expert_format, run.exact_activations
        )
        decoder.prefetcher = open_prefetcher(decoder, weights, plan, run)
        engine = Engine(decoder)
    return LoadedEngine(engine, weights, cache, probed, dense_load_s)


def _load_on_gpu(
    model: OpenedModel, plan: BudgetPlan, vram: "VramPlan", run: RunConfig, kernels: Context,
    probed: ProbeResult, progress: Progress | None,
) -> LoadedEngine:  # fmt: skip
    from flashmoe.gpu_loader import (
        allocating,
        build_decoder,
        give_back,
        limit_vram,
        pcie_mb_per_s,
        read_all,
    )

    device = torch.device("cuda")
    limit_vram(vram)
    with _allocating(plan), allocating(vram):
        weights, dense_load_s = _load_dense(model, device, progress)
        ram = open_cache(model, plan, run, probed.reader)
        decoder = build_decoder(
            model.config, weights, ram, kernels, model.expert_format, vram, run, device,
            packed=model.layout.packed is not None,
        )  # fmt: skip
        try:
            if plan.slots + vram.slots >= plan.experts:
                read_all(decoder.experts, model.config, progress)
            decoder.warm_up()
            rate = pcie_mb_per_s()
        except BaseException:
            decoder.experts.close()
            give_back(decoder)
            raise
    return LoadedEngine(Engine(decoder), weights, decoder.experts, probed, dense_load_s, rate)


def _load_dense(
    model: OpenedModel, device: torch.device, progress: Progress | None
) -> tuple[DenseWeights, float]:
    """The dense weights, and how many seconds they took."""
    begin = time.perf_counter()
    told = _progress_of_bytes(progress, model.layout.dense_read_bytes)
    weights = load_dense(model.layout, told, device)
    return weights, time.perf_counter() - begin


def open_cache(model: OpenedModel, plan: BudgetPlan, run: RunConfig, reader_name: str) -> ExpertCache:
    """Empty slots and a policy that has seen nothing; allocates `plan.slots` experts."""
    reader = _open_reader(reader_name, model, run.check_reads)
    geometry = _geometry(model.config, share_slots(plan, model.config, run), run)
    judged = geometry
    if plan.vram is not None and not geometry.per_layer:  # the policy judges what either tier holds
        judged = replace(geometry, capacity=geometry.capacity + plan.vram.slots - plan.vram.spare_slots)
    policy = build_policy(run.policy, judged, run.seed)
    spare = plan.slots - geometry.capacity * (geometry.layers if geometry.per_layer else 1)
    return ExpertCache(model.read_plans, reader, ReadQueue(reader), policy, geometry, spare)


def _geometry(config: ModelConfig, plan: BudgetPlan, run: RunConfig) -> Geometry:
    """The policy's share of the slots."""
    layers, top_k = config.num_moe_layers, config.num_experts_per_tok
    capacity, per_layer = plan.slots - plan.staging_slots, run.scope == "layer"
    if per_layer:
        capacity //= layers
        if capacity < top_k:
            raise BudgetError(
                f"{plan.slots} slots for {layers} layers are fewer than the {top_k} experts that each needs;"
                " try a larger --ram-budget or the global scope"
            )
    return Geometry(layers, config.num_experts, top_k, capacity, per_layer)


def open_prefetcher(
    decoder: Decoder, weights: DenseWeights, plan: BudgetPlan, run: RunConfig
) -> Prefetcher | None:
    """What `run.prefetch` asks for, having measured nothing yet; None: nothing, or no slot for a guess."""
    if not share_slots(plan, decoder.config, run).staging_slots:
        return None
    predictor = PREDICTORS[run.predictor](decoder, weights)
    return Prefetcher(predictor, _guesses(run), run.prefetch == "auto")


def _guesses(run: RunConfig) -> int:
    """At most so many a layer."""
    if run.prefetch == "off":
        return 0
    return AUTO_GUESSES if run.prefetch == "auto" else int(run.prefetch)


def _open_reader(name: str, model: OpenedModel, check_reads: bool) -> ExpertReader:
    checkpoint, packed = model.layout.checkpoint, model.layout.packed
    reader = open_reader(name, checkpoint.shards, checkpoint.shard_bytes)
    return CheckedReader(reader, checkpoint, packed) if check_reads and packed is not None else reader


@contextmanager
def _allocating(plan: BudgetPlan) -> Iterator[None]:
    """Turn a refusal of memory by the system into a BudgetError."""
    try:
        yield
    except (MemoryError, OSError, RuntimeError) as error:
        refused = isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM
        if not refused and ("memory" not in str(error) or "CUDA" in str(error)):
            raise
        raise BudgetError(
            f"the system does not give the {format_bytes(plan.planned_bytes)} that this plan needs;"
            " try a smaller --ram-budget"
        ) from error


def _progress_of_bytes(progress: Progress | None, total: int) -> Callable[[int], None] | None:
    if progress is None:
        return None
    done = 0

    def advance(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress("loading dense weights", done, total)

    return advance
