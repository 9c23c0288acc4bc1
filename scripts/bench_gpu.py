"""A whole model on the GPU, everything resident: decode and prefill beside the bound, and beside
transformers.

    python -m scripts.bench_gpu [--shapes demo-wide,qwen3-30b-a3b] [--experts int4] [--dense bf16] [--peers]
        [--batch 1,2,4,8]

Weights are random, of the shape of a published model, and made on the GPU: nothing is read from a drive. The
bound of a decode step is the bytes it must read from the GPU's memory (dense weights, router, the chosen
experts, each once, keys and values) over the rate of a large copy in the same run, counting bytes read and
written. `--batch`: so many conversations decode together; tokens a second are those of all.
Repetitions alternate with the peers'. Prints a table and, as its last line, one JSON object.

Peers: transformers on the same shape in bf16, with each of its expert implementations.
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import flashmoe
from flashmoe.config import ModelConfig, parse_model_config
from flashmoe.decoder import Stretch
from flashmoe.expert_slots import CacheCounters
from flashmoe.gpu_decoder import GpuDecoder
from flashmoe.gpu_kv_cache import GpuKVCache, GpuPages
from flashmoe.gpu_loader import slot_bytes
from flashmoe.gpu_model import GpuModel
from flashmoe.weights import DenseWeights, LayerWeights, Weight
from kernels.expert_slots import BITS, SCALE_BYTES, matrix_bytes, superblock_bytes
from kernels.native import Format
from kernels.triton_decode import ExpertDecode
from kernels.triton_moe import ExpertPrefill

SHAPES = {
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048, "num_hidden_layers": 48,
        "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
        "num_experts_per_tok": 8, "moe_intermediate_size": 768, "intermediate_size": 6144,
        "norm_topk_prob": True, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 40960,
        "hidden_act": "silu", "tie_word_embeddings": False, "mlp_only_layers": [], "decoder_sparse_step": 1,
    },
    "demo-wide": {
        "model_type": "mixtral", "vocab_size": 49152, "hidden_size": 2048, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "num_local_experts": 48,
        "num_experts_per_tok": 8, "intermediate_size": 768, "rms_norm_eps": 1e-5, "rope_theta": 1e5,
        "max_position_embeddings": 8192, "hidden_act": "silu", "tie_word_embeddings": True,
    },
}  # fmt: skip
CONTEXT, PREFIX = 1024, 64  # tokens of context, and in the KV cache when decoding is timed
IMPLEMENTATIONS = ("grouped_mm", "batched_mm", "eager")


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one engine on one shape: every repetition."""

    shape: str
    engine: str
    decode_tokens_per_s: list[float]
    prefill_s: list[float]
    bound_tokens_per_s: float | None

    def row(self) -> str:
        decode, prefill = statistics.median(self.decode_tokens_per_s), statistics.median(self.prefill_s)
        spread = f"{min(self.decode_tokens_per_s):.0f}–{max(self.decode_tokens_per_s):.0f}"
        bound = ""
        if self.bound_tokens_per_s is not None:
            bound = f"{self.bound_tokens_per_s:.0f} ({decode / self.bound_tokens_per_s:.0%})"
        cells = (self.shape, self.engine, f"{decode:.1f}", spread, bound, f"{prefill * 1e3:.1f}")
        return " | ".join(cells)


class AllResident:
    """What `GpuDecoder` asks of its experts, where each has a slot and none ever leaves."""

    is_complete, in_place = True, False

    def __init__(self) -> None:
        self.counters = CacheCounters()

    def commit(self) -> None:
        """Nothing was promoted."""

    def promote(self) -> None:
        """Nothing is to be."""


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--shapes", default="demo-wide,qwen3-30b-a3b", help="of " + ", ".join(SHAPES))
    add("--experts", default="int4", choices=("int4", "int8", "bf16"))
    add("--dense", default="bf16", choices=("int4", "int8", "bf16"))
    add("--peers", action="store_true", help="transformers, too")
    add("--layers", type=int, help="fewer layers than the shape has")
    add("--prompt", type=int, default=512, help="tokens of prefill")
    add("--tokens", type=int, default=64, help="tokens to decode")
    add("--batch", type=lambda text: [int(n) for n in text.split(",")], default=[1], help="conversations")
    add("--repeat", type=int, default=5)
    options = parser.parse_args()
    device = torch.device("cuda")
    rate = copy_rate(device)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; copy {rate / 1e12:.2f} TB/s")
    print("shape | engine | decode tok/s | min–max | bound | prefill ms")
    found = []
    for name in options.shapes.split(","):
        raw = SHAPES[name] | ({} if options.layers is None else {"num_hidden_layers": options.layers})
        for figures in measure_ours(name, raw, options, rate, device):
            found.append(figures)
            print(figures.row(), flush=True)
        release()
        for implementation in IMPLEMENTATIONS if options.peers else ():
            try:
                found.append(measure_peer(name, raw, implementation, options, device))
                print(found[-1].row(), flush=True)
            except (RuntimeError, ValueError) as error:
                print(f"{name} | transformers {implementation} | {str(error)[:200]}", flush=True)
            release()
    facts = {"version": flashmoe.__version__, "gpu": torch.cuda.get_device_name(), "copy_bytes_per_s": rate}
    print(json.dumps(facts | vars(options) | {"results": [asdict(figures) for figures in found]}))


