"""Packed weights to bf16 in registers, for the grouped kernels: dwords of codes in, the A operand of a matrix
product out.

A dword holds V = 8 (int4, mxfp4) or 4 (int8, fp8) codes of one row; 64 columns are L = 64 / V dwords, "lines"
in packed tiles. Code q of line l is column V l + q. Decoding gives V planes, plane q with the codes q of all
lines, and the planes are laid one behind the other. Within a plane the lines of each 8 are ordered 0, 4, 1,
5, 2, 6, 3, 7: a thread of the product holds two neighbouring columns of the A operand, so four threads read
four lines side by side, and a pair of columns has one of each group's scale. The other operand's columns are
moved the same way once, where they are written (`plane_column`), and nothing has to be exchanged between
threads here: two dwords of a row give V pairs of bf16 in about two instructions a code, and integers become
floats by logic:

    int4   0x4300 | q is 128 + q in bf16; minus 136
    int8   0x4300 | low 7 bits, minus 128 or 256 by the top bit
    fp8    sign | seven bits << 4 is value * 2 ** -120 in bf16
    mxfp4  sign | three bits << 6 is value * 2 ** -126 in bf16

All of these are exact; the product with the group's scale, itself rounded to bf16, is rounded once.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, no-any-return"
from typing import Final

import triton
import triton.language as tl

# Two dwords of a row, $V and $V+1, and their scales as bf16x2, $V+2, to V pairs of bf16. -0.0 as addend keeps
# the product's sign.
_HALVES = """
    prmt.b32 lo, $8, $9, 0x5410;
    prmt.b32 hi, $8, $9, 0x7632;
"""
_INT4_ONE = """
    shr.u32 t, {half}, {shift};
    lop3.b32 t, t, 0x000F000F, 0x43004300, 0xEA;
    fma.rn.bf16x2 t, t, one, zero_point;
    fma.rn.bf16x2 ${q}, t, $10, nothing;
"""
_INT4 = (
    "{ WAIT .reg .b32 lo, hi, t, one, zero_point, nothing;"
    + _HALVES
    + "mov.b32 one, 0x3F803F80; mov.b32 zero_point, 0xC308C308; mov.b32 nothing, 0x80008000;"
    + "".join(
        _INT4_ONE.format(half=("lo", "hi")[q % 4 // 2], shift=q % 2 * 8 + q // 4 * 4, q=q) for q in range(8)
    )
    + "}"
)
_MXFP4_ONE = """
    {sign} s, {half}, {by};
    {value} t, {half}, {places};
    and.b32 t, t, 0x01C001C0;
    lop3.b32 t, s, 0x80008000, t, 0xEA;
    fma.rn.bf16x2 t, t, large, nothing;
    fma.rn.bf16x2 ${q}, t, $10, nothing;
"""
_MXFP4 = (
    "{ WAIT .reg .b32 lo, hi, s, t, large, nothing;"
    + _HALVES
    + "mov.b32 large, 0x7E807E80; mov.b32 nothing, 0x80008000;"
    + "".join(
        _MXFP4_ONE.format(
            half=("lo", "hi")[q // 4],
            sign="shl.b32",
            by=12 - 4 * (q % 4),
            value="shl.b32" if q % 4 < 2 else "shr.u32",
            places=abs(6 - 4 * (q % 4)),
            q=q,
        )
        for q in range(8)
    )
    + "}"
)
_INT8_ONE = """
    prmt.b32 s, $4, $5, {bytes};
    lop3.b32 t, s, 0x007F007F, 0x43004300, 0xEA;
    lop3.b32 s, s, 0x00800080, 0xC380C380, 0x6A;
    fma.rn.bf16x2 t, t, one, s;
    fma.rn.bf16x2 ${q}, t, $6, nothing;
"""
_INT8 = (
    "{ WAIT .reg .b32 s, t, one, nothing; mov.b32 one, 0x3F803F80; mov.b32 nothing, 0x80008000;"
    + "".join(_INT8_ONE.format(bytes=hex(0x4400 + 0x1111 * q), q=q) for q in range(4))
    + "}"
)
_FP8_ONE = """
    prmt.b32 s, $4, $5, {bytes};
    shr.u32 t, s, 4;
    and.b32 t, t, 0x07F007F0;
    lop3.b32 t, s, 0x80008000, t, 0xEA;
    fma.rn.bf16x2 t, t, large, nothing;
    fma.rn.bf16x2 ${q}, t, $6, nothing;
