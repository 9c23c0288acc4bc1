"""config.json and the user's options: what is read, what is refused, which defaults hold."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmoe.config import CONFIG_BYTES_LIMIT, ModelConfig, RunConfig, load_model_config, parse_model_config
from flashmoe.errors import ConfigError
from flashmoe.models import FAMILIES
from flashmoe.rotary import inverse_frequencies

transformers = pytest.importorskip("transformers", reason="transformers is the oracle; pip install -e .[dev]")

CLASSES = {"mixtral": "Mixtral", "olmoe": "Olmoe", "qwen2_moe": "Qwen2Moe", "qwen3_moe": "Qwen3Moe"}

# As published, in the spelling of transformers 4; keys without a meaning here are left in on purpose.
PUBLISHED: dict[str, dict[str, Any]] = {
    "Mixtral-8x7B-v0.1": dict(
        architectures=["MixtralForCausalLM"], attention_dropout=0.0, bos_token_id=1, eos_token_id=2,
        hidden_act="silu", hidden_size=4096, initializer_range=0.02, intermediate_size=14336,
        max_position_embeddings=32768, model_type="mixtral", num_attention_heads=32, num_experts_per_tok=2,
        num_hidden_layers=32, num_key_value_heads=8, num_local_experts=8, output_router_logits=False,
        rms_norm_eps=1e-05, rope_theta=1000000.0, router_aux_loss_coef=0.02, sliding_window=None,
        tie_word_embeddings=False, torch_dtype="bfloat16", use_cache=True, vocab_size=32000,
    ),
    "Qwen3-30B-A3B": dict(
        architectures=["Qwen3MoeForCausalLM"], attention_bias=False, attention_dropout=0.0,
        bos_token_id=151643, decoder_sparse_step=1, eos_token_id=151645, head_dim=128, hidden_act="silu",
        hidden_size=2048, initializer_range=0.02, intermediate_size=6144, max_position_embeddings=40960,
        max_window_layers=48, mlp_only_layers=[], model_type="qwen3_moe", moe_intermediate_size=768,
        norm_topk_prob=True, num_attention_heads=32, num_experts=128, num_experts_per_tok=8,
        num_hidden_layers=48, num_key_value_heads=4, output_router_logits=False, rms_norm_eps=1e-06,
        rope_scaling=None, rope_theta=1000000.0, router_aux_loss_coef=0.001, sliding_window=None,
        tie_word_embeddings=False, torch_dtype="bfloat16", use_cache=True, use_sliding_window=False,
        vocab_size=151936,
    ),
    "Qwen1.5-MoE-A2.7B": dict(
        architectures=["Qwen2MoeForCausalLM"], attention_dropout=0.0, bos_token_id=151643,
        eos_token_id=151643, decoder_sparse_step=1, hidden_act="silu", hidden_size=2048,
        initializer_range=0.02, intermediate_size=5632, max_position_embeddings=8192, max_window_layers=21,
        model_type="qwen2_moe", moe_intermediate_size=1408, norm_topk_prob=False, num_attention_heads=16,
        num_experts=60, num_experts_per_tok=4, num_hidden_layers=24, num_key_value_heads=16,
        output_router_logits=False, rms_norm_eps=1e-06, rope_theta=1000000.0, router_aux_loss_coef=0.001,
        shared_expert_intermediate_size=5632, sliding_window=32768, tie_word_embeddings=False,
        torch_dtype="bfloat16", use_cache=True, use_sliding_window=False, vocab_size=151936,
    ),
    "OLMoE-1B-7B-0924": dict(
        architectures=["OlmoeForCausalLM"], attention_bias=False, attention_dropout=0.0, clip_qkv=None,
        eos_token_id=50279, hidden_act="silu", hidden_size=2048, initializer_range=0.02,
        intermediate_size=1024, max_position_embeddings=4096, model_type="olmoe", norm_topk_prob=False,
        num_attention_heads=16, num_experts=64, num_experts_per_tok=8, num_hidden_layers=16,
        num_key_value_heads=16, output_router_logits=False, pad_token_id=1, rms_norm_eps=1e-05,
        rope_scaling=None, rope_theta=10000.0, router_aux_loss_coef=0.01, tie_word_embeddings=False,
        torch_dtype="bfloat16", use_cache=True, vocab_size=50304,
    ),
}  # fmt: skip

TINY: dict[str, dict[str, Any]] = {
    "mixtral": dict(num_local_experts=6, intermediate_size=24),
    "olmoe": dict(num_experts=6, intermediate_size=24),
    "qwen2_moe": dict(num_experts=6, moe_intermediate_size=24, shared_expert_intermediate_size=16),
    "qwen3_moe": dict(num_experts=6, moe_intermediate_size=24),
}


def tiny(family: str = "qwen3_moe", **changes: Any) -> dict[str, Any]:
    """A config.json with only what must be there, and `changes`; a change to None leaves the key out."""
    raw = TINY[family] | dict(
        model_type=family, vocab_size=97, hidden_size=32, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, num_experts_per_tok=2,
    )  # fmt: skip
    return {key: value for key, value in (raw | changes).items() if value is not None}


def transformers_config(raw: dict[str, Any]) -> Any:
    """The oracle's view of a config.json."""
    return getattr(transformers, f"{CLASSES[raw['model_type']]}Config").from_dict(dict(raw))


