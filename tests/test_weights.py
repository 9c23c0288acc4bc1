"""A checkpoint's tensors by meaning: what must be there, where experts lie, what dense weights cost."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from flashmoe.config import ModelConfig, parse_model_config
from flashmoe.errors import ModelError
from flashmoe.weights import CheckpointLayout, DenseWeights, Weight, load_dense
from kernels.native import DTYPES, Format
from storage.checkpoint import open_checkpoint
from storage.expert_reader import Extent

V, D, HEADS, GROUPS, HEAD, EXPERTS, WIDTH, SHARED, LAYERS = 23, 16, 4, 2, 6, 3, 10, 14, 2

BASE = dict(
    vocab_size=V, hidden_size=D, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
    num_key_value_heads=GROUPS, head_dim=HEAD, num_experts=EXPERTS, num_experts_per_tok=2,
)  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": BASE | dict(intermediate_size=WIDTH),
    "olmoe": BASE | dict(intermediate_size=WIDTH),
    "qwen2_moe": BASE | dict(moe_intermediate_size=WIDTH, shared_expert_intermediate_size=SHARED),
    "qwen3_moe": BASE | dict(moe_intermediate_size=WIDTH, attention_bias=True),
}
PROJECTIONS = {"mixtral": ("w1", "w3", "w2")}


def tensors_of(family: str, dtype: torch.dtype = torch.bfloat16, *, tied: bool = False) -> dict[str, Tensor]:
    """A random checkpoint of the family, spelled as the published ones are; written out, not derived."""
    q, kv = HEADS * HEAD, GROUPS * HEAD
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    if not tied:
        shapes["lm_head.weight"] = (V, D)
    block = "block_sparse_moe" if family == "mixtral" else "mlp"
    gate, up, down = PROJECTIONS.get(family, ("gate_proj", "up_proj", "down_proj"))
    for layer in (f"model.layers.{index}" for index in range(LAYERS)):
        shapes |= {f"{layer}.input_layernorm.weight": (D,), f"{layer}.post_attention_layernorm.weight": (D,)}
        shapes |= {f"{layer}.self_attn.q_proj.weight": (q, D), f"{layer}.self_attn.k_proj.weight": (kv, D)}
        shapes |= {f"{layer}.self_attn.v_proj.weight": (kv, D), f"{layer}.self_attn.o_proj.weight": (D, q)}
        if family in ("qwen2_moe", "qwen3_moe"):
            shapes |= {f"{layer}.self_attn.{p}_proj.bias": (n,) for p, n in (("q", q), ("k", kv), ("v", kv))}
        if family == "qwen3_moe":
            shapes |= {f"{layer}.self_attn.o_proj.bias": (D,)}
            shapes |= {f"{layer}.self_attn.{p}_norm.weight": (HEAD,) for p in "qk"}
        if family == "olmoe":
            shapes |= {f"{layer}.self_attn.q_norm.weight": (q,), f"{layer}.self_attn.k_norm.weight": (kv,)}
        shapes[f"{layer}.{block}.gate.weight"] = (EXPERTS, D)
        for expert in (f"{layer}.{block}.experts.{e}" for e in range(EXPERTS)):
            shapes |= {f"{expert}.{gate}.weight": (WIDTH, D), f"{expert}.{up}.weight": (WIDTH, D)}
            shapes |= {f"{expert}.{down}.weight": (D, WIDTH)}
        if family == "qwen2_moe":
            shared = f"{layer}.mlp.shared_expert"
            shapes |= {f"{shared}.gate_proj.weight": (SHARED, D), f"{shared}.up_proj.weight": (SHARED, D)}
            shapes |= {
                f"{shared}.down_proj.weight": (D, SHARED),
                f"{layer}.mlp.shared_expert_gate.weight": (1, D),
            }
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def config_of(family: str, **changes: Any) -> ModelConfig:
    return parse_model_config(FAMILIES[family] | changes | {"model_type": family})


def layout_of(folder: Path, config: ModelConfig, tensors: dict[str, Tensor]) -> CheckpointLayout:
    save_file(tensors, folder / "model.safetensors")
    return CheckpointLayout(open_checkpoint(folder), config)


def held_bytes(weights: DenseWeights) -> int:
    """The memory that the dense weights really hold, each storage once."""
    held: list[Tensor | Weight | None] = [weights.embedding, weights.norm, weights.lm_head]
    for layer in weights.layers:
        for value in (getattr(layer, name) for name in layer.__slots__):
            held += value if isinstance(value, tuple) else [value]
    tensors = [value.data if isinstance(value, Weight) else value for value in held if value is not None]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def read_extent(layout: CheckpointLayout, extent: Extent) -> bytes:
    with layout.checkpoint.shards[extent.shard].open("rb") as file:
        file.seek(extent.offset)
        return file.read(extent.nbytes)


def matrix_of(weight: Weight) -> Tensor:
    """A dense matrix as rows, in its own dtype."""
    dtype = {format: dtype for dtype, format in DTYPES.items()}[weight.format]
    return weight.data.view(dtype).view(weight.rows, weight.columns)


def raw_bytes(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().view(torch.uint8).flatten().tolist())


# What must be there


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_of_a_family_is_needed_and_no_other(family: str, tmp_path: Path) -> None:
    config, tensors = config_of(family), tensors_of(family)
    layout_of(tmp_path, config, tensors | {"model.layers.0.rotary_emb.inv_freq": torch.zeros(3)})
    for name in tensors:
        with pytest.raises(ModelError) as caught:
            layout_of(tmp_path, config, {k: v for k, v in tensors.items() if k != name})
        assert f"has no tensor {name}" in str(caught.value) and family in str(caught.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tensor_of_another_shape_is_refused_with_both_shapes(family: str, tmp_path: Path) -> None:
    config, tensors = config_of(family), tensors_of(family)
    for name, tensor in tensors.items():
        longer = torch.zeros(tensor.shape[0] + 1, *tensor.shape[1:], dtype=tensor.dtype)
        with pytest.raises(ModelError) as caught:
            layout_of(tmp_path, config, tensors | {name: longer})
        expected = f"tensor {name} has shape {list(longer.shape)}; config.json asks for {list(tensor.shape)}"
        assert str(caught.value) == expected


def test_a_transposed_matrix_is_refused_although_it_has_as_many_bytes(tmp_path: Path) -> None:
    name, tensors = "model.layers.1.mlp.experts.2.down_proj.weight", tensors_of("qwen3_moe")
    with pytest.raises(ModelError, match=r"down_proj.weight has shape \[10, 16\].* asks for \[16, 10\]"):
        layout_of(tmp_path, config_of("qwen3_moe"), tensors | {name: tensors[name].T.contiguous()})


@pytest.mark.parametrize(
    "dtype, name", [(torch.float8_e4m3fn, "F8_E4M3"), (torch.int8, "I8"), (torch.float64, "F64")]
)
@pytest.mark.parametrize("tensor", ["model.norm.weight", "model.layers.0.mlp.experts.1.up_proj.weight"])
def test_a_dtype_we_do_not_compute_with_is_refused(
    dtype: torch.dtype, name: str, tensor: str, tmp_path: Path
) -> None:
    tensors = tensors_of("olmoe")
    with pytest.raises(ModelError) as caught:
        layout_of(tmp_path, config_of("olmoe"), tensors | {tensor: tensors[tensor].float().to(dtype)})
    assert str(caught.value) == f"tensor {tensor} is {name}; supported: BF16, F16, F32"


def test_the_three_matrices_of_an_expert_must_share_a_dtype(tmp_path: Path) -> None:
    tensors = tensors_of("olmoe")
    name = "model.layers.0.mlp.experts.1.down_proj.weight"
    with pytest.raises(
        ModelError, match=r"beside model.layers.0.mlp.experts.1.gate_proj.weight mix BF16, F32"
    ):
        layout_of(tmp_path, config_of("olmoe"), tensors | {name: tensors[name].float()})


def test_the_query_key_and_value_matrices_of_a_layer_must_share_a_dtype(tmp_path: Path) -> None:
    """They are held as one."""
    tensors = tensors_of("olmoe")
    name = "model.layers.1.self_attn.k_proj.weight"
    with pytest.raises(ModelError, match=r"beside model.layers.1.self_attn.q_proj.weight mix BF16, F32"):
        layout_of(tmp_path, config_of("olmoe"), tensors | {name: tensors[name].float()})


def test_experts_may_differ_from_dense_weights_in_dtype_but_not_from_each_other(tmp_path: Path) -> None:
    """One native call computes several experts."""
    tensors = tensors_of("olmoe")
    for name in tensors:
        if ".experts." in name:
            tensors[name] = tensors[name].float()
        elif "norm" in name or "gate.weight" in name:
            tensors[name] = tensors[name].half()
    layout = layout_of(tmp_path, config_of("olmoe"), tensors)
    assert {expert.format for expert in layout.experts.values()} == {Format.F32}
    for name in tensors:
        if ".experts.1." in name:
            tensors[name] = tensors[name].bfloat16()
    with pytest.raises(ModelError, match="the experts mix BF16, F32; they must share one"):
        layout_of(tmp_path, config_of("olmoe"), tensors)


# Where experts lie


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_an_experts_extents_hold_gate_up_and_down(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = tensors_of(family, dtype)
    layout = layout_of(tmp_path, config_of(family), tensors)
    assert list(layout.experts) == [(layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS)]
    for (layer, expert), found in layout.experts.items():
        block = (
            f"model.layers.{layer}.{'block_sparse_moe' if family == 'mixtral' else 'mlp'}.experts.{expert}"
        )
        projections = PROJECTIONS.get(family, ("gate_proj", "up_proj", "down_proj"))
        assert found.format == DTYPES[dtype]
        for extent, projection in zip(found.extents, projections, strict=True):
            assert read_extent(layout, extent) == raw_bytes(tensors[f"{block}.{projection}.weight"])


def fused(tensors: dict[str, Tensor], projections: tuple[str, str, str], block: str) -> dict[str, Tensor]:
    """The same experts, one tensor a layer: gate_up_proj [E, 2 F, D] and down_proj [E, D, F]."""
    together = {name: t for name, t in tensors.items() if ".experts." not in name}
    together = {name.replace("block_sparse_moe", "mlp"): t for name, t in together.items()}
    for layer in range(LAYERS):
        gate, up, down = (
            torch.stack(
                [tensors[f"model.layers.{layer}.{block}.experts.{e}.{p}.weight"] for e in range(EXPERTS)]
            )
            for p in projections
        )
        together[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = torch.cat((gate, up), dim=1)
        together[f"model.layers.{layer}.mlp.experts.down_proj"] = down
    return together


@pytest.mark.parametrize("family", FAMILIES)
def test_fused_expert_tensors_are_cut_into_the_same_bytes(family: str, tmp_path: Path) -> None:
    (tmp_path / "fused").mkdir()
    config, separate = config_of(family), tensors_of(family)
    projections = PROJECTIONS.get(family, ("gate_proj", "up_proj", "down_proj"))
    block = "block_sparse_moe" if family == "mixtral" else "mlp"
    one = layout_of(tmp_path, config, separate)
    other = layout_of(tmp_path / "fused", config, fused(separate, projections, block))
    for key in one.experts:
        theirs, ours = one.experts[key], other.experts[key]
        assert [read_extent(other, e) for e in ours.extents] == [read_extent(one, e) for e in theirs.extents]
        gate, up, _ = ours.extents
        assert gate.offset + gate.nbytes == up.offset  # one read brings both
    assert one.dense_bytes == other.dense_bytes


def test_fused_tensors_are_checked_for_shape_and_dtype(tmp_path: Path) -> None:
    config = config_of("qwen3_moe")
    tensors = fused(tensors_of("qwen3_moe"), ("gate_proj", "up_proj", "down_proj"), "mlp")
    gate_up, down = "model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"
    with pytest.raises(ModelError, match=r"gate_up_proj has shape \[4, 20, 16\].* asks for \[3, 20, 16\]"):
        layout_of(tmp_path, config, tensors | {gate_up: torch.zeros(4, 20, 16, dtype=torch.bfloat16)})
    with pytest.raises(ModelError, match=r"down_proj has shape \[3, 10, 16\].* asks for \[3, 16, 10\]"):
        layout_of(tmp_path, config, tensors | {down: torch.zeros(3, 10, 16, dtype=torch.bfloat16)})
    with pytest.raises(ModelError, match="mix BF16, F32"):
        layout_of(tmp_path, config, tensors | {down: tensors[down].float()})
    with pytest.raises(ModelError, match=f"has no tensor {down}"):
        layout_of(tmp_path, config, {k: v for k, v in tensors.items() if k != down})


# The dense weights in memory


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dense_bytes_are_what_load_dense_holds(
    family: str, tied: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    tensors = tensors_of(family, dtype, tied=tied)
    layout = layout_of(tmp_path, config_of(family, tie_word_embeddings=tied), tensors)
    told: list[int] = []
    assert held_bytes(load_dense(layout, told.append)) == layout.dense_bytes
    dense = [t.nbytes for name, t in tensors.items() if ".experts." not in name]
    assert sum(told) == layout.dense_read_bytes == sum(dense)


def test_dense_weights_keep_their_values_and_matrices_their_dtype(tmp_path: Path) -> None:
    tensors = tensors_of("qwen2_moe")
    weights = load_dense(layout_of(tmp_path, config_of("qwen2_moe"), tensors))
    assert torch.equal(matrix_of(weights.embedding), tensors["model.embed_tokens.weight"])
    assert torch.equal(matrix_of(weights.lm_head), tensors["lm_head.weight"])
    assert torch.equal(weights.norm, tensors["model.norm.weight"].float())
    for index, layer in enumerate(weights.layers):
        at = f"model.layers.{index}"
        qkv = [f"{at}.self_attn.{name}_proj" for name in "qkv"]
        assert torch.equal(matrix_of(layer.qkv), torch.cat([tensors[f"{name}.weight"] for name in qkv]))
        assert layer.qkv_bias is not None and layer.router is not None and layer.shared_gate is not None
        assert torch.equal(layer.qkv_bias, torch.cat([tensors[f"{name}.bias"] for name in qkv]).float())
        assert torch.equal(matrix_of(layer.o), tensors[f"{at}.self_attn.o_proj.weight"])
        assert torch.equal(layer.input_norm, tensors[f"{at}.input_layernorm.weight"].float())
        after = tensors[f"{at}.post_attention_layernorm.weight"]
        assert torch.equal(layer.post_attention_norm, after.float())
        assert torch.equal(layer.router, tensors[f"{at}.mlp.gate.weight"].float())
        assert torch.equal(layer.shared_gate, tensors[f"{at}.mlp.shared_expert_gate.weight"].float())
        assert layer.mlp is not None and layer.o_bias is None and layer.q_norm is None
        for matrix, name in zip(layer.mlp, ("gate_proj", "up_proj", "down_proj"), strict=True):
            assert torch.equal(matrix_of(matrix), tensors[f"{at}.mlp.shared_expert.{name}.weight"])


def test_tied_embeddings_are_held_once_and_an_lm_head_beside_them_is_not_read(tmp_path: Path) -> None:
    config = config_of("mixtral", tie_word_embeddings=True)
    layout = layout_of(tmp_path, config, tensors_of("mixtral"))  # has an lm_head all the same
    weights = load_dense(layout)
    assert weights.lm_head is weights.embedding
    untied = layout_of(tmp_path, config_of("mixtral"), tensors_of("mixtral"))
    assert untied.dense_bytes - layout.dense_bytes == V * D * 2


def test_a_layer_without_experts_has_a_dense_network_and_no_router(tmp_path: Path) -> None:
    config = config_of("qwen3_moe", mlp_only_layers=[1], intermediate_size=18)
    tensors = {k: v for k, v in tensors_of("qwen3_moe").items() if "layers.1.mlp" not in k}
    for name, shape in (("gate_proj", (18, D)), ("up_proj", (18, D)), ("down_proj", (D, 18))):
        tensors[f"model.layers.1.mlp.{name}.weight"] = torch.ones(shape, dtype=torch.bfloat16)
    layout = layout_of(tmp_path, config, tensors)
    assert {layer for layer, _ in layout.experts} == {0}
    weights = load_dense(layout)
    assert weights.layers[0].mlp is None and weights.layers[0].router is not None
    assert weights.layers[1].mlp is not None and weights.layers[1].router is None
    assert [(matrix.rows, matrix.columns) for matrix in weights.layers[1].mlp] == [(18, D), (18, D), (D, 18)]
    assert held_bytes(weights) == layout.dense_bytes


def test_tensors_are_found_across_shards(tmp_path: Path) -> None:
    (tmp_path / "sharded").mkdir()
    config, tensors = config_of("olmoe"), tensors_of("olmoe")
    whole = layout_of(tmp_path, config, tensors)
    weight_map = {name: f"model-{i % 3 + 1:05}-of-00003.safetensors" for i, name in enumerate(tensors)}
    for shard in set(weight_map.values()):
        save_file({n: t for n, t in tensors.items() if weight_map[n] == shard}, tmp_path / "sharded" / shard)
    (tmp_path / "sharded" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    sharded = CheckpointLayout(open_checkpoint(tmp_path / "sharded"), config)
    for key in whole.experts:
        parts = [[read_extent(layout, e) for e in layout.experts[key].extents] for layout in (whole, sharded)]
        assert parts[0] == parts[1]
    one, other = (load_dense(layout).layers[1].qkv for layout in (whole, sharded))
    assert torch.equal(matrix_of(one), matrix_of(other))


def test_the_matrices_of_a_shared_expert_must_share_a_dtype(tmp_path: Path) -> None:
    tensors = tensors_of("qwen2_moe")
    name = "model.layers.1.mlp.shared_expert.down_proj.weight"
    with pytest.raises(ModelError, match=r"the matrices of model.layers.1.mlp.shared_expert mix BF16, F32"):
        layout_of(tmp_path, config_of("qwen2_moe"), tensors | {name: tensors[name].float()})
