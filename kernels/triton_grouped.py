"""The grouped matrix products of a prefill: every expert's tokens through its weights, wherever they lie in
the arena.

One persistent launch each for gate and up (the gather of tokens in the load, the activation in the epilogue)
and for down (one row of products per (token, k)). What a tile is comes from records on the device
(kernels/triton_schedule.py); no atomics: the bits do not depend on the order of programs, nor on which
experts share a launch.

`rows_*`: weights of 16 or 32 bits, row-major; through the tensor memory accelerator where there is one (TMA:
`weights` and `h` are descriptors), else by pointers. `packed_*`: int4, int8, fp8 and mxfp4, decoded in
registers as the A operand of the product (kernels/triton_dequant.py), so weights are on the M side and tokens
on the N side.

Axis letters: T tokens, D hidden, F expert width, P pairs (T * K). LD_X, LD_H: D and F rounded up to 64.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, no-any-return"
import triton
import triton.language as tl

from kernels.triton_dequant import cast, decode

GROUP_TILES = tl.constexpr(16)  # m-tiles of an expert that share its weights in the L2
# An expert's last tile, if it is of this height or taller, is computed at a half or a quarter of it where
# that is enough.
SPLIT = tl.constexpr(128)


@triton.jit
def _place(records, t, N_TILES: tl.constexpr):
    """Tile t -> slot, m-tile, n-tile, first row, rows of the expert; all m-tiles of one expert side by
    side.
    """
    record = records + (t // N_TILES) * 8
    slot = tl.load(record).to(tl.int64)
    first = tl.load(record + 1)
    tiles = tl.load(record + 2)
    local = t - first * N_TILES
    band = local // (GROUP_TILES * N_TILES)
    height = tl.minimum(tiles - band * GROUP_TILES, GROUP_TILES)
    local -= band * GROUP_TILES * N_TILES
    m_tile, n_tile = band * GROUP_TILES + local % height, local // height
    return slot, m_tile, n_tile, tl.load(record + 3), tl.load(record + 4)


@triton.jit
def _sigmoid(x, INTERPRET: tl.constexpr):
    if INTERPRET:
        return 1.0 / (1.0 + tl.exp(-x))
    # Two units of the special function pipe; the division that the compiler writes out is 8 instructions
    # more.
    return tl.inline_asm_elementwise(
        "{ .reg .f32 t; mul.f32 t, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 t, t; add.f32 t, t, 0f3F800000;"
        " rcp.approx.ftz.f32 $0, t; }",
        "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def activate(gate, up, ACTIVATION: tl.constexpr, INTERPRET: tl.constexpr):
    """act(gate) * up in fp32, as kernels/reference.py."""
    if ACTIVATION == "silu":
        return gate * _sigmoid(gate, INTERPRET) * up
    elif ACTIVATION == "gelu":
        return 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476)) * up
    elif ACTIVATION == "gelu_pytorch_tanh":  # (1 + tanh z) / 2 = sigmoid(2 z)
        return gate * _sigmoid(1.5957691216057308 * gate * (1.0 + 0.044715 * gate * gate), INTERPRET) * up
    elif ACTIVATION == "relu":
        return tl.maximum(gate, 0.0) * up
    else:
        tl.static_assert(ACTIVATION == "swiglu_clamped")
        gate = tl.minimum(gate, 7.0)
        up = tl.minimum(tl.maximum(up, -7.0), 7.0)
        return (up + 1.0) * gate * _sigmoid(1.702 * gate, INTERPRET)


@triton.jit
def _dot(a, b, acc, INTERPRET: tl.constexpr):
    if INTERPRET:  # which multiplies the bit patterns of bf16
        return acc + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    elif a.dtype == tl.float32:
        return tl.dot(a, b, acc, input_precision="tf32x3")
    else:
        return tl.dot(a, b, acc)


@triton.jit
def _rows_up_tile(
    x, weights, h, pairs, slot, m0, n0, row0, count, slot_bytes, top_k,
    D: tl.constexpr, F: tl.constexpr, LD_X: tl.constexpr, LD_H: tl.constexpr, ACTIVATION: tl.constexpr,
    TMA: tl.constexpr, SWAP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """One tile [BM, BN] of h."""
    m = m0 + tl.arange(0, BM)
    n = n0 + tl.arange(0, BN)
    k = tl.arange(0, BK)
    live = m < count
    token = tl.load(pairs + row0 + m, mask=live, other=0) // top_k  # what is not live reads token 0
    x_at = x + token.to(tl.int64)[:, None] * LD_X + k[None, :]
    if not TMA:
        both = tl.arange(0, 2 * BN)
        row = (both // BN) * F + n0 + both % BN
        w_at = (weights + slot * slot_bytes).to(tl.pointer_type(x.dtype.element_ty))
        w_at += row[:, None] * D + k[None, :]
        w_live = (n0 + both % BN < F)[:, None]
    acc = tl.zeros((2 * BN, BM) if SWAP else (BM, 2 * BN), tl.float32)
    for kb in tl.range(0, D, BK):
        if LD_X % BK == 0:
            xv = tl.load(x_at + kb)
        else:
            xv = tl.load(x_at + kb, mask=(kb + k < LD_X)[None, :], other=0.0)
        if TMA:
            w = tl.reshape(weights.load([slot.to(tl.int32), 0, n0, kb]), (2 * BN, BK))
        elif D % BK == 0 and F % BN == 0:
            w = tl.load(w_at + kb)
        else:
            w = tl.load(w_at + kb, mask=w_live & (kb + k < D)[None, :], other=0.0)
        acc = _dot(w, xv.T, acc, INTERPRET) if SWAP else _dot(xv, w.T, acc, INTERPRET)
    if SWAP:
        gate, up = tl.split(tl.permute(tl.reshape(acc, (2, BN, BM)), (1, 2, 0)))
        out = cast(activate(gate, up, ACTIVATION, INTERPRET), h.dtype.element_ty, INTERPRET).T
    else:
        gate, up = tl.split(tl.permute(tl.reshape(acc, (BM, 2, BN)), (0, 2, 1)))
        out = cast(activate(gate, up, ACTIVATION, INTERPRET), h.dtype.element_ty, INTERPRET)
    at = h + (row0 + m).to(tl.int64)[:, None] * LD_H + n[None, :]
    tl.store(at, out, mask=live[:, None] & (n < LD_H)[None, :])


@triton.jit
def _rows_up_tiles(
    x, weights, h, pairs, slot, m0, n0, row0, count, slot_bytes, top_k,
    D: tl.constexpr, F: tl.constexpr, LD_X: tl.constexpr, LD_H: tl.constexpr, ACTIVATION: tl.constexpr,
    TMA: tl.constexpr, SWAP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """At a half or a quarter of the height where that is enough for what is left of the expert."""
    if BM < SPLIT:
        _rows_up_tile(
            x, weights, h, pairs, slot, m0, n0, row0, count, slot_bytes, top_k, D, F, LD_X, LD_H,
            ACTIVATION, TMA, SWAP, BM, BN, BK, INTERPRET,
        )  # fmt: skip
    elif count - m0 <= BM // 2:
        _rows_up_tiles(
            x, weights, h, pairs, slot, m0, n0, row0, count, slot_bytes, top_k, D, F, LD_X, LD_H,
            ACTIVATION, TMA, SWAP, BM // 2, BN, BK, INTERPRET,
        )  # fmt: skip
    else:
        _rows_up_tile(
            x, weights, h, pairs, slot, m0, n0, row0, count, slot_bytes, top_k, D, F, LD_X, LD_H,
            ACTIVATION, TMA, SWAP, BM, BN, BK, INTERPRET,
        )  # fmt: skip


@triton.jit
def rows_up(
    x, weights, h, records, pairs, n_records, slot_bytes, top_k,
    D: tl.constexpr, F: tl.constexpr, LD_X: tl.constexpr, LD_H: tl.constexpr, ACTIVATION: tl.constexpr,
    TMA: tl.constexpr, SWAP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """x [T, LD_X] -> h [P, LD_H], pairs sorted by expert. weights: descriptor [slots, 2, F, D], or the
    arena.
    """
    N_TILES: tl.constexpr = (LD_H + BN - 1) // BN
    t = tl.program_id(0)
    end = tl.load(n_records) * N_TILES
    while t < end:
        slot, m_tile, n_tile, row0, count = _place(records, t, N_TILES)
        m0, n0 = m_tile * BM, n_tile * BN
        _rows_up_tiles(
            x, weights, h, pairs, slot, m0, n0, row0, count, slot_bytes, top_k, D, F, LD_X, LD_H,
            ACTIVATION, TMA, SWAP, BM, BN, BK, INTERPRET,
        )  # fmt: skip
        t += tl.num_programs(0)


@triton.jit
def _rows_down_tile(
    h, h_box, weights, products, pairs, slot, m0, n0, row0, count, slot_bytes,
    D: tl.constexpr, F: tl.constexpr, LD_H: tl.constexpr, TMA: tl.constexpr, BOX: tl.constexpr,
    SWAP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """One tile [BM, BN] of products. BOX: h comes through its descriptor."""
    m = m0 + tl.arange(0, BM)
    n = n0 + tl.arange(0, BN)
    k = tl.arange(0, BK)
    if not BOX:
        h_at = h + (row0 + tl.minimum(m, count - 1)).to(tl.int64)[:, None] * LD_H + k[None, :]
    if not TMA:
        w_at = (weights + slot * slot_bytes).to(tl.pointer_type(h.dtype.element_ty)) + 2 * F * D
        w_at += n[:, None] * F + k[None, :]
    acc = tl.zeros((BN, BM) if SWAP else (BM, BN), tl.float32)
    for kb in tl.range(0, F, BK):
        if BOX:
            hv = h_box.load([row0 + m0, kb])
        elif LD_H % BK == 0:
            hv = tl.load(h_at + kb)
        else:
            hv = tl.load(h_at + kb, mask=(kb + k < LD_H)[None, :], other=0.0)
        if TMA:
            w = tl.reshape(weights.load([slot.to(tl.int32), n0, kb]), (BN, BK))
        elif F % BK == 0 and D % BN == 0:
            w = tl.load(w_at + kb)
        else:
            w = tl.load(w_at + kb, mask=(n < D)[:, None] & (kb + k < F)[None, :], other=0.0)
        acc = _dot(w, hv.T, acc, INTERPRET) if SWAP else _dot(hv, w.T, acc, INTERPRET)
    live = m < count
    row = tl.load(pairs + row0 + m, mask=live, other=0).to(tl.int64)
    out = cast(acc.T if SWAP else acc, products.dtype.element_ty, INTERPRET)
    tl.store(products + row[:, None] * D + n[None, :], out, mask=live[:, None] & (n < D)[None, :])


@triton.jit
def _rows_down_tiles(
    h, h_box, weights, products, pairs, slot, m0, n0, row0, count, slot_bytes,
    D: tl.constexpr, F: tl.constexpr, LD_H: tl.constexpr, TMA: tl.constexpr, BOX: tl.constexpr,
    SWAP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """At a half or a quarter of the height where that is enough for what is left of the expert."""
    if BM < SPLIT:
        _rows_down_tile(
            h, h_box, weights, products, pairs, slot, m0, n0, row0, count, slot_bytes, D, F, LD_H, TMA,
            BOX, SWAP, BM, BN, BK, INTERPRET,
        )  # fmt: skip
    elif count - m0 <= BM // 2:
        _rows_down_tiles(
            h, h_box, weights, products, pairs, slot, m0, n0, row0, count, slot_bytes, D, F, LD_H, TMA,
            False, SWAP, BM // 2, BN, BK, INTERPRET,
        )  # fmt: skip
    else:
        _rows_down_tile(
            h, h_box, weights, products, pairs, slot, m0, n0, row0, count, slot_bytes, D, F, LD_H, TMA,
            BOX, SWAP, BM, BN, BK, INTERPRET,
        )  # fmt: skip


@triton.jit
def rows_down(
    h, h_box, weights, products, records, pairs, n_records, slot_bytes,
    D: tl.constexpr, F: tl.constexpr, LD_H: tl.constexpr,
    TMA: tl.constexpr, SWAP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """h [P, LD_H] -> products [P, D], row token * K + k. weights: descriptor [slots, D, F], or the arena.

    h_box: with TMA a descriptor of h for BM rows.
    """
    N_TILES: tl.constexpr = (D + BN - 1) // BN
    t = tl.program_id(0)
    end = tl.load(n_records) * N_TILES
    while t < end:
        slot, m_tile, n_tile, row0, count = _place(records, t, N_TILES)
        m0, n0 = m_tile * BM, n_tile * BN
        _rows_down_tiles(
            h, h_box, weights, products, pairs, slot, m0, n0, row0, count, slot_bytes, D, F, LD_H, TMA,
            TMA, SWAP, BM, BN, BK, INTERPRET,
        )  # fmt: skip
        t += tl.num_programs(0)


@triton.jit
def _tiles_at(
    matrix, first, K: tl.constexpr, N: tl.constexpr, S: tl.constexpr, STEP: tl.constexpr, FORMAT: tl.constexpr
):  # fmt: skip
    """Pointers to N / 16 packed tiles, every STEP-th from tile `first` on, and their first S blocks of 64
    columns: codes as dwords [N / 16, S, 16 L], scales [N, 2 S].

    A dword of scales is of two rows (copies to shared memory are of 4 bytes or more). Rows are in the order
    of `_tiles`.
    """
    L: tl.constexpr = 8 if FORMAT == "int4" else 16
    SUPER: tl.constexpr = 16 * (L + 1)  # dwords of a superblock; the first 16 are its scales
    TILE: tl.constexpr = (K + 63) // 64 * SUPER
    words = matrix.to(tl.pointer_type(tl.int32))
    at = ((first + tl.arange(0, N // 16) * STEP) * TILE)[:, None] + (tl.arange(0, S) * SUPER)[None, :]
    codes = words + at[:, :, None] + (16 + tl.arange(0, 16 * L))[None, None, :]
    r, group = tl.arange(0, N), tl.arange(0, 2 * S)
    row = (first + (r // 32 * 2 + r // 8 % 2) * STEP) * TILE + (r // 16 % 2 * 8 + r % 8) // 2
    return codes, words + row[:, None] + (group // 2 * SUPER + group % 2 * 8)[None, :]


@triton.jit
def _tiles(
    codes_at, scales_at, b, left, ALL: tl.constexpr, N: tl.constexpr, S: tl.constexpr, FORMAT: tl.constexpr,
    PENDING: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Blocks b to b + S of the tiles that the pointers name -> bf16 [N, 64 S], columns moved
    (triton_dequant.py).

    8 rows of the first tile, 8 of the second, 8 of the first, 8 of the second, then the next two tiles: of
    gate and up a thread of the product then has both. left: how many of the tiles exist, unless ALL do.
    """
    L: tl.constexpr = 8 if FORMAT == "int4" else 16
    SUPER: tl.constexpr = 16 * (L + 1)
    r = tl.arange(0, N)
    if ALL:
        words = tl.load(codes_at + b * SUPER)
        two = tl.load(scales_at + b * SUPER)
    else:
        words = tl.load(codes_at + b * SUPER, mask=(tl.arange(0, N // 16) < left)[:, None, None], other=0)
        two = tl.load(scales_at + b * SUPER, mask=(r // 32 * 2 + r // 8 % 2 < left)[:, None], other=0)
    # [2 tiles, S, L / 8, 2, 4 lines, 16 rows as 2, 8] to rows [2, 2 tiles, 8], columns [S, L / 8, 4, 2]
    words = tl.reshape(words, (N // 32, 2, S, L // 8, 2, 4, 2, 8))
    words = tl.reshape(tl.permute(words, (0, 6, 1, 7, 2, 3, 5, 4)), (N, S * L))
    scale = (two >> (r % 2 * 16)[:, None]).to(tl.int16).to(tl.float16, bitcast=True)
    scale = _spread(cast(scale, tl.bfloat16, INTERPRET), N, S, L)
    return decode(words, scale, N, S, FORMAT, PENDING, INTERPRET)


@triton.jit
def _spread(scale, N: tl.constexpr, S: tl.constexpr, L: tl.constexpr):
    """Scales of groups of 32 columns [N, 2 S] to those of the dwords [N, S L] in the order of decode."""
    if L == 8:
        scale = tl.broadcast_to(tl.reshape(scale, (N, S, 2))[:, :, None, :], (N, S, 4, 2))
    else:
        scale = tl.broadcast_to(scale[:, :, None], (N, 2 * S, 8))
    return tl.reshape(scale, (N, S * L))


@triton.jit
def _rows_at(
    matrix, scales, n, K: tl.constexpr, S: tl.constexpr, FORMAT: tl.constexpr
):  # fmt: skip
    """Pointers to row-major codes: rows n [N] and the first S blocks of 64 columns as dwords [N, S L], and to
    the scales: fp8 fp32 [N, S], of mxfp4 only the beginning [N, 1].
    """
    L: tl.constexpr = 8 if FORMAT == "mxfp4" else 16
    codes = matrix.to(tl.pointer_type(tl.int32)) + (n * (K * L // 64))[:, None] + tl.arange(0, S * L)[None, :]
    words = scales.to(tl.pointer_type(tl.int32))
    if FORMAT == "fp8":
        ROW: tl.constexpr = (K + 127) // 128
        return codes, words + (n // 128 * ROW)[:, None] + (tl.arange(0, S) // 2)[None, :]
    else:
        return codes, words + (n * 0)[:, None]


@triton.jit
def _rows(
    codes_at, scales_at, b, n, N: tl.constexpr, K: tl.constexpr, BN: tl.constexpr, S: tl.constexpr,
    FORMAT: tl.constexpr, PENDING: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Blocks b to b + S of rows n [BN] of a matrix [N, K] -> bf16 [BN, 64 S], columns moved."""
    L: tl.constexpr = 8 if FORMAT == "mxfp4" else 16
    if N % BN == 0 and K % (64 * S) == 0:
        words = tl.load(codes_at + b * L)
    else:
        column = b * L + tl.arange(0, S * L)
        inside = (n < N)[:, None] & (column < K * L // 64)[None, :]
        words = tl.load(codes_at + b * L, mask=inside, other=0)
    words = tl.permute(tl.reshape(words, (BN, S, L // 8, 2, 4)), (0, 1, 2, 4, 3))
    words = tl.reshape(words, (BN, S * L))
    if FORMAT == "fp8":  # (behind a row's last column `words` are 0)
        block = b + tl.arange(0, S)
        scale = tl.load(scales_at + b // 2, mask=(n < N)[:, None] & (block * 64 < K)[None, :], other=0)
        scale = cast(scale.to(tl.float32, bitcast=True), tl.bfloat16, INTERPRET)
        scale = tl.reshape(tl.broadcast_to(scale[:, :, None], (BN, S, L)), (BN, S * L))
    else:
        group = 2 * b + tl.arange(0, 2 * S)
        at = (n * (K // 32))[:, None] + group[None, :]
        four = tl.load(scales_at + at // 4, mask=(n < N)[:, None] & (group * 32 < K)[None, :], other=0)
        power = (four >> (at % 4 * 8)) & 255
        scale = tl.where(power == 0, 0x0040, power << 7).to(tl.int16).to(tl.bfloat16, bitcast=True)
        scale = _spread(scale, BN, S, L)
    return decode(words, scale, BN, S, FORMAT, PENDING, INTERPRET)


@triton.jit
def _packed_up_tile(
    x, arena, h, pairs, slot, m0, n0, row0, count, slot_bytes, top_k,
    UP: tl.constexpr, GATE_SCALES: tl.constexpr, UP_SCALES: tl.constexpr,
    D: tl.constexpr, F: tl.constexpr, LD_X: tl.constexpr, LD_H: tl.constexpr, ACTIVATION: tl.constexpr,
    FORMAT: tl.constexpr, WHOLE: tl.constexpr, ASYNC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """One tile [BM, BN] of h. WHOLE: gate and up in one product, else each in its own."""
    TILED: tl.constexpr = FORMAT == "int4" or FORMAT == "int8"
    CODES: tl.constexpr = 8 if FORMAT == "int4" or FORMAT == "mxfp4" else 4
    L: tl.constexpr = 64 // CODES
    S: tl.constexpr = BK // 64
    m = m0 + tl.arange(0, BM)
    live = m < count
    token = tl.load(pairs + row0 + m, mask=live, other=0) // top_k
    x_at = x + token.to(tl.int64)[:, None] * LD_X + tl.arange(0, BK)[None, :]
    expert = arena + slot * slot_bytes
    rows = n0 + tl.arange(0, BN)
    if TILED:
        TILES: tl.constexpr = (F + 63) // 64 * 8  # of gate and up
        ALL: tl.constexpr = TILES * 8 % BN == 0
        first = n0 // 8
        if WHOLE:
            left = TILES - first
            gate_at, gate_scales = _tiles_at(expert, first, D, 2 * BN, S, 1, FORMAT)
        else:
            left = (TILES - first) // 2
            gate_at, gate_scales = _tiles_at(expert, first, D, BN, S, 2, FORMAT)
            up_at, up_scales = _tiles_at(expert, first + 1, D, BN, S, 2, FORMAT)
    else:
        if WHOLE:
            r = tl.arange(0, 2 * BN)
            rows = n0 + r // 16 * 8 + r % 8
        else:
            up_at, up_scales = _rows_at(expert + UP, expert + UP_SCALES, rows, D, S, FORMAT)
        gate_at, gate_scales = _rows_at(expert, expert + GATE_SCALES, rows, D, S, FORMAT)
        if WHOLE:
            second = (r // 8 % 2)[:, None]
            gate_at += second * (UP // 4)
            gate_scales += second * ((UP_SCALES - GATE_SCALES) // 4)
    TURNS: tl.constexpr = 2 if WHOLE == 1 and LD_X % (2 * BK) == 0 else 1
    PENDING: tl.constexpr = (TURNS - 1 if WHOLE else min(BK // 16, 7)) if ASYNC else -1
    if WHOLE:
        acc = tl.zeros((2 * BN, BM), tl.float32)
        for first_b in tl.range(0, LD_X // 64, TURNS * S):
            for turn in tl.static_range(TURNS):
                b = first_b + turn * S
                xv = tl.load(x_at + b * 64).T
                if TILED:
                    w = _tiles(gate_at, gate_scales, b, left, ALL, 2 * BN, S, FORMAT, PENDING, INTERPRET)
                else:
                    w = _rows(gate_at, gate_scales, b, rows, F, D, 2 * BN, S, FORMAT, PENDING, INTERPRET)
                acc = _dot(w, xv, acc, INTERPRET)
        gate, up = tl.split(tl.permute(tl.reshape(acc, (BN // 8, 2, 8, BM)), (0, 2, 3, 1)))
        out = cast(activate(gate, up, ACTIVATION, INTERPRET), h.dtype.element_ty, INTERPRET)
        out = tl.reshape(out, (BN, BM)).T
    else:
        gate = tl.zeros((BN, BM), tl.float32)
        up = tl.zeros((BN, BM), tl.float32)
        for b in tl.range(0, LD_X // 64, S):
            xv = tl.load(x_at + b * 64).T
            if TILED:
                w = _tiles(gate_at, gate_scales, b, left, ALL, BN, S, FORMAT, PENDING, INTERPRET)
            else:
                w = _rows(gate_at, gate_scales, b, rows, F, D, BN, S, FORMAT, PENDING, INTERPRET)
            gate = _dot(w, xv, gate, INTERPRET)
            if TILED:
                w = _tiles(up_at, up_scales, b, left, ALL, BN, S, FORMAT, PENDING, INTERPRET)
            else:
                w = _rows(up_at, up_scales, b, rows, F, D, BN, S, FORMAT, PENDING, INTERPRET)
            up = _dot(w, xv, up, INTERPRET)
        out = cast(activate(gate, up, ACTIVATION, INTERPRET), h.dtype.element_ty, INTERPRET)
        if TILED:
            out = tl.permute(tl.reshape(out, (BN // 32, 2, 2, 8, BM)), (0, 2, 1, 3, 4))
        out = tl.reshape(out, (BN, BM)).T
    n = tl.arange(0, BN)
    if BN % 64 == 0:  # what is stored together is moved together first
        out = tl.reshape(out, (BM, BN // 64, L // 8, 2, 4, CODES))
        out = tl.reshape(tl.permute(out, (0, 1, 5, 2, 4, 3)), (BM, BN))
        column = n0 + n
    else:
        line = (n0 + n) % 64 // CODES
        column = n0 // 64 * 64 + n % CODES * L + line // 8 * 8 + line % 4 * 2 + line // 4 % 2
    at = h + (row0 + m).to(tl.int64)[:, None] * LD_H + column[None, :]
    tl.store(at, out, mask=live[:, None] & (column < LD_H)[None, :])


@triton.jit
def _packed_up_tiles(
    x, arena, h, pairs, slot, m0, n0, row0, count, slot_bytes, top_k,
    UP: tl.constexpr, GATE_SCALES: tl.constexpr, UP_SCALES: tl.constexpr,
    D: tl.constexpr, F: tl.constexpr, LD_X: tl.constexpr, LD_H: tl.constexpr, ACTIVATION: tl.constexpr,
    FORMAT: tl.constexpr, WHOLE: tl.constexpr, ASYNC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """At a half or a quarter of the height where that is enough for what is left of the expert."""
    if BM < SPLIT:
        _packed_up_tile(
            x, arena, h, pairs, slot, m0, n0, row0, count, slot_bytes, top_k, UP, GATE_SCALES, UP_SCALES,
            D, F, LD_X, LD_H, ACTIVATION, FORMAT, WHOLE, ASYNC, BM, BN, BK, INTERPRET,
        )  # fmt: skip
    elif count - m0 <= BM // 2:
        _packed_up_tiles(
            x, arena, h, pairs, slot, m0, n0, row0, count, slot_bytes, top_k, UP, GATE_SCALES, UP_SCALES,
            D, F, LD_X, LD_H, ACTIVATION, FORMAT, WHOLE, ASYNC, BM // 2, BN, BK, INTERPRET,
        )  # fmt: skip
    else:
        _packed_up_tile(
            x, arena, h, pairs, slot, m0, n0, row0, count, slot_bytes, top_k, UP, GATE_SCALES, UP_SCALES,
            D, F, LD_X, LD_H, ACTIVATION, FORMAT, WHOLE, ASYNC, BM, BN, BK, INTERPRET,
        )  # fmt: skip


@triton.jit
def packed_up(
    x, arena, h, records, pairs, n_records, slot_bytes, top_k,
    UP: tl.constexpr, GATE_SCALES: tl.constexpr, UP_SCALES: tl.constexpr,
    D: tl.constexpr, F: tl.constexpr, LD_X: tl.constexpr, LD_H: tl.constexpr, ACTIVATION: tl.constexpr,
    FORMAT: tl.constexpr, WHOLE: tl.constexpr, ASYNC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """x [T, LD_X] -> h [P, LD_H], pairs sorted by expert, the columns of both moved. UP, *_SCALES: bytes into
    a slot.
    """
    N_TILES: tl.constexpr = (LD_H + BN - 1) // BN
    t = tl.program_id(0)
    end = tl.load(n_records) * N_TILES
    while t < end:
        slot, m_tile, n_tile, row0, count = _place(records, t, N_TILES)
        m0, n0 = m_tile * BM, n_tile * BN
        _packed_up_tiles(
            x, arena, h, pairs, slot, m0, n0, row0, count, slot_bytes, top_k, UP, GATE_SCALES, UP_SCALES,
            D, F, LD_X, LD_H, ACTIVATION, FORMAT, WHOLE, ASYNC, BM, BN, BK, INTERPRET,
        )  # fmt: skip
        t += tl.num_programs(0)


@triton.jit
def _packed_down_tile(
    h, arena, products, pairs, slot, m0, n0, row0, count, slot_bytes,
    DOWN: tl.constexpr, DOWN_SCALES: tl.constexpr, D: tl.constexpr, F: tl.constexpr, LD_H: tl.constexpr,
    FORMAT: tl.constexpr, WHOLE: tl.constexpr, ASYNC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """One tile [BM, BN] of products: WHOLE, or as two halves, each a product of its own.

    Of 256 rows as one the compiler exchanges scales through shared memory.
    """
    TILED: tl.constexpr = FORMAT == "int4" or FORMAT == "int8"
    S: tl.constexpr = BK // 64
    PART: tl.constexpr = BN if WHOLE else BN // 2
    m = m0 + tl.arange(0, BM)
    n = n0 + tl.arange(0, PART)
    h_at = h + (row0 + tl.minimum(m, count - 1)).to(tl.int64)[:, None] * LD_H + tl.arange(0, BK)[None, :]
    expert = arena + slot * slot_bytes
    if TILED:
        TILES: tl.constexpr = (D + 15) // 16
        ALL: tl.constexpr = TILES * 16 % BN == 0
        first = n0 // 16
        at0, scales0 = _tiles_at(expert + DOWN, first, F, PART, S, 1, FORMAT)
        if not WHOLE:
            at1, scales1 = _tiles_at(expert + DOWN, first + PART // 16, F, PART, S, 1, FORMAT)
        r = tl.arange(0, PART)
        n = n0 + r // 32 * 32 + r // 8 % 2 * 16 + r // 16 % 2 * 8 + r % 8
    else:
        at0, scales0 = _rows_at(expert + DOWN, expert + DOWN_SCALES, n, F, S, FORMAT)
        if not WHOLE:
            at1, scales1 = _rows_at(expert + DOWN, expert + DOWN_SCALES, n + PART, F, S, FORMAT)
    TURNS: tl.constexpr = 2 if WHOLE == 1 and LD_H % (2 * BK) == 0 else 1
    PENDING: tl.constexpr = (TURNS - 1 if WHOLE else min(BK // 16, 7)) if ASYNC else -1
    acc0 = tl.zeros((PART, BM), tl.float32)
    if not WHOLE:
        acc1 = tl.zeros((PART, BM), tl.float32)
    for first_b in tl.range(0, LD_H // 64, TURNS * S):
        for turn in tl.static_range(TURNS):
            b = first_b + turn * S
            hv = tl.load(h_at + b * 64).T
            if TILED:
                w = _tiles(at0, scales0, b, TILES - first, ALL, PART, S, FORMAT, PENDING, INTERPRET)
            else:
                w = _rows(at0, scales0, b, n, D, F, PART, S, FORMAT, PENDING, INTERPRET)
            acc0 = _dot(w, hv, acc0, INTERPRET)
            if not WHOLE:
                if TILED:
                    left = TILES - first - PART // 16
                    w = _tiles(at1, scales1, b, left, ALL, PART, S, FORMAT, PENDING, INTERPRET)
                else:
                    w = _rows(at1, scales1, b, n + PART, D, F, PART, S, FORMAT, PENDING, INTERPRET)
                acc1 = _dot(w, hv, acc1, INTERPRET)
    live = m < count
    row = tl.load(pairs + row0 + m, mask=live, other=0).to(tl.int64)
    at = products + row[:, None] * D + n[None, :]
    out = cast(acc0, products.dtype.element_ty, INTERPRET).T
    tl.store(at, out, mask=live[:, None] & (n < D)[None, :])
    if not WHOLE:
        out = cast(acc1, products.dtype.element_ty, INTERPRET).T
        tl.store(at + PART, out, mask=live[:, None] & (n + PART < D)[None, :])


@triton.jit
def _packed_down_tiles(
    h, arena, products, pairs, slot, m0, n0, row0, count, slot_bytes,
    DOWN: tl.constexpr, DOWN_SCALES: tl.constexpr, D: tl.constexpr, F: tl.constexpr, LD_H: tl.constexpr,
    FORMAT: tl.constexpr, WHOLE: tl.constexpr, ASYNC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """At a half or a quarter of the height where that is enough for what is left of the expert."""
    if BM < SPLIT:
        _packed_down_tile(
            h, arena, products, pairs, slot, m0, n0, row0, count, slot_bytes, DOWN, DOWN_SCALES, D, F,
            LD_H, FORMAT, WHOLE, ASYNC, BM, BN, BK, INTERPRET,
        )  # fmt: skip
    elif count - m0 <= BM // 2:
        _packed_down_tiles(
            h, arena, products, pairs, slot, m0, n0, row0, count, slot_bytes, DOWN, DOWN_SCALES, D, F,
            LD_H, FORMAT, WHOLE, ASYNC, BM // 2, BN, BK, INTERPRET,
        )  # fmt: skip
    else:
        _packed_down_tile(
            h, arena, products, pairs, slot, m0, n0, row0, count, slot_bytes, DOWN, DOWN_SCALES, D, F,
            LD_H, FORMAT, WHOLE, ASYNC, BM, BN, BK, INTERPRET,
        )  # fmt: skip


@triton.jit
def packed_down(
    h, arena, products, records, pairs, n_records, slot_bytes,
    DOWN: tl.constexpr, DOWN_SCALES: tl.constexpr, D: tl.constexpr, F: tl.constexpr, LD_H: tl.constexpr,
    FORMAT: tl.constexpr, WHOLE: tl.constexpr, ASYNC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """h [P, LD_H], columns moved -> products [P, D], row token * K + k. DOWN, DOWN_SCALES: bytes into a
    slot.
    """
    N_TILES: tl.constexpr = (D + BN - 1) // BN
    t = tl.program_id(0)
    end = tl.load(n_records) * N_TILES
    while t < end:
        slot, m_tile, n_tile, row0, count = _place(records, t, N_TILES)
        m0, n0 = m_tile * BM, n_tile * BN
        _packed_down_tiles(
            h, arena, products, pairs, slot, m0, n0, row0, count, slot_bytes, DOWN, DOWN_SCALES, D, F,
            LD_H, FORMAT, WHOLE, ASYNC, BM, BN, BK, INTERPRET,
        )  # fmt: skip
        t += tl.num_programs(0)
