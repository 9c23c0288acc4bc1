"""The prefill kernels against kernels/reference.py in float64, in Triton's interpreter where there is no
GPU.
"""

import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from kernels import triton_moe
from kernels.expert_slots import FLOATS, FORMATS, pack_expert, slot_bytes, unpack_expert
from kernels.reference import ACTIVATIONS, moe_reference
from kernels.triton_dequant import plane_column
from kernels.triton_moe import TUNING, ExpertPrefill, choose, fallback
from kernels.triton_schedule import round_tokens

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Relative error that a format's arithmetic leaves: of activations in bf16 three roundings, with weights' two
# more.
LIMIT = {"f32": 2e-6, "f16": 1e-3, "bf16": 6e-3}
PACKED_LIMIT = 9e-3


@dataclass
class Problem:
    """Random experts in permuted slots of an arena of 0xFF bytes (NaN in every format), and tokens for
    them.
    """

    format: str
    hidden: int
    width: int
    h: Tensor
    ids: Tensor
    weights: Tensor
    x: Tensor
    table: Tensor
    arena: Tensor
    dense: list[tuple[Tensor, Tensor, Tensor]]

    def prefill(self, activation: str = "silu", **options: object) -> ExpertPrefill:
        top_k, experts = self.ids.shape[1], len(self.table)
        prefill = ExpertPrefill(
            self.hidden, self.width, self.format, activation, top_k, experts, len(self.h), DEVICE, **options
        )
        for buffer in (prefill.products, prefill._x, prefill._h):
            buffer.fill_(math.nan)
        return prefill

    def result(self, activation: str = "silu", **options: object) -> Tensor:
        prefill, x = self.prefill(activation, **options), self.x.clone()
        prefill.run(self.h, self.ids, self.table, self.arena)
        prefill.combine(self.weights, x)
        return x - self.x

    def error(self, got: Tensor, activation: str = "silu") -> float:
        experts = [tuple(weight.double() for weight in expert) for expert in self.dense]
        inputs = (self.h.double().cpu(), self.ids.long().cpu(), self.weights.double().cpu())
        want = moe_reference(*inputs, experts, activation)  # type: ignore[arg-type]
        return float((got.double().cpu() - want).norm() / want.norm())

    @property
    def limit(self) -> float:
        return LIMIT.get(self.format, PACKED_LIMIT)