def as_saved_by_transformers_5(raw: dict[str, Any]) -> dict[str, Any]:
    """The same model in the newer spelling, through JSON as a file would be."""
    saved: dict[str, Any] = json.loads(transformers_config(raw).to_json_string(use_diff=False))
    assert "rope_parameters" in saved and "rope_theta" not in saved
    return saved


def assert_same_model(ours: ModelConfig, raw: dict[str, Any]) -> None:
    """Every field we use against the transformers config object, and layer kinds against its module tree."""
    theirs = transformers_config(raw)
    same_name = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps",
                 "num_key_value_heads", "max_position_embeddings", "tie_word_embeddings", "hidden_act",
                 "num_experts", "num_experts_per_tok")  # fmt: skip
    for name in same_name:
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.model_type == theirs.model_type
    head_dim = getattr(theirs, "head_dim", None)
    assert ours.head_dim == (head_dim or theirs.hidden_size // theirs.num_attention_heads)
    assert ours.norm_topk_prob == getattr(theirs, "norm_topk_prob", True)  # Mixtral has no such key: always
    assert ours.clip_qkv == getattr(theirs, "clip_qkv", None)
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]
    assert ours.rope.rope_type == theirs.rope_parameters["rope_type"]
    with torch.device("meta"):
        model = getattr(transformers, f"{CLASSES[ours.model_type]}ForCausalLM")(theirs)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for index, layer in enumerate(model.model.layers):
        at = f"model.layers.{index}"
        assert ours.moe_layers[index] == (f"{at}.mlp.experts.gate_up_proj" in shapes)
        assert (f"{at}.self_attn.q_proj.bias" in shapes) == ours.qkv_bias
        assert (f"{at}.self_attn.o_proj.bias" in shapes) == ours.o_bias
        if ours.moe_layers[index]:
            expected = (ours.num_experts, 2 * ours.moe_intermediate_size, ours.hidden_size)
            assert shapes[f"{at}.mlp.experts.gate_up_proj"] == expected
            shared = shapes.get(f"{at}.mlp.shared_expert.up_proj.weight", (0,))
            assert shared[0] == ours.shared_expert_intermediate_size
        else:
            assert shapes[f"{at}.mlp.up_proj.weight"] == (ours.intermediate_size, ours.hidden_size)
        holder = layer.self_attn if ours.model_type in ("qwen2_moe", "qwen3_moe") else theirs
        assert ours.sliding_windows[index] == getattr(holder, "sliding_window", None)


# What published and default files mean


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_means_the_same_in_both_spellings_and_to_transformers(name: str) -> None:
    ours = parse_model_config(PUBLISHED[name])
    assert_same_model(ours, PUBLISHED[name])
    newer = parse_model_config(as_saved_by_transformers_5(PUBLISHED[name]))
    assert_same_model(newer, PUBLISHED[name])


@pytest.mark.parametrize("family", CLASSES)
def test_a_default_transformers_config_parses_to_what_transformers_builds(family: str) -> None:
    raw = default_config(family)
    assert_same_model(parse_model_config(raw), raw)