"""
_FP8 = (
    "{ WAIT .reg .b32 s, t, large, nothing; mov.b32 large, 0x7B807B80; mov.b32 nothing, 0x80008000;"
    + "".join(_FP8_ONE.format(bytes=hex(0x4400 + 0x1111 * q), q=q) for q in range(4))
    + "}"
)
_CODE: Final = {"int4": _INT4, "mxfp4": _MXFP4, "int8": _INT8, "fp8": _FP8}
_FOUR = tl.constexpr("=&r,=&r,=&r,=&r,r,r,r")
_EIGHT = tl.constexpr("=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r")


def plane_column(columns: int, codes: int) -> list[int]:
    """Where `columns` columns, a multiple of 64, are found once moved: position p holds column
    plane_column(...)[p].
    """
    lines = 64 // codes

    def column(p: int) -> int:
        k = p % lines
        line = k // 8 * 8 + k % 2 * 4 + k % 8 // 2
        return p // 64 * 64 + codes * line + p % 64 // lines

    return [column(p) for p in range(columns)]


@triton.constexpr_function
def _assembly(format, pending):
    wait = f"wgmma.wait_group.sync.aligned {pending};" if pending >= 0 else ""
    return _CODE[format].replace("WAIT", wait)


@triton.jit
def cast(x, dtype: tl.constexpr, INTERPRET: tl.constexpr):
    """x.to(dtype), to nearest; Triton's interpreter cuts the bits of a bf16 off."""
    if INTERPRET and dtype == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        x = tl.where(x == x, bits, 0x7FC00000).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def decode(
    words, scale, N: tl.constexpr, S: tl.constexpr, FORMAT: tl.constexpr, PENDING: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """words int32 [N, S L], S blocks of 64 columns; scale bf16 of the same shape -> bf16 [N, 64 S], columns
    moved.
    """
    if FORMAT == "int4" or FORMAT == "mxfp4":
        if INTERPRET:
            a = tl.join(_slow(words, scale, 0, FORMAT), _slow(words, scale, 1, FORMAT))
            b = tl.join(_slow(words, scale, 2, FORMAT), _slow(words, scale, 3, FORMAT))
            c = tl.join(_slow(words, scale, 4, FORMAT), _slow(words, scale, 5, FORMAT))
            d = tl.join(_slow(words, scale, 6, FORMAT), _slow(words, scale, 7, FORMAT))
        else:
            p0, p1, p2, p3, p4, p5, p6, p7 = tl.inline_asm_elementwise(
                _assembly(FORMAT, PENDING), _EIGHT, [words, scale],
                dtype=(tl.bfloat16,) * 8, is_pure=True, pack=2,
            )  # fmt: skip
            a = tl.join(p0, p1)
            b = tl.join(p2, p3)
            c = tl.join(p4, p5)
            d = tl.join(p6, p7)
        planes = tl.join(tl.join(a, b), tl.join(c, d))  # [N, S L, bit 0 of q, bit 1, bit 2]
        planes = tl.permute(tl.reshape(planes, (N, S, 8, 2, 2, 2)), (0, 1, 5, 4, 3, 2))
    else:
        if INTERPRET:
            a = tl.join(_slow(words, scale, 0, FORMAT), _slow(words, scale, 1, FORMAT))
            b = tl.join(_slow(words, scale, 2, FORMAT), _slow(words, scale, 3, FORMAT))
        else:
            p0, p1, p2, p3 = tl.inline_asm_elementwise(
                _assembly(FORMAT, PENDING), _FOUR, [words, scale],
                dtype=(tl.bfloat16,) * 4, is_pure=True, pack=2,
            )  # fmt: skip
            a = tl.join(p0, p1)
            b = tl.join(p2, p3)
        planes = tl.permute(tl.reshape(tl.join(a, b), (N, S, 16, 2, 2)), (0, 1, 4, 3, 2))
    return tl.reshape(planes, (N, S * 64))


@triton.jit
def _slow(words, scale, q: tl.constexpr, FORMAT: tl.constexpr):
    """Plane q in plain arithmetic, for Triton's interpreter, which runs no assembly: the same values."""
    if FORMAT == "int4":
        value = ((words >> (8 * (q % 4) + 4 * (q // 4))) & 15).to(tl.float32) - 8.0
    elif FORMAT == "mxfp4":
        code = words >> (4 * q)
        magnitude = ((code & 7) << 22).to(tl.float32, bitcast=True) * 2.0**126
        value = tl.where((code & 8) != 0, -magnitude, magnitude)
    elif FORMAT == "int8":
        value = ((words >> (8 * q)) & 255).to(tl.float32) - 128.0
    else:
        code = words >> (8 * q)
        magnitude = ((code & 127) << 20).to(tl.float32, bitcast=True) * 2.0**120
        value = tl.where((code & 128) != 0, -magnitude, magnitude)
    return cast(value * scale.to(tl.float32), tl.bfloat16, True)
