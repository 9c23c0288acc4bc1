#!/usr/bin/env python3
"""Convert a Mixtral checkpoint to GGUF, for llama.cpp to run the same weights as FlashMoE does.

    scripts/gguf_from_checkpoint.py WIDE OUT --types q4_0 q8_0

Writes OUT/bf16.gguf, then OUT/q4_0.gguf and OUT/q8_0.gguf as llama.cpp quantises them (its
`llama_model_quantize`, through llama-cpp-python), and deletes the bf16 file unless `bf16` is among the types.
For benchmarks against llama.cpp (scripts/bench_peers.py); FlashMoE itself reads no GGUF.

Written as llama.cpp's own convert_hf_to_gguf.py writes its architecture "llama": an expert's matrices stacked
over the experts, rows of q and k in llama.cpp's order of rotary pairs, norms and router as float32.
Memory: one stacked matrix of one layer. Needs numpy and gguf, and llama-cpp-python for other types than bf16;
not torch. Covers byte-level BPE tokenizers only.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from storage.checkpoint import Checkpoint, open_checkpoint  # noqa: E402
from storage.storage_errors import StorageError  # noqa: E402

BF16, F32 = gguf.GGMLQuantizationType.BF16, gguf.GGMLQuantizationType.F32
FILE_TYPES = {
    "bf16": gguf.LlamaFileType.MOSTLY_BF16,
    "q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}
GLOBAL_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate_inp": "block_sparse_moe.gate",
}
EXPERT_NAMES = {"ffn_gate_exps": "w1", "ffn_up_exps": "w3", "ffn_down_exps": "w2"}
AS_FLOAT32 = ("norm", "ffn_gate_inp")  # llama.cpp computes these in float32 whatever the rest is


class ConversionError(Exception):
    """A checkpoint that cannot be written as GGUF, or llama.cpp's refusal to quantise it."""


@dataclass(frozen=True)
class GgufTensor:
    """One tensor to be: the checkpoint tensors that it stacks (one, or one an expert), its shape and type."""

    name: str
    sources: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: gguf.GGMLQuantizationType
    rotary_heads: int | None = None  # q and k: their rows are reordered within each of so many heads

    @property
    def nbytes(self) -> int:
        elements: int = np.prod(self.shape, dtype=np.int64).item()
        return elements * (2 if self.dtype == BF16 else 4)


def write_bf16(source: Path, destination: Path, pre_tokenizer: str) -> None:
    """Write the GGUF, whose matrices keep their bits. Raises ConversionError, StorageError, OSError."""
    config = read_config(source)
    checkpoint = open_checkpoint(source)
    tensors = gguf_tensors(config, checkpoint)
    writer = gguf.GGUFWriter(destination, "llama")
    add_hyperparameters(writer, config)
    add_tokenizer(writer, json.loads((source / "tokenizer.json").read_bytes()), config, pre_tokenizer)
    for tensor in tensors:
        plain = np.dtype(np.uint16 if tensor.dtype == BF16 else np.float32)
        writer.add_tensor_info(tensor.name, tensor.shape, plain, tensor.nbytes, tensor.dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(tensor_values(checkpoint, tensor))
    writer.close()


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a Mixtral. Raises ConversionError for anything else."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_bytes())
    if config.get("model_type") != "mixtral":
        raise ConversionError(f"{folder} is a {config.get('model_type')!r}; only mixtral can be converted")
    if config.get("sliding_window") is not None:
        raise ConversionError(f"{folder} has a sliding window, which this converter does not write")
    return config


def gguf_tensors(config: dict[str, Any], checkpoint: Checkpoint) -> list[GgufTensor]:
    """Every tensor of the file, in file order: layer by layer, as llama.cpp's converter writes them."""

    def one(name: str, sources: Sequence[str], heads: int | None = None) -> GgufTensor:
        infos = [_info(checkpoint, source) for source in sources]
        shape = infos[0].shape if len(infos) == 1 else (len(infos), *infos[0].shape)
        dtype = F32 if any(part in name for part in AS_FLOAT32) else BF16
        return GgufTensor(f"{name}.weight", tuple(sources), shape, dtype, heads)

    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors = [one("token_embd", ["model.embed_tokens.weight"])]
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        tensors += [
            one(f"blk.{layer}.{name}", [f"{at}.{theirs}.weight"], heads.get(name))
            for name, theirs in LAYER_NAMES.items()
        ]
        experts = [f"{at}.block_sparse_moe.experts.{e}" for e in range(config["num_local_experts"])]
        tensors += [
            one(f"blk.{layer}.{name}", [f"{expert}.{matrix}.weight" for expert in experts])
            for name, matrix in EXPERT_NAMES.items()
        ]
    tensors.append(one("output_norm", ["model.norm.weight"]))
    if not config.get("tie_word_embeddings", False):
        tensors.append(one("output", ["lm_head.weight"]))
    return tensors


def _info(checkpoint: Checkpoint, name: str) -> Any:
    if name not in checkpoint.tensors:
        raise ConversionError(f"{checkpoint.folder} has no tensor {name}")
    info = checkpoint.tensors[name]
    if info.dtype not in ("BF16", "F32"):
        raise ConversionError(f"{name} is {info.dtype}; only BF16 and F32 can be converted")
    return info


def tensor_values(checkpoint: Checkpoint, tensor: GgufTensor) -> NDArray[Any]:
    """A tensor's values in its GGUF shape: float32, or bf16 as its bits (uint16)."""
    out = np.empty(tensor.shape, np.uint16 if tensor.dtype == BF16 else np.float32)
    rows = out if len(tensor.sources) > 1 else out[None]
    for row, name in zip(rows, tensor.sources, strict=True):
        row[...] = _converted(checkpoint, name, tensor)
    return out


def _converted(checkpoint: Checkpoint, name: str, tensor: GgufTensor) -> NDArray[Any]:
    info = checkpoint.tensors[name]
    stored = np.frombuffer(checkpoint.read_tensor(name), "<u2" if info.dtype == "BF16" else "<f4")
    values = stored.reshape(info.shape)
    if info.dtype == "BF16" and tensor.dtype == F32:
        values = (values.astype(np.uint32) << 16).view(np.float32)
    if info.dtype == "F32" and tensor.dtype == BF16:
        raise ConversionError(f"{name} is F32; rounding it to bf16 would make another model")
    return values if tensor.rotary_heads is None else permute_rotary(values, tensor.rotary_heads)


def permute_rotary(weight: NDArray[Any], heads: int) -> NDArray[Any]:
    """Rows of q or k in llama.cpp's order (`LlamaModel.permute` in its convert_hf_to_gguf.py).

    Hugging Face pairs rotary dimensions as (0, half), (1, half + 1) …; GGUF as (0, 1), (2, 3) ….
    """
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)