OPTIONAL = (
    "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
    "sliding_window", "use_sliding_window", "max_window_layers", "layer_types", "rope_parameters",
    "norm_topk_prob", "clip_qkv", "attention_bias", "qkv_bias", "decoder_sparse_step", "mlp_only_layers",
)  # fmt: skip


def default_config(family: str, **changes: Any) -> dict[str, Any]:
    """What transformers 5 writes for the family's default model."""
    config = getattr(transformers, f"{CLASSES[family]}Config")(**changes)
    raw: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return raw


@pytest.mark.parametrize("family", CLASSES)
def test_a_key_left_out_takes_the_default_of_transformers_or_is_asked_for(family: str) -> None:
    for key in default_config(family):
        raw = default_config(family, num_hidden_layers=2)
        del raw[key]
        try:
            ours = parse_model_config(raw)
        except ConfigError as error:
            assert "is missing" in str(error) or key == "model_type"
            assert key not in OPTIONAL
        else:
            assert_same_model(ours, raw)


def test_no_key_value_heads_means_one_for_each_head_but_only_where_it_says_so() -> None:
    """Left out, transformers takes the family's default; null is as many as there are heads."""
    raw = default_config("mixtral", num_hidden_layers=1)
    assert parse_model_config(raw | {"num_key_value_heads": None}).num_key_value_heads == 32
    del raw["num_key_value_heads"]
    assert parse_model_config(raw).num_key_value_heads == 8


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
                                 "num_experts", "num_experts_per_tok", "moe_intermediate_size"])  # fmt: skip
def test_a_size_that_is_missing_is_named(key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key}.* is missing"):
        parse_model_config(tiny("qwen3_moe", **{key: None}))


# The two spellings


def test_the_number_of_experts_is_read_under_both_names() -> None:
    for family in CLASSES:
        raw = tiny(family, num_experts=None, num_local_experts=None)
        configs = [parse_model_config(raw | {key: 6}) for key in ("num_experts", "num_local_experts")]
        assert configs[0] == configs[1] and configs[0].num_experts == 6


YARN = dict(factor=4.0, original_max_position_embeddings=64, beta_fast=16.0)
LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)


ROPES = [("linear", dict(factor=2.0)), ("yarn", YARN), ("llama3", LLAMA3), ("default", {})]


@pytest.mark.parametrize("kind, extra", ROPES)
def test_rope_is_read_from_all_three_spellings(kind: str, extra: dict[str, Any]) -> None:
    oldest = tiny(rope_theta=5e5, rope_scaling={"type": kind, **extra}, max_position_embeddings=256)
    older = tiny(rope_theta=5e5, rope_scaling={"rope_type": kind, **extra}, max_position_embeddings=256)
    newer = tiny(rope_parameters={"rope_type": kind, "rope_theta": 5e5, **extra}, max_position_embeddings=256)
    configs = [parse_model_config(raw) for raw in (oldest, older, newer)]
    assert {(c.rope.rope_type, c.rope.theta) for c in configs} == {(kind, 5e5)}
    frequencies = [inverse_frequencies(c.rope, c.head_dim) for c in configs]
    assert all(torch.equal(f, frequencies[0][0]) and a == frequencies[0][1] for f, a in frequencies)


def test_the_dtype_keys_of_both_spellings_are_ignored_since_the_tensors_say() -> None:
    for spelling in ("torch_dtype", "dtype"):
        assert parse_model_config(tiny() | {spelling: "float16"}) == parse_model_config(tiny())


def test_unknown_keys_are_ignored() -> None:
    later = tiny(some_new_key={"of": ["a later", "transformers"]})
    assert parse_model_config(later) == parse_model_config(tiny())


# Sliding windows and dense layers


@pytest.mark.parametrize("below", [0, 1, 2, 3, 4, 28])
def test_qwen2_moe_slides_where_transformers_does(below: int) -> None:
    raw = tiny("qwen2_moe", use_sliding_window=True, sliding_window=5, max_window_layers=below)
    ours = parse_model_config(raw)
    assert_same_model(ours, raw)
    assert ours.sliding_windows == tuple(5 if i % 2 == 0 and i < below else None for i in range(4))


