"""The two configurations: `ModelConfig` is read from a checkpoint's config.json (tolerant: unknown keys are
not ours), `RunConfig` comes from the user (strict: an impossible option is an error).

Knows nothing about tensors or files other than config.json.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flashmoe.errors import ConfigError
from flashmoe.models import FAMILIES
from flashmoe.models.family import FamilySpec

CONFIG_BYTES_LIMIT = 4 << 20  # published files are below 10 kB; anything far larger is not a config
ROPE_TYPES = ("default", "linear", "yarn", "llama3")
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu")
MAX_DEFAULT_CONTEXT = 8192


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding as configured: `parameters` holds what the scaled kinds need (factor and so on)."""

    rope_type: str
    theta: float
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder's shape. Field names are those of config.json; per-layer facts are tuples of length L."""

    family: FamilySpec
    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    max_position_embeddings: int
    tie_word_embeddings: bool
    hidden_act: str
    num_experts: int
    num_experts_per_tok: int
    norm_topk_prob: bool
    moe_intermediate_size: int
    intermediate_size: int  # width of the layers without experts
    shared_expert_intermediate_size: int  # 0: none
    qkv_bias: bool
    o_bias: bool
    clip_qkv: float | None
    sliding_windows: tuple[int | None, ...]
    moe_layers: tuple[bool, ...]

    @property
    def num_moe_layers(self) -> int:
        return sum(self.moe_layers)

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of all layers in fp32, bytes."""
        return 2 * 4 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim


def load_model_config(folder: Path) -> ModelConfig:
    """Read config.json of a checkpoint folder; ConfigError says what is missing or not supported."""
    path = folder / "config.json"
    if not path.is_file():
        raise ConfigError(f"{folder} has no config.json; --model takes a folder of Hugging Face safetensors")
    if path.stat().st_size > CONFIG_BYTES_LIMIT:
        raise ConfigError(
            f"{path} has {path.stat().st_size} bytes; a config.json is below {CONFIG_BYTES_LIMIT}"
        )
    try:
        raw = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds a {type(raw).__name__}, not an object")
    return parse_model_config(raw)


def parse_model_config(raw: Mapping[str, Any]) -> ModelConfig:
    """Turn a config.json into a ModelConfig; reads the spellings of transformers 4 and 5."""
    spec = FAMILIES.get(str(raw.get("model_type")))
    if spec is None:
        raise ConfigError(
            f"architecture {raw.get('model_type')!r} is not supported;"
            f" supported: {', '.join(sorted(FAMILIES))}"
        )
    read = _Reader(raw, spec.defaults)
    layers = read.integer("num_hidden_layers", limit=10_000)
    hidden, heads = read.integer("hidden_size"), read.integer("num_attention_heads")
    kv_heads = read.integer("num_key_value_heads", default=heads)
    experts = read.integer("num_experts", "num_local_experts", "n_routed_experts", limit=65_536)
    top_k = read.integer("num_experts_per_tok")
    head_dim = read.integer("head_dim", default=hidden // heads)
    hidden_act = read.get("hidden_act") or "silu"
    if heads % kv_heads:
        raise ConfigError(
            f"config.json: {heads} attention heads cannot share {kv_heads} key/value heads evenly"
        )
    if head_dim % 2:
        raise ConfigError(f"config.json: head_dim {head_dim} is odd; rotary embeddings need pairs")
    if top_k > experts:
        raise ConfigError(f"config.json: num_experts_per_tok {top_k} exceeds num_experts {experts}")
    if hidden_act not in ACTIVATIONS:
        raise ConfigError(
            f"config.json: hidden_act {hidden_act!r} is not supported; supported: {', '.join(ACTIVATIONS)}"
        )
    if raw.get("quantization_config"):
        method = dict(raw["quantization_config"]).get("quant_method", "unknown")
        raise ConfigError(f"config.json: {method} quantised checkpoints are not supported; use the bf16 one")
    return ModelConfig(
        family=spec,
        model_type=spec.model_type,
        vocab_size=read.integer("vocab_size"),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=read.number("rms_norm_eps"),
        rope=_rope(read),
        max_position_embeddings=read.integer("max_position_embeddings"),
        tie_word_embeddings=bool(read.get("tie_word_embeddings")),
        hidden_act=hidden_act,
        num_experts=experts,
        num_experts_per_tok=top_k,
        norm_topk_prob=spec.always_renormalise or bool(read.get("norm_topk_prob")),
        moe_intermediate_size=read.integer(*spec.width_keys),
        intermediate_size=read.integer("intermediate_size", default=0),
        shared_expert_intermediate_size=(
            read.integer("shared_expert_intermediate_size") if spec.shared_expert else 0
        ),
        qkv_bias=bool(spec.qkv_bias_key and read.get(spec.qkv_bias_key)),
        o_bias=bool(spec.o_bias_key and read.get(spec.o_bias_key)),
        clip_qkv=read.number("clip_qkv") if read.get("clip_qkv") is not None else None,
        sliding_windows=_sliding_windows(read, spec, layers),
        moe_layers=_moe_layers(read, layers),
    )


class _Reader:
    """Checked access to config.json with the family's defaults behind it."""

    def __init__(self, raw: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        self.raw, self.defaults = raw, defaults

    def get(self, key: str) -> Any:
        value = self.raw.get(key)
        return self.defaults.get(key) if value is None else value

    def integer(self, *keys: str, default: int | None = None, limit: int = 1 << 31) -> int:
        value = next((v for key in keys if (v := self.get(key)) is not None), default)
        if value is None:
            raise ConfigError(f"config.json: {' or '.join(keys)} is missing")
        floor = 0 if default == 0 else 1
        if isinstance(value, bool) or not isinstance(value, int) or not floor <= value <= limit:
            raise ConfigError(
                f"config.json: {keys[0]} is {value!r}, not a whole number from {floor} to {limit}"
            )
        return value

    def number(self, key: str, source: Mapping[str, Any] | None = None) -> float:
        value = self.get(key) if source is None else source.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ConfigError(f"config.json: {key} is {value!r}, not a positive number")
        return float(value)


def _rope(read: _Reader) -> RopeConfig:
    """rope_theta + rope_scaling (transformers 4) or rope_parameters (transformers 5)."""
    parameters = read.get("rope_parameters") or read.get("rope_scaling") or {}
    if not isinstance(parameters, dict):
        raise ConfigError(f"config.json: rope parameters are a {type(parameters).__name__}, not an object")
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind not in ROPE_TYPES:
        raise ConfigError(
            f"config.json: rope type {kind!r} is not supported; supported: {', '.join(ROPE_TYPES)}"
        )
    theta = read.number(
        "rope_theta", {"rope_theta": parameters.get("rope_theta") or read.get("rope_theta") or 1e4}
    )
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError("config.json: partial_rotary_factor other than 1 is not supported for this family")
    needed = {
        "default": (),
        "linear": ("factor",),
        "yarn": (),
        "llama3": ("low_freq_factor", "high_freq_factor", "factor"),
    }
    for key in needed[kind]:
        read.number(key, parameters)
    if kind in ("yarn", "llama3"):
        original = read.get("original_max_position_embeddings") or parameters.get(
            "original_max_position_embeddings"
        )
        parameters = {
            **parameters,
            "original_max_position_embeddings": original or read.integer("max_position_embeddings"),
        }
        read.number("original_max_position_embeddings", parameters)
        if parameters.get("factor") is None:
            parameters["factor"] = (
                read.integer("max_position_embeddings") / parameters["original_max_position_embeddings"]
            )
        read.number("factor", parameters)
    return RopeConfig(str(kind), theta, dict(parameters))


def _sliding_windows(read: _Reader, spec: FamilySpec, layers: int) -> tuple[int | None, ...]:
    window = read.get("sliding_window")
    if spec.sliding_window == "none" or window is None:
        return (None,) * layers
    if spec.sliding_window != "all" and not read.get("use_sliding_window"):
        return (None,) * layers
    window = read.integer("sliding_window")
    if spec.sliding_window != "layer_types":
        return (window,) * layers
    types = read.get("layer_types")
    if types is None:  # Qwen2-MoE's rule: every second layer below max_window_layers slides
        below = read.integer("max_window_layers", default=28)
        types = ["sliding_attention" if i % 2 == 0 and i < below else "full_attention" for i in range(layers)]
    if not isinstance(types, list) or len(types) != layers:
        raise ConfigError(f"config.json: layer_types does not name {layers} layers")
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def _moe_layers(read: _Reader, layers: int) -> tuple[bool, ...]:
    dense = read.get("mlp_only_layers") or []
    step = read.integer("decoder_sparse_step", default=1)
    if not isinstance(dense, list):
        raise ConfigError(f"config.json: mlp_only_layers is {dense!r}, not a list")
    chosen = tuple(i not in dense and (i + 1) % step == 0 for i in range(layers))
    if not any(chosen):
        raise ConfigError("config.json: no layer has experts; this is a dense model")
    return chosen


@dataclass(frozen=True, slots=True)
class RunConfig:
    """What the user chose. `ram_budget` is text ("16G", "80%", "auto"); `context` None means: what fits."""

    ram_budget: str = "auto"
    policy: str = "lru"
    reader: str = "auto"
    context: int | None = None
    threads: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.context is not None and self.context < 16:
            raise ConfigError(f"--context {self.context} is too small; the least is 16 tokens")
        if self.threads is not None and not 1 <= self.threads <= 1024:
            raise ConfigError(f"--threads {self.threads} is not between 1 and 1024")
        if self.reader not in ("auto", "direct", "buffered", "mmap"):
            raise ConfigError(f"--reader {self.reader!r} is unknown; known: auto, direct, buffered, mmap")
