"""What surrounds the grouped products of a prefill, all of it on the device: schedule, activations, the last
sum, rounding.

The schedule sorts the pairs (token, k) by expert, keeping their order within one, and cuts each expert's
pairs into tiles. An expert's record is written once for each of its tiles, so that tile t of a product with N
column tiles finds its expert at record t // N:

    record int32 [8]   slot, the expert's first record, its number of records, its first sorted pair, its
    number of pairs

Axis letters: T tokens, D hidden, E experts, K experts a token, P pairs (T * K).
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, no-any-return"
import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton_dequant import cast

RECORD = 8  # int32s


@triton.jit
def _record(records, expert_records, first, slot, row0, count):
    """An expert's record, `expert_records` times from record `first` on."""
    field = tl.arange(0, 8)
    record = tl.where(field == 0, slot, tl.where(field == 1, first, expert_records))
    record = tl.where(field == 3, row0, tl.where(field == 4, count, record))
    i = 0
    while i < expert_records:  # (the interpreter's `range` takes no bounds from the device)
        tl.store(records + (first + i) * 8 + field, record)
        i += 1


@triton.jit
def _convert(
    h, x, token, D: tl.constexpr, LD_X: tl.constexpr, CODES: tl.constexpr, BLOCK: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """Row `token` of h [T, D] to x [T, LD_X]. CODES: columns are moved (triton_dequant.py), 0: they are
    not.
    """
    token = token.to(tl.int64)
    for first in tl.range(0, LD_X, BLOCK):
        column = first + tl.arange(0, BLOCK)
        source = column
        if CODES:
            L: tl.constexpr = 64 // CODES
            k = column % L
            line = k // 8 * 8 + k % 2 * 4 + k % 8 // 2
            source = column // 64 * 64 + line * CODES + column % 64 // L
        value = tl.load(h + token * D + source, mask=source < D, other=0.0)
        value = cast(value, x.dtype.element_ty, INTERPRET)
        tl.store(x + token * LD_X + column, value, mask=column < LD_X)


@triton.jit
def _expert_of(ids, pair, n_pairs, E: tl.constexpr):
    """The pairs' experts; E for what is nobody's."""
    expert = tl.load(ids + pair, mask=pair < n_pairs, other=E)
    return tl.where((expert < 0) | (expert > E), E, expert)


@triton.jit
def prepare_few(
    ids, table, pairs, records, n_records, h, x, n_pairs,
    E: tl.constexpr, BINS: tl.constexpr, BM: tl.constexpr, CHUNK: tl.constexpr,
    D: tl.constexpr, LD_X: tl.constexpr, CODES: tl.constexpr, BLOCK: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Up to CHUNK pairs. Programs 0 to E - 1: an expert's pairs and records each; the T behind them
    convert.
    """
    program = tl.program_id(0)
    if program < E:
        bins = tl.arange(0, BINS)
        pair = tl.arange(0, CHUNK)
        expert = _expert_of(ids, pair, n_pairs, E)
        counts = tl.histogram(expert, BINS)
        slots = tl.load(table + bins, mask=bins < E, other=-1)
        tiles = tl.where(slots >= 0, (counts + BM - 1) // BM, 0)
        row0 = tl.sum(tl.where(bins < program, counts, 0))
        first = tl.sum(tl.where(bins < program, tiles, 0))
        mine = tl.sum(tl.where(bins == program, tiles, 0))
        count = tl.sum(tl.where(bins == program, counts, 0))
        if program == E - 1:
            tl.store(n_records, first + mine)
        _record(records, mine, first, tl.load(table + program), row0, count)
        rank = tl.cumsum((expert == program).to(tl.int32), 0)
        tl.store(pairs + row0 + rank - 1, pair, mask=expert == program)
    else:
        _convert(h, x, program - E, D, LD_X, CODES, BLOCK, INTERPRET)


@triton.jit
def count_pairs(
    ids, counts, h, x, n_pairs, chunks,
    E: tl.constexpr, BINS: tl.constexpr, CHUNK: tl.constexpr,
    D: tl.constexpr, LD_X: tl.constexpr, CODES: tl.constexpr, BLOCK: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Of many pairs, first. counts int32 [chunks, BINS]: each chunk's pairs of each expert; the programs
    behind convert.
    """
    program = tl.program_id(0)
    if program < chunks:
        expert = _expert_of(ids, program * CHUNK + tl.arange(0, CHUNK), n_pairs, E)
        tl.store(counts + program * BINS + tl.arange(0, BINS), tl.histogram(expert, BINS))
    else:
        _convert(h, x, program - chunks, D, LD_X, CODES, BLOCK, INTERPRET)


@triton.jit
def place_pairs(
    ids, table, counts, pairs, records, n_records, n_pairs, chunks,
    E: tl.constexpr, BINS: tl.constexpr, BM: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr,
    PART: tl.constexpr,
):  # fmt: skip
    """Of many pairs, second: a chunk's pairs to their places, and all records by the first program."""
    program = tl.program_id(0)
    bins = tl.arange(0, BINS)
    total = tl.zeros((BINS,), tl.int32)
    before = tl.zeros((BINS,), tl.int32)
    first = 0
    while first < chunks:
        chunk = first + tl.arange(0, ROWS)
        some = counts + chunk[:, None] * BINS + bins[None, :]
        part = tl.load(some, mask=(chunk < chunks)[:, None], other=0)
        total += tl.sum(part, 0)
        before += tl.sum(tl.where((chunk < program)[:, None], part, 0), 0)
        first += ROWS
    row0 = tl.cumsum(total, 0) - total
    slots = tl.load(table + bins, mask=bins < E, other=-1)
    tiles = tl.where(slots >= 0, (total + BM - 1) // BM, 0)
    record0 = tl.cumsum(tiles, 0) - tiles
    if program == 0:
        tl.store(n_records, tl.sum(tiles))
        most = tl.max(tiles)
        i = 0
        while i < most:  # the i-th record of every expert that has one
            record = records + (record0 + i) * 8
            tl.store(record, slots, mask=i < tiles)
            tl.store(record + 1, record0, mask=i < tiles)
            tl.store(record + 2, tiles, mask=i < tiles)
            tl.store(record + 3, row0, mask=i < tiles)
            tl.store(record + 4, total, mask=i < tiles)
            i += 1
    place = tl.arange(0, CHUNK)
    expert = _expert_of(ids, program * CHUNK + place, n_pairs, E)
    rank = tl.zeros((CHUNK,), tl.int32)
    for part in tl.static_range(0, CHUNK, PART):
        other = part + tl.arange(0, PART)
        theirs = _expert_of(ids, program * CHUNK + other, n_pairs, E)
        same = (expert[:, None] == theirs[None, :]) & (other[None, :] < place[:, None])
        rank += tl.sum(same.to(tl.int32), 1)
    target = tl.gather(row0 + before, expert, 0) + rank
    tl.store(pairs + target, program * CHUNK + place, mask=expert < E)


@triton.jit
def combine(
    products, ids, weights, x,
    E: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x [T, D] += the sum over k, in order, of weights[t, k] * products[t * K + k]. Pairs that are nobody's
    count nothing.
    """
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < D
    total = tl.zeros((BLOCK,), tl.float32)
    for k in range(K):
        expert = tl.load(ids + token * K + k)
        somebody = (expert >= 0) & (expert < E)
        row = products + (token * K + k) * D
        value = tl.load(row + column, mask=column < tl.where(somebody, D, 0), other=0.0).to(tl.float32)
        total += tl.where(somebody, tl.load(weights + token * K + k), 0.0) * value
    at = x + token * D + column
    tl.store(at, tl.load(at, mask=inside, other=0.0) + total, mask=inside)


def round_tokens(ids: Tensor, weights: Tensor, experts: int, multiple: int) -> tuple[Tensor, Tensor, Tensor]:
    """SonicMoE's token rounding (arXiv 2512.14080) on a choice already made: fewer tiles that are almost
    empty. Lossy.

    ids [T, K] int32, weights [T, K] fp32 -> ids with -1 for dropped pairs, weights, share of pairs dropped []
    fp32. Where an expert's number of pairs is above a multiple by at most half of it, the pairs with the
    lowest weights are dropped down to that multiple; where it is nearer the next one, all are kept (filling
    up would need the router's scores for tokens that it did not choose). No expert falls to 0, no token loses
    the expert that it weighs most, and what is left of a token's weights is scaled to their old sum. On the
    device, without synchronisation.
    """
    tokens, top_k = ids.shape
    flat = ids.flatten().long()
    first_choice = torch.zeros_like(weights).scatter_(1, weights.argmax(1, keepdim=True), 1.0)
    key = (weights.nan_to_num() + first_choice * 1e30).flatten()  # first choices rank before all others
    order = key.argsort(descending=True, stable=True)
    order = order[flat[order].argsort(stable=True)]  # by expert, then by falling weight
    count = flat.new_zeros(experts).scatter_add_(0, flat, torch.ones_like(flat))
    excess = count % multiple
    kept = torch.where((excess <= multiple // 2) & (count >= multiple), count - excess, count)
    begin = count.cumsum(0) - count
    rank = torch.empty_like(flat)
    rank[order] = torch.arange(len(flat), device=ids.device) - begin[flat[order]]
    dropped = (rank >= kept[flat]).view(tokens, top_k) & (first_choice == 0)
    left = weights.masked_fill(dropped, 0.0)
    left = left * (weights.sum(1, keepdim=True) / left.sum(1, keepdim=True))
    return ids.masked_fill(dropped, -1), left, dropped.float().mean()