@settings(deadline=None, max_examples=20)  # each example builds a transformers model
@given(sliding=st.lists(st.booleans(), min_size=4, max_size=4))
def test_qwen2_moe_follows_layer_types_where_given(sliding: list[bool]) -> None:
    types = ["sliding_attention" if s else "full_attention" for s in sliding]
    raw = tiny("qwen2_moe", use_sliding_window=True, sliding_window=5, layer_types=types)
    assert_same_model(parse_model_config(raw), raw)


def test_a_window_that_is_not_switched_on_is_no_window() -> None:
    def windows(family: str, **switch: bool) -> tuple[int | None, ...]:
        return parse_model_config(tiny(family, sliding_window=5, **switch)).sliding_windows

    assert windows("qwen2_moe") == windows("qwen3_moe") == (None,) * 4
    assert windows("qwen3_moe", use_sliding_window=False) == (None,) * 4
    assert windows("qwen3_moe", use_sliding_window=True) == (5,) * 4
    assert windows("mixtral") == (5,) * 4  # it has no switch
    assert windows("olmoe") == (None,) * 4  # and this one no windows


def test_layer_types_must_name_every_layer() -> None:
    sliding = tiny("qwen2_moe", use_sliding_window=True, sliding_window=5)
    for types in (["full_attention"] * 3, "full", {"0": "full_attention"}):
        with pytest.raises(ConfigError, match="layer_types does not name 4 layers"):
            parse_model_config(sliding | {"layer_types": types})


@settings(deadline=None, max_examples=30)
@given(step=st.integers(1, 5), dense=st.lists(st.integers(0, 3), max_size=3))
def test_layers_without_experts_are_those_of_transformers(step: int, dense: list[int]) -> None:
    raw = tiny("qwen3_moe", decoder_sparse_step=step, mlp_only_layers=dense, intermediate_size=40)
    expected = tuple(i not in dense and (i + 1) % step == 0 for i in range(4))
    if not any(expected):
        with pytest.raises(ConfigError, match="no layer has experts"):
            parse_model_config(raw)
    else:
        ours = parse_model_config(raw)
        assert ours.moe_layers == expected and ours.num_moe_layers == sum(expected)
        assert_same_model(ours, raw)


# What is refused


def test_an_unknown_architecture_names_the_supported_ones() -> None:
    for model_type in ("llama", None, 7, ["mixtral"], "Mixtral"):
        with pytest.raises(ConfigError, match="supported; supported: mixtral, olmoe, qwen2_moe, qwen3_moe"):
            parse_model_config({"model_type": model_type, "vocab_size": 3})
    assert sorted(FAMILIES) == sorted(CLASSES)


def test_a_quantised_checkpoint_is_refused_by_its_method() -> None:
    with pytest.raises(ConfigError, match="fp8 quantised checkpoints are not supported; use the bf16 one"):
        parse_model_config(tiny(quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]}))
    for nonsense in ("fp8", 5, True, [1]):
        with pytest.raises(ConfigError, match="quantised checkpoints are not supported"):
            parse_model_config(tiny(quantization_config=nonsense))


SIZES = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "num_experts", "num_experts_per_tok", "moe_intermediate_size", "max_position_embeddings",
)  # fmt: skip


@pytest.mark.parametrize("key", SIZES)
@pytest.mark.parametrize("value", [0, -1, -(2**70), 2**70, True, False, "32", 32.0, [32], {"value": 32}])
def test_a_size_that_is_no_count_is_refused_by_name(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"config.json: {key} is .*, not a whole number from 1 to"):
        parse_model_config(tiny(**{key: value}))


@pytest.mark.parametrize("key", ["rms_norm_eps", "clip_qkv", "rope_theta"])
@pytest.mark.parametrize("value", [0, -1e-6, float("nan"), float("inf"), 10**400, True, "1e-6", [1e-6]])
def test_a_number_that_is_not_positive_is_refused_by_name(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"config.json: {key} is .*, not a positive number"):
        parse_model_config(tiny("olmoe", **{key: value}))


