"""Make a larger Mixtral checkpoint that computes the same function, by padding with zeros.

    python scripts/widen_checkpoint.py SMOLMOE WIDE --hidden 2048 --width 768 --shard-bytes 2GB

For benchmarks: experts of the size of a large model's (2048 x 768: Qwen3-30B-A3B's), with the routing and the
text of the small one. Hidden size D becomes D', expert width W becomes W'; all other sizes stay.

Why the function is the same. The padding of embeddings, o_proj and w2 keeps the residual stream zero beyond
D, so the padded columns of the other matrices meet zeros; an expert's padded neurons give silu(0) * 0 = 0.
Only RMSNorm sees the width, in its mean: with eps' = eps D/D',

    x / sqrt(sum(x^2)/D' + eps')  =  sqrt(D'/D)  x / sqrt(sum(x^2)/D + eps)

and so norm weights are multiplied by sqrt(D/D'). That is no power of two in general, and rounding the product
to bf16 would change the function; therefore norm weights are stored as float32 (a rounding of 2**-24),
whatever the source has. A runtime that casts them to bf16 computes a slightly different function; FlashMoE
does not.

Zeros are written, not left as holes in the file: a hole is read at the speed of memory.
Experts come first in the files, w1, w3 and w2 of each one adjacent. Memory: one tensor, whatever the model.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flashmoe.demo_model.build import with_progress
from flashmoe.demo_model.new_folder import new_folder, write_synced
from flashmoe.demo_model.weights import EXPERT_NAME, LAYER_NAME, expert_of
from flashmoe.errors import FlashMoEError
from flashmoe.progress_bar import progress_bar
from flashmoe.sizes import parse_size
from storage.checkpoint import Checkpoint, open_checkpoint
from storage.safetensors_header import TensorInfo
from storage.safetensors_writer import TensorSpec, write_sharded
from storage.storage_errors import StorageError

PAGE_BYTES = 4096
COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
    "LICENSE",
    "NOTICE",
)
# Which axes of a tensor are D (hidden) and which W (expert width); "." is any other size.
AXES = {
    "w1": "WD",
    "w3": "WD",
    "w2": "DW",
    "block_sparse_moe.gate": ".D",
    "self_attn.q_proj": ".D",
    "self_attn.k_proj": ".D",
    "self_attn.v_proj": ".D",
    "self_attn.o_proj": "D.",
    "input_layernorm": "D",
    "post_attention_layernorm": "D",
    "model.norm": "D",
    "model.embed_tokens": ".D",
    "lm_head": ".D",
}
ORDER_IN_EXPERT = ("w1", "w3", "w2")
NUMPY_DTYPES = {"BF16": "<u2", "F16": "<f2", "F32": "<f4"}  # bf16 as its bits: zero is zero there too


class WidenError(FlashMoEError):
    """A checkpoint that cannot be widened as asked."""


@dataclass(frozen=True)
class Widening:
    """Hidden size and expert width, before and after."""

    hidden: int
    width: int
    new_hidden: int
    new_width: int

    def shape(self, kind: str, shape: tuple[int, ...], name: str) -> tuple[int, ...]:
        """A tensor's new shape. Raises WidenError where the old one is not what config.json says."""
        axes = AXES[kind]
        expected = {"D": self.hidden, "W": self.width}
        if len(shape) != len(axes) or any(
            axis in expected and size != expected[axis] for axis, size in zip(axes, shape, strict=True)
        ):
            raise WidenError(
                f"{name} is {list(shape)}; hidden size {self.hidden}, width {self.width} don't fit"
            )
        new = {"D": self.new_hidden, "W": self.new_width}
        return tuple(new.get(axis, size) for axis, size in zip(axes, shape, strict=True))

    @property
    def norm_factor(self) -> float:
        return math.sqrt(self.hidden / self.new_hidden)


