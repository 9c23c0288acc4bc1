"""The two configurations: `ModelConfig` is read from a checkpoint's config.json (tolerant: unknown keys are
not ours), `RunConfig` comes from the user (strict: an impossible option is an error).

Knows nothing about tensors or files other than config.json.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flashmoe.errors import ConfigError
from flashmoe.models import FAMILIES
from flashmoe.models.family import FamilySpec
from flashmoe.policies import check_policy

CONFIG_BYTES_LIMIT = 4 << 20  # published files are below 10 kB; anything far larger is not a config
_ORIGINAL = "original_max_position_embeddings"
_ROPE_NUMBERS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
ROPE_TYPES = tuple(_ROPE_NUMBERS)
_YARN_OPTIONS = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu")
SCOPES = ("global", "layer")
READER_NAMES = ("auto", "direct", "buffered", "mmap")
DEVICES = ("auto", "cpu", "cuda")
CPU_EXPERTS = ("auto", "never", "always")
# What flashmoe/predictors.py builds; here, since naming them needs no torch.
PREDICTOR_NAMES = ("next-router", "transitions", "maps", "learned")
MAX_DEFAULT_CONTEXT = 8192
LARGEST_NUMBER = 1e30
MOST_BATCHED = 64


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
    asked_for_all = "num_key_value_heads" in raw and raw["num_key_value_heads"] is None
    kv_heads = heads if asked_for_all else read.integer("num_key_value_heads", default=heads)
    experts = read.integer("num_experts", "num_local_experts", limit=65_536)
    top_k = read.integer("num_experts_per_tok")
    head_dim = read.integer("head_dim", default=max(1, hidden // heads))
    hidden_act = "silu" if read.get("hidden_act") is None else read.get("hidden_act")
    if heads % kv_heads:
        raise ConfigError(
            f"config.json: {heads} attention heads cannot share {kv_heads} key/value heads evenly"
        )
    if head_dim % 2:
        raise ConfigError(f"config.json: head_dim {head_dim} is odd; rotary embeddings need pairs")
    if top_k > experts:
        raise ConfigError(f"config.json: num_experts_per_tok {top_k} exceeds num_experts {experts}")
    if not isinstance(hidden_act, str) or hidden_act not in ACTIVATIONS:
        raise ConfigError(
            f"config.json: hidden_act {hidden_act!r} is not supported; supported: {', '.join(ACTIVATIONS)}"
        )
    if raw.get("quantization_config") is not None:
        given = raw["quantization_config"]
        method = given.get("quant_method", "unknown") if isinstance(given, dict) else given
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
        tie_word_embeddings=read.flag("tie_word_embeddings"),
        hidden_act=hidden_act,
        num_experts=experts,
        num_experts_per_tok=top_k,
        norm_topk_prob=spec.always_renormalise or read.flag("norm_topk_prob"),
        moe_intermediate_size=read.integer(*spec.width_keys),
        intermediate_size=read.count("intermediate_size", default=0),
        shared_expert_intermediate_size=(
            read.integer("shared_expert_intermediate_size") if spec.shared_expert else 0
        ),
        qkv_bias=spec.qkv_bias_key is not None and read.flag(spec.qkv_bias_key),
        o_bias=spec.o_bias_key is not None and read.flag(spec.o_bias_key),
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

    def integer(self, *keys: str, default: int | None = None, limit: int = 1 << 31, least: int = 1) -> int:
        """A whole number from `least` to `limit`, under the first of `keys` that is there."""
        value = next((v for key in keys if (v := self.get(key)) is not None), default)
        if value is None:
            raise ConfigError(f"config.json: {' or '.join(keys)} is missing")
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= limit:
            given = repr(value)[:40]
            raise ConfigError(
                f"config.json: {keys[0]} is {given}, not a whole number from {least} to {limit}"
            )
        return value

    def count(self, key: str, default: int) -> int:
        """Like `integer`, and may be zero."""
        return self.integer(key, default=default, least=0)

    def number(self, key: str, source: Mapping[str, Any] | None = None) -> float:
        value = self.get(key) if source is None else source.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < LARGEST_NUMBER:
            raise ConfigError(f"config.json: {key} is {repr(value)[:40]}, not a positive number")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.get(key)
        if value is not None and not isinstance(value, bool):
            raise ConfigError(f"config.json: {key} is {value!r}, neither true nor false")
        return bool(value)


def _rope(read: _Reader) -> RopeConfig:
    """rope_theta + rope_scaling (transformers 4) or rope_parameters (transformers 5)."""
    parameters = read.get("rope_parameters") or read.get("rope_scaling") or {}
    if not isinstance(parameters, dict):
        raise ConfigError(f"config.json: rope parameters are a {type(parameters).__name__}, not an object")
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind not in ROPE_TYPES:
        known = ", ".join(ROPE_TYPES)
        raise ConfigError(f"config.json: rope type {kind!r} is not supported; supported: {known}")
    thetas = (parameters.get("rope_theta"), read.get("rope_theta"), 1e4)
    theta = read.number("rope_theta", {"rope_theta": next(t for t in thetas if t is not None)})
    if theta <= 1:
        raise ConfigError(f"config.json: rope_theta is {theta}; it must be above 1")
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError("config.json: partial_rotary_factor other than 1 is not supported for this family")
    if kind in ("yarn", "llama3"):
        positions = read.integer("max_position_embeddings")
        sources = (read.get(_ORIGINAL), parameters.get(_ORIGINAL), positions)
        parameters = parameters | {_ORIGINAL: next(p for p in sources if p is not None)}
        read.number(_ORIGINAL, parameters)
        if kind == "yarn" and parameters.get("factor") is None:
            parameters["factor"] = positions / parameters[_ORIGINAL]
    for key in _ROPE_NUMBERS[kind]:
        read.number(key, parameters)
    for key in _YARN_OPTIONS if kind == "yarn" else ():
        if parameters.get(key) is not None:
            read.number(key, parameters)
    if kind == "llama3" and parameters["low_freq_factor"] >= parameters["high_freq_factor"]:
        raise ConfigError("config.json: low_freq_factor is not below high_freq_factor")
    return RopeConfig(str(kind), theta, dict(parameters))


def _sliding_windows(read: _Reader, spec: FamilySpec, layers: int) -> tuple[int | None, ...]:
    window = read.get("sliding_window")
    if spec.sliding_window == "none" or window is None:
        return (None,) * layers
    if spec.sliding_window != "all" and not read.flag("use_sliding_window"):
        return (None,) * layers
    if spec.sliding_window != "layer_types":
        return (read.integer("sliding_window"),) * layers
    types = read.get("layer_types")
    if types is None:  # Qwen2-MoE's rule: every second layer below max_window_layers slides
        below = read.count("max_window_layers", default=28)
        types = ["sliding_attention" if i % 2 == 0 and i < below else "full_attention" for i in range(layers)]
    if not isinstance(types, list) or len(types) != layers:
        raise ConfigError(f"config.json: layer_types does not name {layers} layers")
    if "sliding_attention" not in types:
        return (None,) * layers
    window = read.integer("sliding_window")
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def _moe_layers(read: _Reader, layers: int) -> tuple[bool, ...]:
    dense = read.get("mlp_only_layers") or []
    step = read.integer("decoder_sparse_step", default=1)
    if not isinstance(dense, list) or not all(type(layer) is int for layer in dense):
        raise ConfigError("config.json: mlp_only_layers is not a list of layer numbers")
    without = set(dense)
    chosen = tuple(i not in without and (i + 1) % step == 0 for i in range(layers))
    if not any(chosen):
        raise ConfigError("config.json: no layer has experts; this is a dense model")
    return chosen


@dataclass(frozen=True, slots=True)
class RunConfig:
    """What the user chose. `ram_budget` is text ("16G", "80%", "auto"); `context` None means: what fits."""

    ram_budget: str = "auto"
    policy: str = "learned"
    reader: str = "auto"
    context: int | None = None
    threads: int | None = None
    seed: int = 0
    exact_activations: bool = False  # fp32 activations also for int4 and int8 weights
    check_reads: bool = False  # compare every expert read with its checksum
    scope: str = "global"  # of the policy's capacity: all layers share it, or "layer": each has its own
    prefetch: str = "auto"  # if it is measured to pay, or "off"; a number: at most so many guesses a layer
    learn: bool = False  # keep the routing of chats, and train the learned policy on it
    predictor: str = PREDICTOR_NAMES[0]  # who guesses what prefetch reads
    device: str = "cpu"  # what computes; "auto": a GPU if there is one
    vram_budget: str = "auto"  # as ram_budget, of the GPU
    cpu_experts: str = "auto"  # whether the CPU computes an expert that is in RAM but not in VRAM
    token_rounding: bool = False  # on a GPU: prompts keep only as many tokens of an expert as fill tiles
    max_batch: int = 1  # generations that are computed together
    session_cache: str | None = None  # folder that keeps conversations' keys and values; None: none does
    session_cache_size: str = "4G"  # the most that this folder may hold

    def __post_init__(self) -> None:
        if not isinstance(self.ram_budget, str):
            raise ConfigError(f"ram_budget is {self.ram_budget!r}, not text such as 16G")
        check_policy(self.policy)
        if self.reader not in READER_NAMES:
            raise ConfigError(f"unknown reader {self.reader!r}; known are {', '.join(READER_NAMES)}")
        if self.scope not in SCOPES:
            raise ConfigError(f"unknown scope {self.scope!r}; known are {', '.join(SCOPES)}")
        if self.prefetch not in ("auto", "off"):
            if not (isinstance(self.prefetch, str) and self.prefetch.isascii() and self.prefetch.isdigit()):
                raise ConfigError(f"--prefetch {self.prefetch!r} is not auto, off or a number of guesses")
            self._check_whole("prefetch", int(self.prefetch), 1, 64)
        if self.predictor not in PREDICTOR_NAMES:
            raise ConfigError(f"unknown predictor {self.predictor!r}; known are {', '.join(PREDICTOR_NAMES)}")
        if self.device not in DEVICES:
            raise ConfigError(f"unknown device {self.device!r}; known are {', '.join(DEVICES)}")
        if not isinstance(self.vram_budget, str):
            raise ConfigError(f"vram_budget is {self.vram_budget!r}, not text such as 8G")
        if self.cpu_experts not in CPU_EXPERTS:
            raise ConfigError(f"--cpu-experts {self.cpu_experts!r}: known are {', '.join(CPU_EXPERTS)}")
        self._check_whole("context", self.context, 16, 1 << 31)
        self._check_whole("threads", self.threads, 1, 1024)
        self._check_whole("seed", self.seed, 0, 2**63 - 1)
        self._check_whole("max-batch", self.max_batch, 1, MOST_BATCHED)
        if self.session_cache is not None and not isinstance(self.session_cache, str):
            raise ConfigError(f"session_cache is {self.session_cache!r}, not the path of a folder")
        if not isinstance(self.session_cache_size, str):
            raise ConfigError(f"session_cache_size is {self.session_cache_size!r}, not text such as 4G")

    @staticmethod
    def _check_whole(name: str, value: int | None, least: int, most: int) -> None:
        if value is None:
            return
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(f"--{name} {value!r} is not a whole number")
        if value < least:
            raise ConfigError(f"--{name} {value} is too small; the least is {least}")
        if value > most:
            raise ConfigError(f"--{name} {value} is too large; the most is {most}")