REFUSED: list[tuple[dict[str, Any], str]] = [
    (dict(num_key_value_heads=3), "4 attention heads cannot share 3 key/value heads evenly"),
    (dict(num_experts_per_tok=7), "num_experts_per_tok 7 exceeds num_experts 6"),
    (dict(head_dim=7), "head_dim 7 is odd"),
    (dict(hidden_act="swiglu"), "hidden_act 'swiglu' is not supported; supported: silu"),
    (dict(hidden_act=["silu"]), "is not supported"),
    (dict(num_hidden_layers=10_001), "num_hidden_layers is 10001"),
    (dict(mlp_only_layers="0"), "mlp_only_layers is not a list of layer numbers"),
    (dict(mlp_only_layers=[True]), "mlp_only_layers is not a list of layer numbers"),
    (dict(mlp_only_layers=["1"]), "mlp_only_layers is not a list of layer numbers"),
    (dict(hidden_act=[]), "hidden_act [] is not supported"),
    (dict(hidden_size=2), "head_dim 1 is odd"),  # fewer features than heads
    (dict(tie_word_embeddings="false"), "tie_word_embeddings is 'false', neither true nor false"),
    (dict(norm_topk_prob="no"), "norm_topk_prob is 'no', neither true nor false"),
    (dict(attention_bias=[0]), "attention_bias is [0], neither true nor false"),
    (dict(use_sliding_window="no", sliding_window=5), "use_sliding_window is 'no', neither true nor false"),
    (dict(decoder_sparse_step=0), "decoder_sparse_step is 0"),
    (dict(use_sliding_window=True, sliding_window=0), "sliding_window is 0"),
    (dict(use_sliding_window=True, sliding_window="8"), "sliding_window is"),
    (dict(rope_scaling=[2.0]), "rope parameters are a list, not an object"),
    (dict(rope_scaling={"type": "dynamic"}), "rope type 'dynamic' is not supported; supported: default"),
    (dict(rope_scaling={"type": ["yarn"]}), "rope type"),
    (dict(rope_scaling={"type": "linear"}), "factor is None"),
    (dict(rope_scaling={"type": "linear", "factor": 0}), "factor is 0"),
    (dict(rope_scaling={"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}), "high_freq_factor is"),
    (dict(rope_scaling=LLAMA3 | {"type": "llama3", "low_freq_factor": 4.0}), "is not below high_freq_factor"),
    (dict(rope_theta=1), "rope_theta is 1.0; it must be above 1"),
    (dict(rope_scaling={"type": "yarn", "factor": "4"}), "factor is"),
    (dict(rope_scaling={"type": "yarn"}, original_max_position_embeddings=-64), "embeddings is -64"),
    (dict(rope_parameters={"partial_rotary_factor": 0.5}), "partial_rotary_factor"),
]


@pytest.mark.parametrize("changes, message", REFUSED, ids=[message for _, message in REFUSED])
def test_what_cannot_work_is_refused_with_its_reason(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_model_config(tiny(**changes))
    assert message in str(caught.value)


KEYS = st.sampled_from(
    [*tiny("qwen2_moe"), *OPTIONAL, "num_local_experts", "rope_theta", "rope_scaling", "quantization_config"]
)
SCALARS = (
    st.none()
    | st.booleans()
    | st.just(10**400)
    | st.integers(-(2**80), 2**80)
    | st.floats()
    | st.text(max_size=5)
)
WORDS = st.sampled_from([
    "linear", "yarn", "llama3", "type", "rope_type", "factor", "rope_theta", "beta_fast", "attention_factor",
    "mscale", "mscale_all_dim", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
])  # fmt: skip
VALUES = st.recursive(
    SCALARS | WORDS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(WORDS | st.text(max_size=5), inner, max_size=5)
    ),
)


@settings(deadline=None, max_examples=300)
@given(family=st.sampled_from([*CLASSES]), changes=st.dictionaries(KEYS, VALUES, max_size=4))
def test_any_values_either_parse_to_something_usable_or_raise_config_error(
    family: str, changes: dict[str, Any]
) -> None:
    try:
        config = parse_model_config(tiny(family) | changes)
    except ConfigError as error:
        assert str(error)
    else:
        assert len(config.moe_layers) == len(config.sliding_windows) == config.num_hidden_layers
        assert config.num_attention_heads % config.num_key_value_heads == 0
        if config.head_dim <= 4096:  # a larger one has no tensors to match; allocate nothing for it here
            frequencies, factor = inverse_frequencies(config.rope, config.head_dim)
            assert frequencies.isfinite().all() and math.isfinite(factor)


YARN_NONSENSE: list[dict[str, Any]] = [
    dict(beta_fast="32"), dict(beta_fast=-1), dict(mscale=[1], mscale_all_dim=1), dict(attention_factor="x"),
    dict(attention_factor=float("nan")), dict(mscale=-50, mscale_all_dim=-7), dict(rope_theta=1),
]  # fmt: skip


@pytest.mark.parametrize("bad", YARN_NONSENSE)
def test_yarn_values_that_cannot_work_are_refused_when_the_config_is_read(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        parse_model_config(tiny(rope_parameters=dict(rope_type="yarn", rope_theta=1e4, factor=4) | bad))


def test_a_list_of_a_million_dense_layers_is_read_at_once() -> None:
    """4 MiB of JSON hold as many; looking each layer up in the list itself would take minutes."""
    raw = tiny(num_hidden_layers=10_000, mlp_only_layers=[-1] * 1_000_000)
    assert parse_model_config(raw).num_moe_layers == 10_000


# The file


def test_load_reads_the_file_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny()))
    assert load_model_config(tmp_path) == parse_model_config(tiny())


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"\xff\xfe{}", "is not JSON"),
        (b"[1, 2]", "holds a list, not an object"),
        (b"null", "holds a NoneType, not an object"),
        (b"[" * 200_000, "is not JSON"),
        (b'{"vocab_size": ' + b"9" * 5000 + b"}", "is not JSON"),
        (b"{}" + b" " * CONFIG_BYTES_LIMIT, f"a config.json is below {CONFIG_BYTES_LIMIT}"),
        (b"{}", "architecture None is not supported"),
    ],
    ids=["empty", "cut off", "not utf-8", "list", "null", "deep", "5000 digits", "4 MiB", "no model_type"],
)
def test_a_file_that_is_no_config_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_model_config(tmp_path)