def add_hyperparameters(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    rope = config.get("rope_parameters") or {}
    writer.add_file_type(FILE_TYPES["bf16"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.get("rope_theta") or rope.get("rope_theta", 1e6))
    writer.add_layer_norm_rms_eps(config.get("rms_norm_eps", 1e-5))
    writer.add_expert_count(config["num_local_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])


def add_tokenizer(
    writer: gguf.GGUFWriter, tokenizer: dict[str, Any], config: dict[str, Any], pre_tokenizer: str
) -> None:
    """The vocabulary and merges of a byte-level BPE tokenizer.json."""
    if tokenizer["model"]["type"] != "BPE":
        raise ConversionError(f"the tokenizer is {tokenizer['model']['type']}; only BPE can be converted")
    tokens, types = vocabulary(tokenizer, config["vocab_size"])
    merges = tokenizer["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_add_bos_token(False)
    for key, add in (
        ("bos_token_id", writer.add_bos_token_id),
        ("eos_token_id", writer.add_eos_token_id),
        ("pad_token_id", writer.add_pad_token_id),
    ):
        if isinstance(config.get(key), int):
            add(config[key])


def vocabulary(tokenizer: dict[str, Any], size: int) -> tuple[list[str], list[gguf.TokenType]]:
    """Text and type of every token id; ids that the tokenizer does not name become unused ones."""
    by_id = {token_id: text for text, token_id in tokenizer["model"]["vocab"].items()}
    added = {token["id"]: token for token in tokenizer.get("added_tokens", ())}
    by_id |= {token_id: token["content"] for token_id, token in added.items()}
    if max(by_id) >= size:
        raise ConversionError(f"the tokenizer knows id {max(by_id)}; the model has {size} tokens")

    def kind(token_id: int) -> gguf.TokenType:
        if token_id not in by_id:
            return gguf.TokenType.UNUSED
        if token_id not in added:
            return gguf.TokenType.NORMAL
        return gguf.TokenType.CONTROL if added[token_id]["special"] else gguf.TokenType.USER_DEFINED

    return [by_id.get(i, f"[PAD{i}]") for i in range(size)], [kind(i) for i in range(size)]


def quantise(source: Path, destination: Path, file_type: str, threads: int) -> None:
    """Let llama.cpp write `source` in another type. Raises ConversionError when it does not."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = int(FILE_TYPES[file_type])
    params.nthread = threads
    if failed := llama_cpp.llama_model_quantize(str(source).encode(), str(destination).encode(), params):
        raise ConversionError(f"llama.cpp could not write {destination}: error {failed}")


def convert(
    source: Path, folder: Path, types: Sequence[str], pre_tokenizer: str, threads: int
) -> Iterator[Path]:
    """Write every type that is not there yet; yields the files as they are done."""
    folder.mkdir(parents=True, exist_ok=True)
    bf16 = folder / "bf16.gguf"
    if not bf16.exists():
        unfinished = bf16.with_suffix(".unfinished")
        write_bf16(source, unfinished, pre_tokenizer)
        unfinished.rename(bf16)
    yield bf16
    for file_type in types:
        if file_type != "bf16":
            quantise(bf16, folder / f"{file_type}.gguf", file_type, threads)
            yield folder / f"{file_type}.gguf"
    if "bf16" not in types:
        bf16.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="a Mixtral folder with one tensor for each expert matrix")
    parser.add_argument("folder", type=Path, help="where the .gguf files go; an existing bf16.gguf is used")
    parser.add_argument("--types", nargs="+", choices=sorted(FILE_TYPES), default=["q4_0", "q8_0"])
    parser.add_argument("--pre-tokenizer", default="smollm", help="llama.cpp's name of it")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    try:
        for path in convert(
            options.source, options.folder, options.types, options.pre_tokenizer, options.threads
        ):
            print(f"{path}: {path.stat().st_size} bytes", file=sys.stderr)
    except (ConversionError, StorageError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