def problem(
    format: str,
    tokens: int,
    hidden: int = 128,
    width: int = 64,
    experts: int = 5,
    top_k: int = 2,
    ids: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Problem:
    generator = torch.Generator().manual_seed(tokens)
    stride = -(-slot_bytes(format, hidden, width) // 4096) * 4096
    arena = torch.full((experts + 2, stride), 255, dtype=torch.uint8)
    table = torch.randperm(experts + 2, generator=generator)[:experts].int()
    dense = []
    for slot in table.tolist():
        shapes = ((width, hidden), (width, hidden), (hidden, width))
        weights = [torch.randn(*shape, generator=generator) / math.sqrt(shape[1]) for shape in shapes]
        blob = pack_expert(format, *weights)
        arena[slot, : len(blob)] = blob
        dense.append(unpack_expert(format, blob, hidden, width))
    if ids is None:
        ids = torch.rand(tokens, experts, generator=generator).topk(top_k, 1).indices.int()
    weights = torch.rand(tokens, top_k, generator=generator)
    h, x = (torch.randn(tokens, hidden, generator=generator) for _ in range(2))
    on_device = [t.to(DEVICE) for t in (h.to(dtype), ids, weights, x, table, arena)]
    return Problem(format, hidden, width, *on_device, dense)


def tuned(format: str, tile_rows: int, tma: bool = True, **product: int) -> list[dict[str, object]]:
    """One entry, for any shape."""
    up = {"swap": 0, "columns": 64, "depth": 64, "warps": 4, "stages": 3, "per_sm": 1} | product
    config = {"tile_rows": tile_rows, "tma": tma, "up": up, "down": up | {"columns": 2 * up["columns"]}}
    return [{"format": format, "hidden": 1, "width": 1, "rows": 1, "config": config}]


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_gives_the_reference_s_sum(format: str) -> None:
    p = problem(format, 33)
    assert p.error(p.result()) < p.limit


@pytest.mark.parametrize("tokens", [1, 2, 4, 8, 64])
@pytest.mark.parametrize("format", ["bf16", "int4"])
def test_any_number_of_tokens_gives_the_reference_s_sum(format: str, tokens: int) -> None:
    p = problem(format, tokens)
    assert p.error(p.result()) < p.limit


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_gives_the_reference_s_sum(activation: str) -> None:
    p = problem("bf16", 8)
    assert p.error(p.result(activation), activation) < p.limit


@pytest.mark.parametrize("format", FORMATS)
def test_sizes_that_are_no_multiple_of_a_tile_give_the_reference_s_sum(format: str) -> None:
    """F 96 leaves half a superblock of padding, D 160 a part of every block."""
    p = problem(format, 3, hidden=160, width=96, experts=3)
    assert p.error(p.result(tuning=tuned(format, 16, columns=64))) < p.limit


@pytest.mark.parametrize("format", ["bf16", "int4", "int8"])
def test_a_wide_expert_of_many_tiles_gives_the_reference_s_sum(format: str) -> None:
    p = problem(format, 2, hidden=576, width=96, experts=2)
    assert p.error(p.result(tuning=tuned(format, 16, columns=128, depth=128))) < p.limit


@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("swap", [0, 1])
def test_rows_through_pointers_or_descriptors_on_either_side_give_the_reference_s_sum(
    tma: bool, swap: int
) -> None:
    p = problem("bf16", 20, hidden=160)
    assert p.error(p.result(tuning=tuned("bf16", 16, tma, swap=swap))) < p.limit


@pytest.mark.parametrize("tile_rows", [16, 32, 64, 128])
def test_tiles_of_any_height_hold_ragged_and_empty_experts(tile_rows: int) -> None:
    """70 tokens on expert 1, 3 on expert 4, none elsewhere: full, partial and no tiles."""
    ids = torch.ones(70, 1, dtype=torch.int32)
    ids[[5, 17, 69]] = 4
    p = problem("int4", 70, top_k=1, ids=ids)
    assert p.error(p.result(tuning=tuned("int4", tile_rows))) < p.limit


@pytest.mark.parametrize("format", ["int4", "int8", "fp8", "mxfp4"])
def test_gate_and_up_in_one_product_give_the_reference_s_sum(format: str) -> None:
    p = problem(format, 20, hidden=160, width=96, experts=3)
    assert p.error(p.result(tuning=tuned(format, 16, swap=1))) < p.limit


@pytest.mark.parametrize("last", [1, 65, 129])
def test_an_expert_s_last_tile_is_lower_where_that_is_enough(last: int) -> None:
    p = problem("bf16", 256 + last, experts=2, top_k=1, ids=torch.ones(256 + last, 1, dtype=torch.int32))
    assert p.error(p.result(tuning=tuned("bf16", 256))) < p.limit


def test_many_pairs_are_sorted_in_two_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    few = problem("bf16", 50, experts=5, top_k=3).result()
    monkeypatch.setattr(triton_moe, "FEW_PAIRS", 0)
    monkeypatch.setattr(triton_moe, "CHUNK", 16)
    p = problem("bf16", 50, experts=5, top_k=3)
    assert torch.equal(p.result(), few)
    p.ids[::3, 1] = -1
    p.table[2] = -1
    products = p.prefill().run(p.h, p.ids, p.table, p.arena)
    assert torch.equal(products.isnan().any(1), ((p.ids == 2) | (p.ids == -1)).flatten())


def test_activations_in_bf16_are_taken_as_they_are() -> None:
    p = problem("bf16", 9, dtype=torch.bfloat16)
    assert p.error(p.result()) < p.limit


@pytest.mark.parametrize("format", ["bf16", "int4"])
def test_experts_that_arrive_late_leave_the_same_bits(format: str) -> None:
    p = problem(format, 12)
    prefill, x = p.prefill(), p.x.clone()
    early, late = p.table.clone(), p.table.clone()
    early[::2], late[1::2] = -1, -1
    prefill.run(p.h, p.ids, late, p.arena)
    prefill.run(p.h, p.ids, early, p.arena)
    prefill.combine(p.weights, x)
    assert torch.equal(x - p.x, p.result())


def test_rows_of_absent_experts_stay_as_they_were() -> None:
    p = problem("bf16", 12)
    p.table[3] = -1
    products = p.prefill().run(p.h, p.ids, p.table, p.arena)
    assert torch.equal(products.isnan().all(1), (p.ids == 3).flatten())
    assert torch.equal(products.isnan().any(1), (p.ids == 3).flatten())


def test_a_run_for_nobody_writes_nothing() -> None:
    p = problem("bf16", 3)
    products = p.prefill().run(p.h, p.ids, torch.full_like(p.table, -1), p.arena)
    assert products.isnan().all()


def test_pairs_without_an_expert_count_nothing() -> None:
    p = problem("bf16", 6)
    p.ids[:, 1] = -1
    p.weights[:, 1] = math.nan
    x, prefill = p.x.clone(), p.prefill()
    prefill.run(p.h, p.ids, p.table, p.arena)
    prefill.combine(p.weights, x)
    p.ids, p.weights = p.ids[:, :1].contiguous(), p.weights[:, :1].contiguous()
    assert p.error(x - p.x) < p.limit


def test_fewer_tokens_than_a_buffer_holds_leave_the_rest_alone() -> None:
    p = problem("int8", 8)
    prefill = p.prefill()
    prefill.run(p.h[:3].contiguous(), p.ids[:3].contiguous(), p.table, p.arena)
    assert prefill.products[6:].isnan().all() and not prefill.products[:6].isnan().any()


def test_a_token_that_is_no_number_stays_alone() -> None:
    p = problem("int4", 9)
    clean = p.result()
    p.h[4] = math.nan
    got = p.result()
    assert got[4].isnan().all()
    rest = torch.arange(9, device=DEVICE) != 4
    assert torch.equal(got[rest], clean[rest])


def test_moved_columns_are_a_permutation_within_each_64() -> None:
    for codes in (4, 8):
        columns = plane_column(192, codes)
        assert sorted(columns) == list(range(192))
        assert all(p // 64 == c // 64 for p, c in enumerate(columns))
    assert plane_column(64, 8)[:10] == [0, 32, 8, 40, 16, 48, 24, 56, 1, 33]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 60), st.integers(1, 4), st.sampled_from([4, 8, 16]), st.integers(0, 1000))
def test_token_rounding_drops_the_lightest_pairs_down_to_a_multiple(
    tokens: int, top_k: int, multiple: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(tokens, 6, generator=generator).topk(top_k, 1).indices.int()
    weights = torch.rand(tokens, top_k, generator=generator) + 0.01
    rounded, left, share = round_tokens(ids, weights, 6, multiple)
    dropped = rounded == -1
    assert torch.equal(rounded[~dropped], ids[~dropped]) and not left[dropped].any()
    assert torch.allclose(left.sum(1), weights.sum(1))
    assert float(share) == pytest.approx(float(dropped.float().mean()))
    assert not dropped.gather(1, weights.argmax(1, keepdim=True)).any()  # nobody's heaviest expert
    first = torch.zeros_like(dropped).scatter_(1, weights.argmax(1, keepdim=True), True)
    for expert in range(6):
        mine = ids == expert
        before, after = int(mine.sum()), int((rounded == expert).sum())
        excess = before % multiple
        if before < multiple or excess > multiple // 2:
            assert after == before
        else:
            must_stay = int((mine & first).sum())
            assert after == max(before - excess, must_stay)
            gone, stay = weights[mine & dropped], weights[mine & ~dropped & ~first]
            assert not len(gone) or not len(stay) or gone.max() <= stay.min()


def test_token_rounding_in_a_run_sums_what_it_kept_and_says_how_much_it_dropped() -> None:
    ids = torch.tensor([[0, 1]] * 9 + [[1, 2]] * 9, dtype=torch.int32)
    p = problem("bf16", 18, ids=ids)
    prefill, x = p.prefill(token_rounding=8), p.x.clone()
    prefill.run(p.h, p.ids, p.table, p.arena, p.weights)
    prefill.combine(p.weights, x)
    p.ids, p.weights, share = round_tokens(p.ids, p.weights, 5, 8)
    assert prefill.dropped_share == float(share) > 0
    p.ids = p.ids.clamp(min=0)  # whose weight is 0
    assert p.error(x - p.x) < p.limit


def test_a_shape_that_was_not_tuned_takes_the_nearest_one_s_tiles() -> None:
    entries = [
        {"format": "int4", "hidden": 2048, "width": 768, "rows": rows, "config": f"small {rows}"}
        for rows in (1, 16)
    ] + [{"format": "int4", "hidden": 4096, "width": 14336, "rows": 16, "config": "large"}]
    assert choose(entries, "int4", 2048, 1024, 12, 90) == "small 16"
    assert choose(entries, "int4", 4096, 10000, 1, 90) == "large"
    assert choose(entries, "mxfp4", 2048, 768, 1, 90) == "small 1"  # never measured, like int4
    assert choose(entries, "bf16", 2048, 768, 12, 90) == fallback("bf16", 12, 90)


def test_codes_of_8_bits_borrow_the_tiles_of_int4_with_a_stage_less() -> None:
    config = tuned("int4", 16, stages=4)[0]
    borrowed = choose([config], "int8", 2048, 768, 1, 90)
    assert borrowed["up"]["stages"] == 3 and config["config"]["up"]["stages"] == 4  # type: ignore[index]


def test_the_shipped_tiles_name_every_field() -> None:
    for path in TUNING.glob("sm*.json"):
        for entry in json.loads(path.read_text())["entries"]:
            assert entry["format"] in FORMATS and entry["rows"] > 0
            config = entry["config"]
            assert config["tile_rows"] in (16, 32, 64, 128, 256)
            for product in (config["up"], config["down"]):
                assert set(product) == {"swap", "columns", "depth", "warps", "stages", "per_sm"}


@pytest.mark.parametrize("sm", [80, 90, 120])
def test_kernels_compile_to_tensor_cores_and_pipelined_loads(sm: int) -> None:
    """Ahead of time, in a process of its own: this one may have the interpreter."""
    helper = Path(__file__).with_name("triton_aot.py")
    formats = ("bf16", "int4", "int8", "fp8", "mxfp4") if sm == 90 else ("bf16", "int4")
    out = subprocess.run(
        [sys.executable, helper, str(sm), *formats],
        env=os.environ | {"TRITON_INTERPRET": "0"}, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    kernels = [json.loads(line) for line in out.splitlines()]
    assert len(kernels) == 4 * len(formats) + (4 if sm == 90 else 0)
    for kernel in kernels:
        name, tall = kernel["kernel"], " 16" not in kernel["kernel"]
        assert kernel["wgmma" if sm == 90 and (tall or name.split()[0] not in FLOATS) else "mma"], name
        assert kernel["copies"] + kernel["tma"] > 2 and kernel["byte_loads"] == 0, name
        assert kernel["shared_kib"] <= (227 if " 256" in name else 99), name  # as sm_90 and sm_120 have
        assert kernel["spilled"] <= 256, name
        assert kernel["overwritten"] == 0, name


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [512, 4096])
@pytest.mark.parametrize("format", FORMATS)
def test_a_large_prefill_on_a_gpu_gives_the_reference_s_sum(format: str, tokens: int) -> None:
    p = problem(format, tokens, hidden=576, width=224, experts=9, top_k=3)
    got = p.result()
    some = torch.linspace(0, tokens - 1, 40).long().to(DEVICE)
    p.h, p.ids, p.weights = p.h[some], p.ids[some], p.weights[some]
    assert p.error(got[some]) < p.limit
