"""Triton pieces of the decode kernels: activations made ready, and blocks of weight rows times them.

A program holds all columns of its activations in registers and reads whole rows, so that every weight load is
under way at once and nothing is summed across programs. Columns are padded to a power of two under a mask.

Axis letters: L weight lines of 4 bytes a row (packed tiles), R rows of a block, C columns.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, no-any-return"

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


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
def load_columns(x, norm, scale, at, mask, NORM: tl.constexpr):
    """x at the columns `at`, normed if NORM."""
    v = tl.load(x + at, mask=mask, other=0.0)
    if NORM:
        v = v * scale * tl.load(norm + at, mask=mask, other=0.0)
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
def quantised_lines(
    x, norm, scale, columns: tl.constexpr, L: tl.constexpr, BITS: tl.constexpr, NORM: tl.constexpr
):
    """x [columns] as lines of packed tiles meet it -> low, high int32 [L] (high: int4 only), scales [L]."""
    GROUPS: tl.constexpr = L // BITS
    at = (32 * tl.arange(0, GROUPS))[:, None] + tl.arange(0, 32)[None, :]
    codes, scales = quantise(load_columns(x, norm, scale, at, at < columns, NORM))
    dwords = pack_bytes(codes, 8 * GROUPS)
    scales = tl.reshape(tl.broadcast_to(scales[:, None], (GROUPS, BITS)), (L,))
    if BITS == 4:
        low, high = tl.split(tl.reshape(dwords, (L, 2)))
        return low, high, scales
    else:
        return dwords, dwords, scales


@triton.jit
def stored_lines(codes, scales, LINES: tl.constexpr, L: tl.constexpr, BITS: tl.constexpr):
    """The same from int8 codes as dwords and their scales in memory."""
    line = tl.arange(0, L)
    inside = line < LINES
    s = tl.load(scales + line // BITS, mask=inside, other=0.0)
    if BITS == 4:
        low = tl.load(codes + 2 * line, mask=inside, other=0)
        return low, tl.load(codes + 2 * line + 1, mask=inside, other=0), s
    else:
        dwords = tl.load(codes + line, mask=inside, other=0)
        return dwords, dwords, s


# ---- packed tiles ------------------------------------------------------------------------------------------


@triton.jit
def load_tiles(base, first, last, LINES: tl.constexpr, L: tl.constexpr, BITS: tl.constexpr, R: tl.constexpr):
    """Tiles first to first + R of a tiled matrix; those from `last` on and lines from LINES on are zeros.

    base: its first byte -> words int32 [R, L, 16], scales fp16 [R, L, 16].
    """
    PER_BLOCK: tl.constexpr = 2 * BITS  # lines of a superblock
    DWORDS: tl.constexpr = 16 + 16 * PER_BLOCK  # of a superblock
    tile = first + tl.arange(0, R)
    line = tl.arange(0, L)
    row = tl.arange(0, 16)
    block = line // PER_BLOCK * DWORDS
    mask = (tile < last)[:, None, None] & (line < LINES)[None, :, None]
    start = tile.to(tl.int64) * (LINES // PER_BLOCK * DWORDS)
    words = start[:, None, None] + (block + 16 + line % PER_BLOCK * 16)[None, :, None] + row[None, None, :]
    scales = (2 * start)[:, None, None] + (2 * block + line % PER_BLOCK // BITS * 16)[None, :, None]
    return (
        tl.load(base.to(tl.pointer_type(tl.int32)) + words, mask=mask, other=0),
        tl.load(base.to(tl.pointer_type(tl.float16)) + (scales + row[None, None, :]), mask=mask, other=0.0),
    )


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
def tiles_times_lines(
    words, scales, low, high, x_scales, R: tl.constexpr, L: tl.constexpr, BITS: tl.constexpr
):
    """words, scales [R, L, 16] times quantised lines [L] -> [R, 16]."""
    none = tl.zeros((R, L, 16), tl.int32)
    if BITS == 4:
        # A code less 8, times 16, is its nibble in the upper half of a byte with the sign bit turned.
        first = ((words << 4) & -0x0F0F0F10) ^ -0x7F7F7F80
        second = (words & -0x0F0F0F10) ^ -0x7F7F7F80
        sum = _dot4(second, high[None, :, None], _dot4(first, low[None, :, None], none))
        factor = x_scales * 0.0625
    else:
        sum = _dot4(words ^ -0x7F7F7F80, low[None, :, None], none)
        factor = x_scales
    return tl.sum(sum.to(tl.float32) * (scales.to(tl.float32) * factor[None, :, None]), axis=1)


@triton.jit
def tiles_times_floats(
    words, scales, x, norm, scale, columns: tl.constexpr, R: tl.constexpr, L: tl.constexpr, BITS:
    tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """words, scales [R, L, 16] times x [columns] in memory, unrounded -> [R, 16]."""
    line = tl.arange(0, L)
    sum = tl.zeros((R, L, 16), tl.float32)
    WIDE: tl.constexpr = 8 if BITS == 4 else 4
    ZERO: tl.constexpr = 8.0 if BITS == 4 else 128.0
    for j in tl.static_range(WIDE):
        at = WIDE * line + j
        v = load_columns(x, norm, scale, at, at < columns, NORM)
        code = (words >> (8 * (j % 4) + j // 4 * 4)) & (15 if BITS == 4 else 255)
        sum += (code.to(tl.float32) - ZERO) * v[None, :, None]
    return tl.sum(sum * scales.to(tl.float32), axis=1)


# ---- rows --------------------------------------------------------------------------------------------------


@triton.jit
def load_rows(base, first, last, columns: tl.constexpr, C: tl.constexpr, R: tl.constexpr):
    """Rows first to first + R of a matrix [last, columns] -> [R, C], zeros outside. base: a typed pointer."""
    row = first + tl.arange(0, R)
    c = tl.arange(0, C)
    mask = (row < last)[:, None] & (c < columns)[None, :]
    return tl.load(base + row.to(tl.int64)[:, None] * columns + c[None, :], mask=mask, other=0.0)


@triton.jit
def load_block(
    base, scales, first, last, columns: tl.constexpr, C: tl.constexpr, R: tl.constexpr, FORMAT: tl.constexpr
):  # fmt: skip
    """Rows first to first + R of an expert's matrix [last, columns], as expert_slots.py has it.

    mxfp4: bytes [R, C / 2] and scale bytes [R, C / 32]. fp8: bytes [R, C] and the scales [C] of these rows,
    which lie in one block of 128. Others: [R, C], twice.
    """
    if FORMAT == "mxfp4":
        weights = load_rows(base, first, last, columns // 2, C // 2, R)
        return weights, load_rows(scales, first, last, columns // 32, C // 32, R)
    elif FORMAT == "fp8":
        c = tl.arange(0, C)
        at = scales.to(tl.pointer_type(tl.float32)) + first // 128 * ((columns + 127) // 128) + c // 128
        return load_rows(base, first, last, columns, C, R), tl.load(at, mask=c < columns, other=0.0)
    elif FORMAT == "bf16":
        weights = load_rows(base.to(tl.pointer_type(tl.bfloat16)), first, last, columns, C, R)
        return weights, weights
    elif FORMAT == "f16":
        weights = load_rows(base.to(tl.pointer_type(tl.float16)), first, last, columns, C, R)
        return weights, weights
    else:
        weights = load_rows(base.to(tl.pointer_type(tl.float32)), first, last, columns, C, R)
        return weights, weights


@triton.jit
def block_times(
    weights, scales, x, columns: tl.constexpr, C: tl.constexpr, R: tl.constexpr, FORMAT: tl.constexpr
):  # fmt: skip
    """What load_block gave, times x [columns] in memory -> [R].

    e4m3 and e2m1 become fp32 by moving their bits, exponents as they are: 2 ** 120 and 2 ** 126 too small,
    which x and the scales make up for by half each, so that nothing leaves fp32's range.
    """
    if FORMAT == "mxfp4":
        c = tl.arange(0, C // 2)
        even = tl.load(x + 2 * c, mask=2 * c < columns, other=0.0) * 9223372036854775808.0  # 2 ** 63
        odd = tl.load(x + 2 * c + 1, mask=2 * c < columns, other=0.0) * 9223372036854775808.0
        pairs = weights.to(tl.int32)
        sums = _e2m1(pairs) * even[None, :] + _e2m1(pairs >> 4) * odd[None, :]
        sums = tl.sum(tl.reshape(sums, (R, C // 32, 16)), axis=2)
        return tl.sum(sums * (_e8m0(scales) * 9223372036854775808.0), axis=1)
    else:
        c = tl.arange(0, C)
        v = tl.load(x + c, mask=c < columns, other=0.0)
        if FORMAT == "fp8":
            v = v * 1152921504606846976.0 * (scales * 1152921504606846976.0)  # 2 ** 60
            bits = weights.to(tl.int32)
            weights = (((bits & 128) << 24) | ((bits & 127) << 20)).to(tl.float32, bitcast=True)
        return tl.sum(weights.to(tl.float32) * v[None, :], axis=1)


@triton.jit
def _e8m0(byte):
    """2 ** (byte - 127)."""
    bits = byte.to(tl.int32) << 23
    return tl.where(bits == 0, 0x400000, bits).to(tl.float32, bitcast=True)


@triton.jit
def _e2m1(nibble):
    """fp32, 2 ** 126 times too small."""
    return (((nibble & 8) << 28) | ((nibble & 7) << 22)).to(tl.float32, bitcast=True)