class Distinct:
    """Counts the experts that a step needs, each once; a decoder's observer."""

    def __init__(self) -> None:
        self.experts = 0

    def forward_begins(self, token_ids: Sequence[int]) -> None:
        """Nothing to do."""

    def routed(self, layer: int, ids: Tensor, weights: Tensor, probabilities: Tensor) -> None:
        self.experts += len(ids.unique())

    def forward_ends(self) -> None:
        """Nothing to do."""


def measure_ours(
    name: str, raw: dict[str, object], options: argparse.Namespace, rate: float, device: torch.device
) -> list[Figures]:
    """Our decoder on random weights, for every number of conversations."""
    config = parse_model_config(raw)
    decoder = random_decoder(config, options.experts, options.dense, device, max(options.batch))
    generator = np.random.default_rng(0)
    count = PREFIX + options.tokens + 2
    texts = generator.integers(0, config.vocab_size, (max(options.batch), count)).tolist()
    prompt = generator.integers(0, config.vocab_size, options.prompt).tolist()
    kv_caches = [decoder.new_sequence() for _ in texts]
    kv_caches[0].claim(options.prompt)
    for kv_cache in kv_caches:
        kv_cache.claim(count)
    decode: dict[int, list[float]] = {batch: [] for batch in options.batch}
    experts, prefill = {}, []
    for _ in range(options.repeat + 1):  # the first captures graphs
        kv_caches[0].truncate(0)
        prefill.append(timed(lambda: decoder.forward_batch([Stretch(kv_caches[0], prompt)])))
        for batch, rates in decode.items():
            chats = list(zip(kv_caches[:batch], texts, strict=False))
            for kv_cache, text in chats:
                kv_cache.truncate(0)
                decoder.forward_batch([Stretch(kv_cache, text[:PREFIX])])

            def steps(begin: int, end: int, chats: list[tuple[GpuKVCache, list[int]]] = chats) -> None:
                for at in range(begin, end):
                    decoder.forward_batch([Stretch(kv_cache, [text[at]]) for kv_cache, text in chats])

            steps(PREFIX, PREFIX + 1)
            rates.append(batch * options.tokens / timed(lambda: steps(PREFIX + 1, count - 1)))  # noqa: B023
            decoder.observer = distinct = Distinct()
            steps(count - 1, count)
            decoder.observer, experts[batch] = None, distinct.experts
    found = []
    for batch, rates in decode.items():
        nbytes = bytes_a_step(
            config, options.experts, options.dense, experts[batch], batch * (PREFIX + options.tokens // 2)
        )
        engine = f"flashmoe {options.experts}" + (f", {batch} at once" if batch > 1 else "")
        found.append(Figures(name, engine, rates[1:], prefill[1:], batch * rate / nbytes))
    decoder.close()
    return found


def measure_peer(
    name: str, raw: dict[str, object], implementation: str, options: argparse.Namespace, device: torch.device
) -> Figures:
    """transformers, weights in bf16; what does not fit the card is an error."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind = str(raw["model_type"])
    config = AutoConfig.for_model(kind, **{k: v for k, v in raw.items() if k != "model_type"})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, experts_implementation=implementation
        )
    model = model.to_empty(device=device).eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    generator = torch.Generator(device).manual_seed(0)
    ids = torch.randint(config.vocab_size, (1, options.prompt), generator=generator, device=device)
    decode, prefill = [], []
    count = min(options.tokens, 16)
    with torch.inference_mode():
        for repetition in range(min(options.repeat, 3) + 1):
            prefill_s = timed(lambda: model(input_ids=ids, use_cache=True, logits_to_keep=1))
            cache = model(input_ids=ids[:, :PREFIX], use_cache=True).past_key_values

            def steps(cache: object = cache) -> None:
                for i in range(count):
                    model(input_ids=ids[:, i : i + 1], past_key_values=cache, use_cache=True)

            decode_s = timed(steps)
            if repetition:
                prefill.append(prefill_s)
                decode.append(count / decode_s)
    return Figures(name, f"transformers bf16 {implementation}", decode, prefill, None)


def random_decoder(
    config: ModelConfig, experts: str, dense: str, device: torch.device, rows: int = 1
) -> GpuDecoder:
    """A decoder whose weights are random and whose experts are all resident, for steps of so many rows."""
    generator = torch.Generator(device).manual_seed(0)
    form = Format[experts.upper()]
    moe, top_k = config.num_moe_layers, config.num_experts_per_tok
    arena = random_experts(config, form, moe * config.num_experts, device, generator)
    table = torch.arange(len(arena), dtype=torch.int32).view(moe, -1).pin_memory()
    pages = GpuPages(config, CONTEXT, rows * CONTEXT, rows, device)
    model = GpuModel(config, random_dense(config, dense, device, generator), pages, device, False)
    shape = (config.hidden_size, config.moe_intermediate_size, experts, config.hidden_act, top_k)
    decode = ExpertDecode(*shape, rows, device, False)
    prefill = ExpertPrefill(*shape, config.num_experts, 512, device)
    cache: Any = AllResident()
    return GpuDecoder(model, cache, decode, prefill, arena, table, most_rows=rows)


def random_experts(
    config: ModelConfig, form: Format, count: int, device: torch.device, generator: torch.Generator
) -> Tensor:
    """[count, slot bytes] uint8, weights of about unit gain."""
    stride, name = slot_bytes(config, form), form.name.lower()
    if name == "bf16":
        return torch.cat([
            torch.randn(256, stride // 2, generator=generator, device=device, dtype=torch.bfloat16)
            .mul_(config.hidden_size**-0.5).view(torch.uint8)[: min(256, count - i)]
            for i in range(0, count, 256)
        ])  # fmt: skip
    arena = torch.empty(count, stride, dtype=torch.uint8, device=device)
    for part in arena.split(1024):
        part.random_(0, 256, generator=generator)
        _set_scales(part.view(-1), name, config.hidden_size)
    return arena


def _set_scales(tiles: Tensor, name: str, columns: int) -> None:
    """Every superblock's, so that random codes have a spread of columns ** -0.5."""
    scale = columns**-0.5 / (4.6 if name == "int4" else 74.0)
    blocks = tiles.view(-1, superblock_bytes(name))[:, :SCALE_BYTES]
    scales = torch.full((SCALE_BYTES // 2,), scale, dtype=torch.float16, device=tiles.device)
    blocks.copy_(scales.view(torch.uint8))


def random_dense(
    config: ModelConfig, form: str, device: torch.device, generator: torch.Generator
) -> DenseWeights:
    """Everything but the experts; embedding and output in int8 where `form` is int4, as `pack` has it."""
    c, d = config, config.hidden_size

    def matrix(rows: int, columns: int, form: str = form) -> Weight:
        if form not in BITS:
            values = torch.randn(rows, columns, generator=generator, device=device, dtype=torch.bfloat16)
            return Weight(values.mul_(columns**-0.5).view(torch.uint8).view(-1), Format.BF16, rows, columns)
        data = torch.empty(matrix_bytes(form, rows, columns), dtype=torch.uint8, device=device)
        data.random_(0, 256, generator=generator)
        _set_scales(data, form, columns)
        return Weight(data, Format[form.upper()], rows, columns)

    def ones(n: int) -> Tensor:
        return 1 + 0.1 * torch.randn(n, generator=generator, device=device)

    heads, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    head_norm = c.family.qk_norm == "head"
    layers = [
        LayerWeights(
            input_norm=ones(d), post_attention_norm=ones(d),
            qkv=matrix(heads + 2 * kv, d), qkv_bias=None, o=matrix(d, heads), o_bias=None,
            q_norm=ones(c.head_dim) if head_norm else None, k_norm=ones(c.head_dim) if head_norm else None,
            router=torch.randn(c.num_experts, d, generator=generator, device=device) * d**-0.5,
            mlp=None, shared_gate=None,
        )
        for _ in range(c.num_hidden_layers)
    ]  # fmt: skip
    output = "int8" if form == "int4" else form
    embedding = matrix(c.vocab_size, d, output)
    lm_head = embedding if c.tie_word_embeddings else matrix(c.vocab_size, d, output)
    return DenseWeights(embedding=embedding, layers=layers, norm=ones(d), lm_head=lm_head)


def bytes_a_step(config: ModelConfig, experts: str, dense: str, chosen: int, seen: int) -> int:
    """What one decode step must read at the least: `chosen` experts in all layers, `seen` keys of a layer."""
    c, d = config, config.hidden_size
    heads, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    output = "int8" if dense == "int4" else dense
    attention = matrix_bytes(dense, heads + 2 * kv, d) + matrix_bytes(dense, d, heads)
    layers = c.num_hidden_layers * (attention + 4 * c.num_experts * d + 2 * 2 * kv * seen)
    return layers + chosen * slot_bytes(c, Format[experts.upper()]) + matrix_bytes(output, c.vocab_size, d)


def copy_rate(device: torch.device) -> float:
    """Bytes a second, read and written, of a large copy on the GPU; the median of ten."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device).random_(0, 256)
    target = torch.empty_like(source)
    target.copy_(source)
    return statistics.median(2 * len(source) / timed(lambda: target.copy_(source)) for _ in range(10))


def timed(work: Callable[[], object]) -> float:
    """Seconds, until the GPU has done it."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def release() -> None:
    """The memory of what nobody refers to any more."""
    gc.collect()
    torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
