"""Triton pieces of the decode kernels: activations made ready, and blocks of weight rows times them.

A program reads whole rows, a few at a time, in chunks of columns; the loads of one chunk are under way while
the one before is used. Nothing is summed across programs.

Axis letters: R rows or tiles of a program, C columns of a chunk, G groups of 32 of them.
"""

# mypy: disable-error-code="assignment, no-untyped-def, no-untyped-call, untyped-decorator, no-any-return"

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def launch_options(device: torch.device) -> dict[str, Any]:
    """Of every kernel that calls `wait_for_inputs`: where it can, it starts while the one before ends."""
    early = _launches_early(device) and not INTERPRETED.value
    return {"PDL": early, **({"launch_pdl": True} if early else {})}


@cache
def _launches_early(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@triton.jit
def wait_for_inputs(PDL: tl.constexpr):
    """What earlier kernels wrote is readable from here on; the next kernel may begin with its weights."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


# ---- activations -------------------------------------------------------------------------------------------


@triton.jit
def rms_scale(x, columns: tl.constexpr, C: tl.constexpr, eps):
    """1 / rms of x [columns]."""
    c = tl.arange(0, C)
    v = tl.load(x + c, mask=c < columns, other=0.0)
    return tl.div_rn(1.0, tl.sqrt_rn(tl.sum(v * v) / columns + eps))


@triton.jit
def load_columns(x, norm, at, mask, NORM: tl.constexpr):
    """x at the columns `at`, if NORM times a norm's weight: 1 / rms is left for the product's end."""
    v = tl.load(x + at, mask=mask, other=0.0)
    if NORM:
        v = v * tl.load(norm + at, mask=mask, other=0.0)
    return v


@triton.jit
def _round(v):
    """To the nearest integer, even where two are. The GPU must not fuse the product before into an FMA."""
    if INTERPRETED:
        return (v + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000
    return tl.inline_asm_elementwise(
        "cvt.rni.s32.f32 $0, $1;", "=r,r", [v], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def quantise(v):
    """Groups v [G, 32] -> int8 codes in int32 [G, 32] and scales [G], as the CPU library's quantise_group."""
    largest = tl.max(v.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    size = largest.to(tl.float32, bitcast=True)
    finite = largest < 0x7F800000
    plain = finite & (size >= 1e-30)
    inverse = tl.div_rn(127.0, tl.where(plain, size, 1.0))
    codes = tl.where(plain[:, None], _round(v * inverse[:, None]), 0)
    return codes, tl.where(plain, tl.div_rn(size, 127.0), tl.where(finite, 0.0, float("nan")))


@triton.jit
def pack_bytes(codes, DWORDS: tl.constexpr):
    """int8 codes in int32, 4 DWORDS of them -> int32 [DWORDS], the first in the lowest byte."""
    shift = 8 * tl.arange(0, 4)
    return tl.sum((tl.reshape(codes, (DWORDS, 4)) & 255) << shift[None, :], axis=1)


@triton.jit
def _columns_of(dwords, G: tl.constexpr):
    """int32 [G, 8] -> a tuple of its 8 columns."""
    even, odd = tl.split(tl.reshape(dwords, (G, 4, 2)))
    d04, d26 = tl.split(tl.reshape(even, (G, 2, 2)))
    d15, d37 = tl.split(tl.reshape(odd, (G, 2, 2)))
    d0, d4 = tl.split(d04)
    d1, d5 = tl.split(d15)
    d2, d6 = tl.split(d26)
    d3, d7 = tl.split(d37)
    return d0, d1, d2, d3, d4, d5, d6, d7


@triton.jit
def quantised_groups(x, norm, begin, columns: tl.constexpr, G: tl.constexpr, NORM: tl.constexpr):
    """Columns from `begin` of x [columns] fp32 as int8: a tuple of 8 x int32 [G], and scales [G]."""
    at = (begin + 32 * tl.arange(0, G))[:, None] + tl.arange(0, 32)[None, :]
    codes, scales = quantise(load_columns(x, norm, at, at < columns, NORM))
    return _columns_of(tl.reshape(pack_bytes(codes, 8 * G), (G, 8)), G), scales


@triton.jit
def stored_groups(codes, scales, begin, columns: tl.constexpr, G: tl.constexpr):
    """The same from int8 codes as dwords and their scales in memory."""
    group = begin // 32 + tl.arange(0, G)
    inside = group < columns // 32
    at = (8 * group)[:, None] + tl.arange(0, 8)[None, :]
    dwords = tl.load(codes + at, mask=inside[:, None], other=0)
    return _columns_of(dwords, G), tl.load(scales + group, mask=inside, other=0.0)


# ---- packed tiles ------------------------------------------------------------------------------------------


@triton.jit
def load_tiles(
    base, first, last, begin, columns: tl.constexpr, C: tl.constexpr, BITS: tl.constexpr, R: tl.constexpr,
    RUN: tl.constexpr,
):  # fmt: skip
    """Columns begin to begin + C of tiles first to first + R; those outside and from `last` on are zeros.

    base: the matrix's first byte -> a tuple of BITS x int32 [R, G, 16], the lines of each group, and scales
    fp16 [R, G, 16]. So a thread has a group's lines of its rows: their sum needs no exchange. RUN: of how
    many rows at most, 4 or 8; 8 scales are one load, but 8 rows of a line two.
    """
    BLOCK: tl.constexpr = 16 + 32 * BITS  # dwords of a superblock
    GROUPS: tl.constexpr = (columns + 63) // 64 * 2
    tile = first + tl.arange(0, R)
    group = begin // 32 + tl.arange(0, C // 32)
    row = tl.arange(0, 16)
    mask = (tile < last)[:, None, None] & (group < GROUPS)[None, :, None]
    start = tile.to(tl.int64) * (GROUPS // 2 * BLOCK)
    at = start[:, None, None] + (group // 2 * BLOCK + 16 + group % 2 * (16 * BITS))[None, :, None]
    at = base.to(tl.pointer_type(tl.int32)) + (at + row[None, None, :])
    words = ()
    for j in tl.static_range(BITS):
        words = words + (tl.load(at + 16 * j, mask=mask, other=0),)
    at = (2 * start)[:, None, None] + (group // 2 * (2 * BLOCK) + group % 2 * 16)[None, :, None]
    at = base.to(tl.pointer_type(tl.float16)) + (at + row[None, None, :])
    return words, tl.load(tl.max_contiguous(at, (1, 1, RUN)), mask=mask, other=0.0)


@triton.jit
def tiles_product(
    words, scales, base, first, last, x, x_scales, norm, columns: tl.constexpr, R: tl.constexpr,
    C: tl.constexpr, BITS: tl.constexpr, RUN: tl.constexpr, NORM: tl.constexpr, STORED: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """R tiles times x [columns] -> [R, 16].

    words, scales: what load_tiles gave for the first C columns. x is fp32, times norm if NORM, and rounded
    unless EXACT; or if STORED, int8 codes as dwords, with x_scales.
    """
    if columns <= C:
        product = _tiles_chunk(
            words, scales, x, x_scales, norm, 0, columns, R, C, BITS, NORM, STORED, EXACT
        )
        return tl.sum(product, axis=1)
    else:
        sums = tl.zeros((R, C // 32, 16), tl.float32)
        # Not unrolled: the compiler would ask for all chunks at once and spill them.
        for begin in tl.range(0, columns, C):
            next_words, next_scales = load_tiles(
                base, first, last, begin + C, columns, C, BITS, R, RUN
            )
            sums += _tiles_chunk(
                words, scales, x, x_scales, norm, begin, columns, R, C, BITS, NORM, STORED, EXACT
            )
            words, scales = next_words, next_scales
        return tl.sum(sums, axis=1)


@triton.jit
def _tiles_chunk(
    words, scales, x, x_scales, norm, begin, columns: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
    BITS: tl.constexpr, NORM: tl.constexpr, STORED: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Columns begin to begin + C -> [R, G, 16]: still to be summed."""
    G: tl.constexpr = C // 32
    if EXACT:
        return _times_floats(words, scales, x, norm, begin, columns, R, G, BITS, NORM)
    elif STORED:
        dwords, x_scales = stored_groups(x, x_scales, begin, columns, G)
        return _times_groups(words, scales, dwords, x_scales, R, G, BITS)
    else:
        dwords, x_scales = quantised_groups(x, norm, begin, columns, G, NORM)
        return _times_groups(words, scales, dwords, x_scales, R, G, BITS)


@triton.jit
def _dot4(a, b, sum):
    """sum + the dot product of 4 signed bytes each."""
    if INTERPRETED:
        for j in tl.static_range(4):
            sum += ((a << (24 - 8 * j)) >> 24) * ((b << (24 - 8 * j)) >> 24)
        return sum
    a, b = tl.broadcast(a, b)
    return tl.inline_asm_elementwise(
        "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, sum], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _times_groups(words, scales, dwords, x_scales, R: tl.constexpr, G: tl.constexpr, BITS: tl.constexpr):
    """Groups of weights times groups of int8 activations, a tuple of 8 x int32 [G] -> [R, G, 16]."""
    sum = tl.zeros((R, G, 16), tl.int32)
    for j in tl.static_range(BITS):
        if BITS == 4:
            # A code less 8, times 16, is its nibble in the upper half of a byte with the sign bit turned.
            sum = _dot4(((words[j] << 4) & -0x0F0F0F10) ^ -0x7F7F7F80, dwords[2 * j][None, :, None], sum)
            sum = _dot4((words[j] & -0x0F0F0F10) ^ -0x7F7F7F80, dwords[2 * j + 1][None, :, None], sum)
        else:
            sum = _dot4(words[j] ^ -0x7F7F7F80, dwords[j][None, :, None], sum)
    factor = x_scales * (0.0625 if BITS == 4 else 1.0)
    return sum.to(tl.float32) * (scales.to(tl.float32) * factor[None, :, None])


@triton.jit
def _times_floats(
    words, scales, x, norm, begin, columns: tl.constexpr, R: tl.constexpr, G: tl.constexpr,
    BITS: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Groups of weights times x as it is -> [R, G, 16]."""
    column = begin + 32 * tl.arange(0, G)
    sum = tl.zeros((R, G, 16), tl.float32)
    WIDE: tl.constexpr = 32 // BITS
    ZERO: tl.constexpr = 8.0 if BITS == 4 else 128.0
    for j in tl.static_range(BITS):
        for k in tl.static_range(WIDE):
            at = column + (WIDE * j + k)
            v = load_columns(x, norm, at, at < columns, NORM)
            code = (words[j] >> (8 * (k % 4) + k // 4 * 4)) & (15 if BITS == 4 else 255)
            sum += (code.to(tl.float32) - ZERO) * v[None, :, None]
    return sum * scales.to(tl.float32)


# ---- rows --------------------------------------------------------------------------------------------------


@triton.jit
def load_rows(
    base, first, last, begin, columns: tl.constexpr, C: tl.constexpr, R: tl.constexpr
):  # fmt: skip
    """Columns begin to begin + C of rows first to first + R of a matrix [last, columns], zeros outside.

    base: a pointer of the elements' type -> [R, C].
    """
    row = first + tl.arange(0, R)
    c = begin + tl.arange(0, C)
    mask = (row < last)[:, None] & (c < columns)[None, :]
    return tl.load(base + row.to(tl.int64)[:, None] * columns + c[None, :], mask=mask, other=0.0)


@triton.jit
def load_block(
    base, scales, first, last, begin, columns: tl.constexpr, C: tl.constexpr, R: tl.constexpr,
    FORMAT: tl.constexpr,
):  # fmt: skip
    """The same of a matrix in FORMAT, as expert_slots.py has it: weights, and scales, or weights again.

    mxfp4: bytes [R, C / 2] and scale bytes [R, C / 32]. fp8: bytes [R, C] and the scales [C] of these rows,
    which lie in one block of 128.
    """
    if FORMAT == "mxfp4":
        weights = load_rows(base, first, last, begin // 2, columns // 2, C // 2, R)
        return weights, load_rows(scales, first, last, begin // 32, columns // 32, C // 32, R)
    elif FORMAT == "fp8":
        c = begin + tl.arange(0, C)
        at = scales.to(tl.pointer_type(tl.float32)) + first // 128 * ((columns + 127) // 128) + c // 128
        return load_rows(base, first, last, begin, columns, C, R), tl.load(at, mask=c < columns, other=0.0)
    elif FORMAT == "bf16":
        weights = load_rows(base.to(tl.pointer_type(tl.bfloat16)), first, last, begin, columns, C, R)
        return weights, weights
    elif FORMAT == "f16":
        weights = load_rows(base.to(tl.pointer_type(tl.float16)), first, last, begin, columns, C, R)
        return weights, weights
    else:
        weights = load_rows(base.to(tl.pointer_type(tl.float32)), first, last, begin, columns, C, R)
        return weights, weights


@triton.jit
def rows_product(
    weights, scales, base, scale_base, first, last, x, norm, columns: tl.constexpr, R: tl.constexpr,
    C: tl.constexpr, FORMAT: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """R rows times x [columns] fp32, times norm if NORM -> [R].

    weights, scales: what load_block gave for the first C columns.
    """
    if columns <= C:
        return tl.sum(_block_times(weights, scales, x, norm, 0, columns, C, R, FORMAT, NORM), axis=1)
    else:
        sums = tl.zeros((R, C // 32 if FORMAT == "mxfp4" else C), tl.float32)
        for begin in tl.range(0, columns, C):
            next_weights, next_scales = load_block(
                base, scale_base, first, last, begin + C, columns, C, R, FORMAT
            )
            sums += _block_times(weights, scales, x, norm, begin, columns, C, R, FORMAT, NORM)
            weights, scales = next_weights, next_scales
        return tl.sum(sums, axis=1)


@triton.jit
def _block_times(
    weights, scales, x, norm, begin, columns: tl.constexpr, C: tl.constexpr,
    R: tl.constexpr, FORMAT: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """What load_block gave, times its columns of x -> [R, C], of mxfp4 [R, C / 32]: still to be summed.

    e4m3 and e2m1 become fp32 by moving their bits, exponents as they are: 2 ** 120 and 2 ** 126 too small,
    which x and the scales make up for by half each, so that nothing leaves fp32's range.
    """
    if FORMAT == "mxfp4":
        c = begin + 2 * tl.arange(0, C // 2)
        even = load_columns(x, norm, c, c < columns, NORM) * 9223372036854775808.0  # 2 ** 63
        odd = load_columns(x, norm, c + 1, c < columns, NORM) * 9223372036854775808.0
        pairs = weights.to(tl.int32)
        sums = _e2m1(pairs) * even[None, :] + _e2m1(pairs >> 4) * odd[None, :]
        sums = tl.sum(tl.reshape(sums, (R, C // 32, 16)), axis=2)
        return sums * (_e8m0(scales) * 9223372036854775808.0)
    else:
        c = begin + tl.arange(0, C)
        v = load_columns(x, norm, c, c < columns, NORM)
        if FORMAT == "fp8":
            v = v * 1152921504606846976.0 * (scales * 1152921504606846976.0)  # 2 ** 60
            bits = weights.to(tl.int32)
            weights = (((bits & 128) << 24) | ((bits & 127) << 20)).to(tl.float32, bitcast=True)
        return weights.to(tl.float32) * v[None, :]


@triton.jit
def _e8m0(byte):
    """2 ** (byte - 127)."""
    bits = byte.to(tl.int32) << 23
    return tl.where(bits == 0, 0x400000, bits).to(tl.float32, bitcast=True)


@triton.jit
def _e2m1(nibble):
    """fp32, 2 ** 126 times too small."""
    return (((nibble & 8) << 28) | ((nibble & 7) << 22)).to(tl.float32, bitcast=True)