def widen(
    source: Path,
    destination: Path,
    hidden: int,
    width: int,
    shard_bytes: int,
    layers: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> None:
    """Write the widened checkpoint as a new folder, which appears only when it is complete.

    `layers` keeps only the first that many: another function then, for small tests. Raises WidenError for a
    source or sizes that do not fit, StorageError for a full disk, OSError.
    """
    config = read_config(source)
    kept_layers = config["num_hidden_layers"] if layers is None else layers
    if not 1 <= kept_layers <= config["num_hidden_layers"]:
        raise WidenError(f"cannot keep {kept_layers} of {config['num_hidden_layers']} layers")
    widening = Widening(config["hidden_size"], config["intermediate_size"], hidden, width)
    if hidden < widening.hidden or width < widening.width:
        raise WidenError(
            f"{hidden} x {width} is narrower than the source's {widening.hidden} x {widening.width}"
        )
    if destination.exists():
        raise WidenError(f"{destination} exists; delete it or name another folder")
    checkpoint = open_checkpoint(source)
    tensors = [info for info in checkpoint.tensors.values() if _layer(info.name) < kept_layers]
    specs = [new_spec(info, widening) for info in sorted(tensors, key=_file_order)]
    data = with_progress(
        lambda name: widened_bytes(checkpoint, name, widening), specs, f"writing {destination.name}", progress
    )
    with new_folder(destination) as folder:
        write_sharded(folder, specs, data, shard_bytes, together=expert_of, metadata={"format": "pt"})
        for path in (source / name for name in COPIED if (source / name).is_file()):
            write_synced(folder / path.name, path.read_bytes())
        new_config = widened_config(config, widening, kept_layers)
        write_synced(folder / "config.json", json.dumps(new_config, indent=2).encode() + b"\n")


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a Mixtral. Raises WidenError for anything else."""
    path = folder / "config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_bytes())
        if config["model_type"] != "mixtral":
            raise WidenError(f"{path} has model_type {config['model_type']!r}; only mixtral can be widened")
        for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            if type(config[key]) is not int or config[key] < 1:
                raise WidenError(f"{path}: {key} is {config[key]!r}, not a positive number")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WidenError(f"{path} cannot be used: {error!r}") from error
    return config


def widened_config(config: dict[str, Any], widening: Widening, layers: int) -> dict[str, Any]:
    """The new config.json; head_dim becomes explicit, since hidden size / heads no longer gives it."""
    return config | {
        "hidden_size": widening.new_hidden,
        "intermediate_size": widening.new_width,
        "num_hidden_layers": layers,
        "head_dim": config.get("head_dim") or widening.hidden // config["num_attention_heads"],
        "rms_norm_eps": config.get("rms_norm_eps", 1e-5) * widening.hidden / widening.new_hidden,
    }


def new_spec(info: TensorInfo, widening: Widening) -> TensorSpec:
    """A tensor's widened shape and its dtype, float32 for norms. Raises WidenError for an unknown tensor."""
    kind = _kind(info.name)
    if kind not in AXES:
        raise WidenError(f"unknown tensor {info.name!r}; experts must be stored one by one, as w1, w2, w3")
    if info.dtype not in NUMPY_DTYPES:
        raise WidenError(f"{info.name} is {info.dtype}; supported: {', '.join(NUMPY_DTYPES)}")
    dtype = "F32" if _is_norm(kind) else info.dtype
    return TensorSpec(info.name, dtype, widening.shape(kind, info.shape, info.name))


def widened_bytes(checkpoint: Checkpoint, name: str, widening: Widening) -> memoryview:
    """A tensor's new bytes: the old values in the first rows and columns, zeros elsewhere."""
    info = checkpoint.tensors[name]
    spec = new_spec(info, widening)
    values = np.frombuffer(checkpoint.read_tensor(name), NUMPY_DTYPES[info.dtype]).reshape(info.shape)
    if _is_norm(_kind(name)):
        values = (_to_float64(values, info.dtype) * widening.norm_factor).astype("<f4")
    wide = np.zeros(spec.shape, NUMPY_DTYPES[spec.dtype])
    wide[tuple(slice(size) for size in info.shape)] = values
    return wide.data.cast("B")


def _to_float64(values: np.ndarray[Any, Any], dtype: str) -> np.ndarray[Any, Any]:
    if dtype == "BF16":
        values = (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float64)


def _kind(name: str) -> str:
    """What a tensor is, as a key of AXES where it is known."""
    if match := EXPERT_NAME.fullmatch(name):
        return match[3]
    match = LAYER_NAME.fullmatch(name)
    return match[2] if match else name.removesuffix(".weight")


def _is_norm(kind: str) -> bool:
    return AXES[kind] == "D"


def _layer(name: str) -> int:
    match = LAYER_NAME.fullmatch(name)
    return int(match[1]) if match else -1


def _file_order(info: TensorInfo) -> tuple[int, ...]:
    """Experts first, by layer, expert and matrix; then the dense weights as they were."""
    match = EXPERT_NAME.fullmatch(info.name)
    if match:
        return 0, int(match[1]), int(match[2]), ORDER_IN_EXPERT.index(match[3])
    return 1, info.shard, info.offset


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on a terminal, a line for each tenth elsewhere."""
    last_tenth = 0

    def line(what: str, done: int, total: int) -> None:
        nonlocal last_tenth
        if (tenth := 10 * done // total) > last_tenth:
            last_tenth = tenth
            print(f"{what}: {done / 1e9:.1f} of {total / 1e9:.1f} GB", file=sys.stderr, flush=True)

    with progress_bar() as bar:
        yield bar or line


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="a Mixtral folder with one tensor for each expert matrix")
    parser.add_argument("destination", type=Path, help="a folder that does not exist yet")
    parser.add_argument("--hidden", type=int, required=True, help="the new hidden size")
    parser.add_argument("--width", type=int, required=True, help="the new expert width")
    parser.add_argument("--shard-bytes", default="2GB", help="largest shard (default 2GB)")
    parser.add_argument("--layers", type=int, help="keep only the first N layers: NOT the same function")
    options = parser.parse_args()
    started = time.perf_counter()
    try:
        shard_bytes = parse_size(options.shard_bytes, free_bytes=None)
        with _progress() as progress:
            widen(
                options.source,
                options.destination,
                options.hidden,
                options.width,
                shard_bytes,
                options.layers,
                progress,
            )
    except (FlashMoEError, StorageError, OSError) as error:
        sys.exit(f"error: {error}")
    total_bytes = sum(path.stat().st_size for path in options.destination.iterdir())
    seconds = time.perf_counter() - started
    print(f"{options.destination}: {total_bytes / 1e9:.2f} GB in {seconds:.0f} s", file=sys.stderr)
    if options.layers is not None:
        print(f"it has only the first {options.layers} layers: another function", file=sys.stderr)
    if 3 * 2 * options.hidden * options.width % PAGE_BYTES:
        print(f"experts of this size do not begin on {PAGE_BYTES}-byte pages", file=sys.stderr)


if __name__ == "__main__":
    main()
