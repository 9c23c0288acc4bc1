"""Build an engine over a checkpoint folder without tokenizer, probe or plan: for tests of the arithmetic."""

from pathlib import Path

from cache_policies.policy import Geometry
from flashmoe.config import load_model_config
from flashmoe.decoder import Decoder
from flashmoe.engine import Engine
from flashmoe.expert_cache import ExpertCache
from flashmoe.policies import build_policy
from flashmoe.weights import CheckpointLayout, load_dense
from kernels.native import make_context
from storage.checkpoint import open_checkpoint
from storage.expert_file import read_manifest
from storage.expert_reader import open_reader, plan_read
from storage.read_queue import ReadQueue


def build_engine(
    folder: Path,
    *,
    slots: int | None = None,
    policy: str = "lru",
    reader: str = "buffered",
    context: int = 512,
    threads: int = 2,
    isa: str | None = None,
    exact: bool = False,
    per_layer: bool = False,
    spare: int = 0,
) -> Engine:
    """`slots` None: every expert has one. With `per_layer`, so many in each layer."""
    config = load_model_config(folder)
    layout = CheckpointLayout(open_checkpoint(folder), config, read_manifest(folder))
    checkpoint = layout.checkpoint
    plans = {key: plan_read(e.extents, checkpoint.shard_bytes) for key, e in layout.experts.items()}
    opened = open_reader(reader, checkpoint.shards, checkpoint.shard_bytes)
    slots = slots or len(plans)
    c = config
    geometry = Geometry(c.num_moe_layers, c.num_experts, c.num_experts_per_tok, slots, per_layer)
    cache = ExpertCache(plans, opened, ReadQueue(opened), build_policy(policy, geometry), geometry, spare)
    kernels, format = make_context(threads, isa), next(iter(layout.experts.values())).format
    return Engine(Decoder(config, load_dense(layout), cache, context, kernels, format, exact))


def greedy(engine: Engine, prompt: list[int], new_tokens: int) -> list[int]:
    """Greedy continuation, without sampler or end of text."""
    shared = engine.reuse(prompt)
    logits = engine.prefill(prompt[shared:])
    out = [int(logits.argmax())]
    while len(out) < new_tokens:
        logits = engine.decode_one_token(out[-1])
        out.append(int(logits.argmax()))
    return out
