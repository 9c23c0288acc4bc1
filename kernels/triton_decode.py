"""Decoding 1 to 8 tokens on a GPU: dense products and experts. Beside it: triton_router.py, triton_rope.py.

Every call launches its kernels on the current stream and does nothing else: no allocation, no
synchronisation, so that CUDA graphs can hold them. Residual stream and activations are fp32 in memory. int4
and int8 weights meet int8 activations, rounded as the CPU library rounds them, or with exact=True fp32 ones.
No atomics on data: a result does not depend on the order in which programs run. Nor on how many tokens there
are: one compiled kernel takes any number. `linear` keeps its rows of the weight in registers and multiplies
one token after the other with them; of experts, and wherever weights are few, each token has its programs.
Small arrays [T, K] begin where T puts them, so kernels are not compiled for their alignment either.

On compute capability 9.0 and later kernels are launched programmatically dependent: one starts while the one
before it ends, and reads its weights before it waits for it.

Not covered: biases of experts.
Axis letters: T tokens, D hidden, F expert width, K experts a token.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, no-any-return"

import json
from functools import cache
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import expert_slots
from kernels.reference import ACTIVATIONS
from kernels.triton_gemv import (
    launch_options,
    load_block,
    load_tiles,
    pack_bytes,
    quantise,
    rms_scale,
    rows_product,
    tiles_product,
    wait_for_inputs,
)

MOST_TOKENS: Final = 8
_BYTES: Final = {"bf16": 2.0, "f16": 2.0, "f32": 4.0, "fp8": 1.0, "mxfp4": 0.5}  # of a weight in rows


class GpuMatrix(NamedTuple):
    """A dense weight [rows, columns] on the device.

    data uint8: rows for "bf16", "f16" and "f32", the CPU library's packed tiles for "int8" and "int4".
    """

    data: Tensor
    format: str
    rows: int
    columns: int


class Shape(NamedTuple):
    """What a program of a kernel takes on.

    rows of the weight, or tiles of 16 (up of packed experts: always 2 of gate and 2 of up), and how many of
    their columns at once, a power of two from 64. run: of load_tiles.
    """

    rows: int
    warps: int
    columns: int
    run: int = 8


# ---- dense -------------------------------------------------------------------------------------------------


@triton.jit
def _finish(y, out, rows, row, bias, BIAS: tl.constexpr, RESIDUAL: tl.constexpr):
    """out[row] = or += y + bias."""
    inside = row < rows
    if BIAS:
        y += tl.load(bias + row, mask=inside, other=0.0)
    if RESIDUAL:
        y += tl.load(out + row, mask=inside, other=0.0)
    tl.store(out + row, y, mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def _linear_tiles(
    x, base, out, norm, bias, eps, rows, tokens, COLUMNS: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
    PADDED: tl.constexpr, BITS: tl.constexpr, RUN: tl.constexpr, NORM: tl.constexpr, BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr, EXACT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """R tiles a program, one token after the other."""
    first, last = tl.program_id(0) * R, (rows + 15) // 16
    words, scales = load_tiles(base, first, last, 0, COLUMNS, C, BITS, R, RUN)
    wait_for_inputs(PDL)
    row = first * 16 + tl.arange(0, 16 * R)
    for _ in tl.range(0, tokens, disable_licm=True):  # weights stay packed: unpacked they fill the registers
        y = tiles_product(
            words, scales, base, first, last, x, x, norm, COLUMNS, R, C, BITS, RUN, NORM, False, EXACT
        )
        if NORM:
            y *= rms_scale(x, COLUMNS, PADDED, eps)  # last: x is in L1 now
        _finish(tl.reshape(y, (16 * R,)), out, rows, row, bias, BIAS, RESIDUAL)
        x += COLUMNS
        out += rows


@triton.jit(do_not_specialize=["tokens"])
def _linear_rows(
    x, base, out, norm, bias, eps, rows, tokens, COLUMNS: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
    PADDED: tl.constexpr, FORMAT: tl.constexpr, NORM: tl.constexpr, BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """R rows a program, one token after the other."""
    first = tl.program_id(0) * R
    weights, scales = load_block(base, base, first, rows, 0, COLUMNS, C, R, FORMAT)
    wait_for_inputs(PDL)
    row = first + tl.arange(0, R)
    for _ in tl.range(0, tokens, disable_licm=True):  # weights stay in 16 bits
        y = rows_product(weights, scales, base, base, first, rows, x, norm, COLUMNS, R, C, FORMAT, NORM)
        if NORM:
            y *= rms_scale(x, COLUMNS, PADDED, eps)  # last: x is in L1 now
        _finish(y, out, rows, row, bias, BIAS, RESIDUAL)
        x += COLUMNS
        out += rows


def linear(
    x: Tensor,
    weight: GpuMatrix,
    out: Tensor,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    bias: Tensor | None = None,
    residual: bool = False,
    exact: bool = False,
    shape: Shape | None = None,
) -> None:
    """out [T, rows] = (with residual: +=) norm(x) W^T + bias.

    x [T, columns], out, norm [columns] (of an RMS norm; None: x as it is) and bias [rows] fp32, contiguous.
    """
    tokens, columns = x.shape
    assert tokens <= MOST_TOKENS and columns == weight.columns
    assert out.shape == (tokens, weight.rows) and x.is_contiguous() and out.is_contiguous()
    flags: dict[str, Any] = {"NORM": norm is not None, "BIAS": bias is not None, "RESIDUAL": residual}
    arguments = (out, x if norm is None else norm, x if bias is None else bias, eps, weight.rows, tokens)
    shape = shape or launch_shape("linear", weight.format, columns)
    flags |= {"COLUMNS": columns, "R": shape.rows, "C": shape.columns, "num_warps": shape.warps}
    flags |= {"PADDED": triton.next_power_of_2(columns), **launch_options(x.device)}
    if weight.format in expert_slots.BITS:
        _linear_tiles[(triton.cdiv(weight.rows, 16 * shape.rows),)](
            x, weight.data, *arguments, BITS=expert_slots.BITS[weight.format], RUN=shape.run, EXACT=exact,
            **flags,
        )  # fmt: skip
    else:
        _linear_rows[(triton.cdiv(weight.rows, shape.rows),)](
            x, weight.data, *arguments, FORMAT=weight.format, **flags
        )


# ---- experts -----------------------------------------------------------------------------------------------


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(tl.minimum(-x, 88.0)))


@triton.jit
def _activate(gate, up, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        return gate * _sigmoid(gate) * up
    elif ACTIVATION == "gelu":
        return 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865475)) * up
    elif ACTIVATION == "gelu_pytorch_tanh":
        return gate * _sigmoid(1.5957691216 * (gate + 0.044715 * gate * gate * gate)) * up
    elif ACTIVATION == "relu":
        return tl.maximum(gate, 0.0) * up
    else:  # swiglu_clamped, gpt-oss's
        gate = tl.minimum(gate, 7.0)
        up = tl.minimum(tl.maximum(up, -7.0), 7.0)
        return (up + 1.0) * (gate * _sigmoid(1.702 * gate))


@triton.jit
def _expert(slot, arena, stride, ram, ram_stride, first_in_ram, IN_RAM: tl.constexpr):
    """Where an expert lies: in a slot of VRAM, or from `first_in_ram` on of pinned RAM, read over PCIe."""
    at = arena + slot.to(tl.int64) * stride
    if IN_RAM:
        at = tl.where(slot < first_in_ram, at, ram + (slot - first_in_ram).to(tl.int64) * ram_stride)
    return at


# SHARED is P, or 0. Of the pairs of one expert the first one's programs then compute all, with weights that
# they have read once, as far as they hold a row's columns: nothing keeps for others what comes over PCIe (64
# pairs of 20 experts took 3.1 times as long as 20 pairs of them), while the second-level cache keeps what
# comes from VRAM.


@triton.jit
def _pairs_of(slots, slot, pair, pairs, SHARED: tl.constexpr):
    """Which pairs a program computes, bool [P], from its own on; and how many."""
    p = tl.arange(0, SHARED)
    mine = (tl.load(slots + p, mask=p < pairs, other=-1) == slot) & (slot >= 0)
    count = tl.sum(mine.to(tl.int32))
    return mine, tl.where(_next_pair(mine, -1, SHARED) == pair, count, 0)


@triton.jit
def _next_pair(mine, after, SHARED: tl.constexpr):
    """The first pair of `mine` behind another one, P if there is none."""
    p = tl.arange(0, SHARED)
    return tl.min(tl.where(mine & (p > after), p, SHARED))


@triton.jit
def _up_tiles_of(
    pair, group, words, scales, base, x, h, h_scales, D: tl.constexpr, GROUPS: tl.constexpr, K: tl.constexpr,
    C: tl.constexpr, BITS: tl.constexpr, RUN: tl.constexpr, ACTIVATION: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """A group of hidden activations of one pair, ready for down."""
    y = tiles_product(
        words, scales, base, 4 * group, 4 * GROUPS, x + pair // K * D, x, x, D, 4, C, BITS, RUN,
        False, False, EXACT,
    )  # fmt: skip
    gate, up = tl.split(tl.permute(tl.reshape(y, (2, 2, 16)), (0, 2, 1)))  # tiles alternate
    hidden = tl.reshape(_activate(gate, up, ACTIVATION), (1, 32))
    at = pair * GROUPS + group
    if EXACT:
        tl.store(h + at * 32 + tl.arange(0, 32)[None, :], hidden)
    else:
        codes, h_scale = quantise(hidden)
        tl.store(h.to(tl.pointer_type(tl.int32)) + at * 8 + tl.arange(0, 8), pack_bytes(codes, 8))
        tl.store(h_scales + at + tl.arange(0, 1), h_scale)


@triton.jit(do_not_specialize=["pairs"], do_not_specialize_on_alignment=["slots"])
def _up_tiles(
    x, slots, arena, stride, ram, ram_stride, first_in_ram, h, h_scales, pairs, D: tl.constexpr,
    F: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BITS: tl.constexpr, RUN: tl.constexpr,
    ACTIVATION: tl.constexpr, EXACT: tl.constexpr, IN_RAM: tl.constexpr, SHARED: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """32 rows of gate and up of one pair a program."""
    wait_for_inputs(PDL)
    pair, group = tl.program_id(0), tl.program_id(1)
    slot = tl.load(slots + pair)
    GROUPS: tl.constexpr = (F + 63) // 64 * 2
    if SHARED:
        mine, count = _pairs_of(slots, slot, pair, pairs, SHARED)
        if count > 0:
            base = _expert(slot, arena, stride, ram, ram_stride, first_in_ram, IN_RAM)
            words, scales = load_tiles(base, 4 * group, 4 * GROUPS, 0, D, C, BITS, 4, RUN)
            for _ in tl.range(0, count, disable_licm=True):
                _up_tiles_of(
                    pair, group, words, scales, base, x, h, h_scales, D, GROUPS, K, C, BITS, RUN, ACTIVATION,
                    EXACT,
                )  # fmt: skip
                pair = _next_pair(mine, pair, SHARED)
    elif slot >= 0:
        base = _expert(slot, arena, stride, ram, ram_stride, first_in_ram, IN_RAM)
        words, scales = load_tiles(base, 4 * group, 4 * GROUPS, 0, D, C, BITS, 4, RUN)
        _up_tiles_of(
            pair, group, words, scales, base, x, h, h_scales, D, GROUPS, K, C, BITS, RUN, ACTIVATION, EXACT
        )


@triton.jit
def _down_tiles_of(
    pair, first, last, words, scales, base, h, h_scales, products, D: tl.constexpr, WIDTH: tl.constexpr,
    C: tl.constexpr, R: tl.constexpr, BITS: tl.constexpr, RUN: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Some rows of one pair's product."""
    of_pair = h + pair * WIDTH if EXACT else h.to(tl.pointer_type(tl.int32)) + pair * (WIDTH // 4)
    y = tiles_product(
        words, scales, base, first, last, of_pair, h_scales + pair * (WIDTH // 32), h, WIDTH,
        R, C, BITS, RUN, False, True, EXACT,
    )  # fmt: skip
    row = first * 16 + tl.arange(0, 16 * R)
    tl.store(products + pair * D + row, tl.reshape(y, (16 * R,)), mask=row < D)


@triton.jit(do_not_specialize=["pairs"], do_not_specialize_on_alignment=["slots"])
def _down_tiles(
    h, h_scales, slots, arena, stride, ram, ram_stride, first_in_ram, products, pairs, D: tl.constexpr,
    F: tl.constexpr, C: tl.constexpr, R: tl.constexpr, BITS: tl.constexpr, RUN: tl.constexpr,
    OFFSET: tl.constexpr, EXACT: tl.constexpr, IN_RAM: tl.constexpr, SHARED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """R tiles of down of one pair a program."""
    pair, first = tl.program_id(0), tl.program_id(1) * R
    slot = tl.load(slots + pair)  # older than the kernel before this one
    is_active = slot >= 0
    if SHARED:
        mine, count = _pairs_of(slots, slot, pair, pairs, SHARED)
        is_active = count > 0
    WIDTH: tl.constexpr = (F + 63) // 64 * 64
    base = _expert(tl.maximum(slot, 0), arena, stride, ram, ram_stride, first_in_ram, IN_RAM)
    base += OFFSET
    last = tl.where(is_active, (D + 15) // 16, 0)
    words, scales = load_tiles(base, first, last, 0, WIDTH, C, BITS, R, RUN)
    wait_for_inputs(PDL)
    if SHARED:
        for _ in tl.range(0, count, disable_licm=True):
            _down_tiles_of(
                pair, first, last, words, scales, base, h, h_scales, products, D, WIDTH, C, R, BITS, RUN,
                EXACT,
            )  # fmt: skip
            pair = _next_pair(mine, pair, SHARED)
    elif slot >= 0:
        _down_tiles_of(
            pair, first, last, words, scales, base, h, h_scales, products, D, WIDTH, C, R, BITS, RUN, EXACT
        )


@triton.jit(do_not_specialize=["pairs"], do_not_specialize_on_alignment=["slots"])
def _up_rows(
    x, slots, arena, stride, ram, ram_stride, first_in_ram, h, pairs, GATE_SCALES: tl.constexpr,
    UP: tl.constexpr, UP_SCALES: tl.constexpr, D: tl.constexpr, F: tl.constexpr, K: tl.constexpr,
    C: tl.constexpr, R: tl.constexpr, FORMAT: tl.constexpr, ACTIVATION: tl.constexpr, IN_RAM: tl.constexpr,
    SHARED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """R rows of gate and of up of one pair a program."""
    wait_for_inputs(PDL)
    pair, first = tl.program_id(0), tl.program_id(1) * R
    slot = tl.load(slots + pair)
    count = (slot >= 0).to(tl.int32)
    if SHARED:
        mine, count = _pairs_of(slots, slot, pair, pairs, SHARED)
    if count > 0:
        base = _expert(slot, arena, stride, ram, ram_stride, first_in_ram, IN_RAM)
        g, g_scales = load_block(base, base + GATE_SCALES, first, F, 0, D, C, R, FORMAT)
        u, u_scales = load_block(base + UP, base + UP_SCALES, first, F, 0, D, C, R, FORMAT)
        row = first + tl.arange(0, R)
        for _ in tl.range(0, count if SHARED else 1, disable_licm=True):
            of_token = x + pair // K * D
            gate = rows_product(
                g, g_scales, base, base + GATE_SCALES, first, F, of_token, x, D, R, C, FORMAT, False
            )
            up = rows_product(
                u, u_scales, base + UP, base + UP_SCALES, first, F, of_token, x, D, R, C, FORMAT, False
            )
            tl.store(h + pair * F + row, _activate(gate, up, ACTIVATION), mask=row < F)
            if SHARED:
                pair = _next_pair(mine, pair, SHARED)


@triton.jit(do_not_specialize=["pairs"], do_not_specialize_on_alignment=["slots"])
def _down_rows(
    h, slots, arena, stride, ram, ram_stride, first_in_ram, products, pairs, DOWN: tl.constexpr,
    DOWN_SCALES: tl.constexpr, D: tl.constexpr, F: tl.constexpr, C: tl.constexpr, R: tl.constexpr,
    FORMAT: tl.constexpr, IN_RAM: tl.constexpr, SHARED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """R rows of down of one pair a program."""
    pair, first = tl.program_id(0), tl.program_id(1) * R
    slot = tl.load(slots + pair)  # older than the kernel before this one
    count = (slot >= 0).to(tl.int32)
    if SHARED:
        mine, count = _pairs_of(slots, slot, pair, pairs, SHARED)
    base = _expert(tl.maximum(slot, 0), arena, stride, ram, ram_stride, first_in_ram, IN_RAM)
    base += DOWN
    scale_base = base + (DOWN_SCALES - DOWN)
    last = tl.where(count > 0, D, 0)
    weights, scales = load_block(base, scale_base, first, last, 0, F, C, R, FORMAT)
    wait_for_inputs(PDL)
    if count > 0:
        row = first + tl.arange(0, R)
        for _ in tl.range(0, count if SHARED else 1, disable_licm=True):
            y = rows_product(
                weights, scales, base, scale_base, first, last, h + pair * F, h, F, R, C, FORMAT, False
            )
            tl.store(products + pair * D + row, y, mask=row < D)
            if SHARED:
                pair = _next_pair(mine, pair, SHARED)


@triton.jit(do_not_specialize_on_alignment=["weights"])
def _combine(products, weights, x, D: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """x[t] += sum over k, in order, of weights[t, k] products[t K + k]."""
    wait_for_inputs(PDL)
    t = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < D
    sum = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(K):
        sum += tl.load(weights + t * K + k) * tl.load(products + (t * K + k) * D + at, mask=inside, other=0.0)
    tl.store(x + t * D + at, tl.load(x + t * D + at, mask=inside, other=0.0) + sum, mask=inside)


class ExpertDecode:
    """The routed experts of a layer for up to `max_tokens` tokens; its workspace serves all layers in turn.

    format: expert_slots.FORMATS. activation: a name of ACTIVATIONS. exact: fp32 activations for int4 and
    int8, too. products [max_tokens * top_k, D] fp32: row t * K + k is what the k-th expert of token t gave.
    """

    def __init__(
        self,
        hidden: int,
        width: int,
        format: str,
        activation: str,
        top_k: int,
        max_tokens: int,
        device: torch.device | str,
        exact: bool = False,
    ) -> None:
        assert format in expert_slots.FORMATS and activation in ACTIVATIONS
        self.hidden, self.width, self.format, self.top_k = hidden, width, format, top_k
        self.activation, self.exact = activation, exact
        self._at = expert_slots.slot_layout(format, hidden, width)
        rows = max_tokens * top_k
        self.products = torch.zeros(rows, hidden, device=device)
        padded = triton.cdiv(width, 64) * 64
        # Hidden activations: int8 codes and a scale a group, or fp32.
        self._codes = torch.zeros(rows, padded, device=device)
        self._scales = torch.zeros(rows, padded // expert_slots.GROUP, device=device)
        self.options = launch_options(self.products.device)
        self.up_shape = launch_shape("up", format, hidden)
        self.down_shape = launch_shape("down", format, width)

    def run(self, h: Tensor, slots: Tensor, arena: Tensor, ram: Tensor | None = None) -> None:
        """products[p] = expert in slot slots[p] of h[p // K], for every place p with slots[p] >= 0.

        h [T, D] fp32, slots int32 [T * K], arena uint8 [slots, stride]. Rows of skipped places stay as they
        are. ram uint8 [slots, stride], in RAM that the driver has pinned: slots len(arena) and beyond, which
        are read over PCIe.
        """
        pairs = slots.numel()
        assert h.is_contiguous() and pairs == len(h) * self.top_k <= len(self.products)
        assert arena.is_contiguous() and arena.shape[1] % 16 == 0
        assert ram is None or (ram.is_contiguous() and ram.shape[1] % 16 == 0)
        self.up(h, slots, arena, ram)
        self.down(slots, arena, ram)

    def up(self, h: Tensor, slots: Tensor, arena: Tensor, ram: Tensor | None = None) -> None:
        """The first half of `run`: hidden activations into the workspace."""
        rows, warps, columns, run = self.up_shape
        where, pairs = _slots(arena, ram), slots.numel()
        options = {**self._constants(pairs, ram), "K": self.top_k, "C": columns, "num_warps": warps}
        if self.format in expert_slots.BITS:
            _up_tiles[(pairs, triton.cdiv(self.width, 64) * 2)](
                h, slots, *where, self._codes, self._scales, pairs, RUN=run, ACTIVATION=self.activation,
                **options,
            )  # fmt: skip
        else:
            _up_rows[(pairs, triton.cdiv(self.width, rows))](
                h, slots, *where, self._codes, pairs, GATE_SCALES=self._at.gate_scales,
                UP=self._at.up, UP_SCALES=self._at.up_scales, R=rows, ACTIVATION=self.activation, **options,
            )  # fmt: skip

    def down(self, slots: Tensor, arena: Tensor, ram: Tensor | None = None) -> None:
        """The second: products."""
        rows, warps, columns, run = self.down_shape
        where, pairs = _slots(arena, ram), slots.numel()
        options = {**self._constants(pairs, ram), "C": columns, "R": rows, "num_warps": warps}
        if self.format in expert_slots.BITS:
            _down_tiles[(pairs, triton.cdiv(self.hidden, 16 * rows))](
                self._codes, self._scales, slots, *where, self.products, pairs, RUN=run, OFFSET=self._at.down,
                **options,
            )  # fmt: skip
        else:
            _down_rows[(pairs, triton.cdiv(self.hidden, rows))](
                self._codes, slots, *where, self.products, pairs, DOWN=self._at.down,
                DOWN_SCALES=self._at.down_scales, **options,
            )  # fmt: skip

    def combine(self, weights: Tensor, x: Tensor) -> None:
        """x [T, D] += sum over k, in order, of weights [T, K] times products."""
        block = 256
        _combine[(len(x), triton.cdiv(self.hidden, block))](
            self.products, weights, x, D=self.hidden, K=self.top_k, BLOCK=block, num_warps=2, **self.options
        )

    def _constants(self, pairs: int, ram: Tensor | None) -> dict[str, Any]:
        shared = 0 if ram is None or pairs == self.top_k else triton.next_power_of_2(len(self.products))
        constants = {"D": self.hidden, "F": self.width, "IN_RAM": ram is not None, "SHARED": shared}
        if self.format in expert_slots.BITS:
            constants |= {"BITS": expert_slots.BITS[self.format], "EXACT": self.exact}
        else:
            constants |= {"FORMAT": self.format}
        return {**constants, **self.options}


def _slots(arena: Tensor, ram: Tensor | None) -> tuple[Tensor, int, Tensor, int, int]:
    """As the kernels take them."""
    below = arena if ram is None else ram
    return arena, arena.stride(0), below, below.stride(0), len(arena)


# ---- launch configurations ---------------------------------------------------------------------------------


def launch_shape(kernel: str, format: str, columns: int) -> Shape:
    """kernel: "linear", "up" or "down". As scripts/bench_gpu_decode.py --tune found, or a guess."""
    padded = triton.next_power_of_2(columns)
    found = tuned_shapes().get(f"{kernel} {format} {padded}")
    return Shape(*found) if found else guessed_shape(kernel, format, columns)


def guessed_shape(kernel: str, format: str, columns: int) -> Shape:
    """What leaves a thread some registers: about 32 of weights in use, and as many on their way."""
    padded = max(64, triton.next_power_of_2(columns))
    if format in expert_slots.BITS:
        bits = expert_slots.BITS[format]
        whole, chunk = (8192, 4096) if kernel == "up" else (16384, 8192)  # bits of a row
        warps = max(1, min(8, padded * bits // (512 if kernel == "up" else 2048)))
        return Shape(2 if kernel == "up" else 1, warps, padded if padded * bits <= whole else chunk // bits)
    warps, at_once = max(1, min(8, padded // 256)), padded if padded <= 4096 else 2048
    dwords = at_once * _BYTES[format] * (2 if kernel == "up" else 1) / (128 * warps)  # of a row, in a thread
    return Shape(max(1, min(8, int(32 / dwords))), warps, at_once)


@cache
def tuned_shapes() -> dict[str, list[int]]:
    """Launch shapes by kernel, format and columns (the next power of two), tuned on an H100."""
    file = Path(__file__).parent / "tuning" / "decode_sm90.json"
    return json.loads(file.read_text("utf-8"))["shapes"] if file.exists() else {}