def test_a_folder_without_config_json_says_what_a_model_is(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ConfigError, match="has no config.json; --model takes a folder of Hugging Face"):
            load_model_config(folder)
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ConfigError, match="has no config.json"):
        load_model_config(tmp_path)


# The user's options


def test_run_config_has_defaults_for_everything_but_refuses_unknown_options() -> None:
    shown = RunConfig("auto", "learned", "auto", context=None, threads=None, seed=0, prefetch="auto")
    assert RunConfig() == shown
    with pytest.raises(TypeError, match="disk_budget"):
        RunConfig(disk_budget="8G")  # type: ignore[call-arg]


@pytest.mark.parametrize("changes, message", [
    (dict(context=15), "--context 15 is too small; the least is 16"),
    (dict(context=0), "--context 0 is too small"),
    (dict(context=-4096), "--context -4096 is too small"),
    (dict(threads=0), "--threads 0 is too small; the least is 1"),
    (dict(threads=-2), "--threads -2"),
    (dict(threads=1025), "--threads 1025 is too large; the most is 1024"),
    (dict(context="512"), "--context '512' is not a whole number"),
    (dict(context=512.5), "--context 512.5 is not a whole number"),
    (dict(threads=True), "--threads True is not a whole number"),
    (dict(seed="x"), "--seed 'x' is not a whole number"),
    (dict(seed=-1), "--seed -1 is too small"),
    (dict(ram_budget=5), "ram_budget is 5, not text such as 16G"),
    (dict(policy="nope"), "unknown policy 'nope'; known are "),
    (dict(policy=""), "unknown policy ''"),
    (dict(reader="io_uring"), "unknown reader 'io_uring'; known are auto, direct, buffered, mmap"),
    (dict(reader=""), "unknown reader ''"),
])  # fmt: skip
def test_an_impossible_option_is_refused_by_its_flag(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        RunConfig(**changes)
    assert message in str(caught.value)


def test_the_smallest_and_largest_options_are_taken() -> None:
    run = RunConfig(context=16, threads=1024, reader="mmap")
    assert (run.context, run.threads, run.reader) == (16, 1024, "mmap")
    assert RunConfig(threads=1).threads == 1


@pytest.mark.parametrize("changes", [dict(num_experts="6"), dict(rms_norm_eps="1e-6")])
def test_a_refused_value_is_shown_as_it_is_written(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="is '"):
        parse_model_config(tiny(**changes))
