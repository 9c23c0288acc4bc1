"""Attention of a few tokens on a GPU, each the newest of its own sequence: flash-decoding in two kernels.

A row's keys are cut into splits at fixed places. The first kernel takes one split and one KV head of one row
a program, with all of that head's queries, so keys and values are read once; the second joins a row's splits.
A row's bits depend on its own keys alone: not on how many rows there are, nor on `most_keys`, which only says
how many programs are launched. Both kernels are compiled once for all rows, windows and lengths.

The ceiling: 4 B of keys and values a key, KV head and element of a head, over the GPU's bandwidth. 8,192 keys
of 4 heads of 128 are 16.8 MB: 5 us of an H100's 3.35 TB/s. For a few hundred keys two launches and one read
of memory are all of it (4 to 5 us, an estimate), so queries are padded to the 16 rows of tl.dot.

Axis letters: B rows, H query heads, G KV heads, d head size, P pages of keys and values, M of a sequence.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import math
from typing import Final

import triton
import triton.language as tl
from torch import Tensor

from kernels.triton_gemv import launch_options, wait_for_inputs

# All keys and values of a split are on their way to shared memory at once: 64 KiB of heads of 128.
SPLIT_KEYS: Final = 128
_STEP: Final = 64  # keys used at once
_UNSEEN: Final = -1e30  # a score that weighs nothing beside any other; every split has one that is seen
_JOINED: Final = 32  # splits at once: 1,024, which 131,072 keys have, are 32 rounds
_EVERY_KEY: Final = 2**31 - 1


@triton.jit
def _first_key(position, window):
    return tl.maximum(position - window + 1, 0)


@triton.jit(
    do_not_specialize=["most_pages", "splits", "window"],
    do_not_specialize_on_alignment=["pages", "positions"],
)
def _attend_splits(
    q, keys, values, pages, positions, parts, sums, most_pages, splits, window, PAGE: tl.constexpr,
    SCALE: tl.constexpr, H: tl.constexpr, G: tl.constexpr, d: tl.constexpr, BLOCK: tl.constexpr,
    QUERIES: tl.constexpr, SPLIT: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr,
    UNSEEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One split of the keys of one KV head of one row a program, counted from the first that the row sees."""
    wait_for_inputs(PDL)
    part, kv_head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    position = tl.load(positions + row)
    first = _first_key(position, window)
    begin = (first // SPLIT + part) * SPLIT
    if begin <= position:
        c, query = tl.arange(0, BLOCK), tl.arange(0, QUERIES)
        mine, inside = query < H // G, (c < d)[None, :]
        head = row * H + kv_head * (H // G) + query
        queries = tl.load(q + head[:, None] * d + c[None, :], mask=mine[:, None] & inside, other=0.0)
        top, total = tl.full((QUERIES,), UNSEEN, tl.float32), tl.zeros((QUERIES,), tl.float32)
        y = tl.zeros((QUERIES, BLOCK), tl.float32)
        for at in tl.range(begin, begin + SPLIT, STEP, num_stages=STAGES):
            key = at + tl.arange(0, STEP)
            seen = (key >= first) & (key <= position)  # what lies outside is not read
            page = tl.load(pages + row * most_pages + at // PAGE, mask=at <= position, other=0)
            place = (page.to(tl.int64) * PAGE + key % PAGE) * G + kv_head
            element = place[:, None] * d + c[None, :]
            k = tl.load(keys + element, mask=seen[:, None] & inside, other=0.0)
            scores = tl.dot(queries, tl.trans(k)) * SCALE  # [QUERIES, STEP]
            scores = tl.where(seen[None, :], scores, UNSEEN)
            raised = tl.maximum(top, tl.max(scores, 1))
            kept, p = tl.exp2(top - raised), tl.exp2(scores - raised[:, None])
            v = tl.load(values + element, mask=seen[:, None] & inside, other=0.0)
            total = total * kept + tl.sum(p, 1)
            y = tl.dot(p.to(v.dtype), v, y * kept[:, None])
            top = raised
        to = (row * splits + part) * H + kv_head * (H // G) + query
        tl.store(parts + to.to(tl.int64)[:, None] * d + c[None, :], y, mask=mine[:, None] & inside)
        tl.store(sums + 2 * to, total, mask=mine)
        tl.store(sums + 2 * to + 1, top, mask=mine)


@triton.jit(do_not_specialize=["splits", "window"], do_not_specialize_on_alignment=["positions"])
def _join_rows(
    parts, sums, positions, out, splits, window, H: tl.constexpr, d: tl.constexpr,
    BLOCK: tl.constexpr, JOINED: tl.constexpr, SPLIT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One head of one row a program: its splits in order, JOINED of them at a time."""
    wait_for_inputs(PDL)
    head, row = tl.program_id(0), tl.program_id(1)
    position = tl.load(positions + row)
    live = position // SPLIT - _first_key(position, window) // SPLIT + 1
    c = tl.arange(0, BLOCK)
    top, total, y = float("-inf"), 0.0, tl.zeros((BLOCK,), tl.float32)
    for begin in tl.range(0, live, JOINED):
        part = begin + tl.arange(0, JOINED)
        there = part < live
        at = (row * splits + part) * H + head
        sum = tl.load(sums + 2 * at, mask=there, other=0.0)
        tops = tl.load(sums + 2 * at + 1, mask=there, other=float("-inf"))
        of_parts = parts + at.to(tl.int64)[:, None] * d + c[None, :]
        values = tl.load(of_parts, mask=there[:, None] & (c < d)[None, :], other=0.0)
        raised = tl.maximum(top, tl.max(tops, 0))
        kept, weight = tl.exp2(top - raised), tl.exp2(tops - raised)
        total = total * kept + tl.sum(sum * weight, 0)
        y = y * kept + tl.sum(values * weight[:, None], 0)
        top = raised
    tl.store(out + (row * H + head) * d + c, y / total, mask=c < d)


def attention_workspace(rows: int, heads: int, head_dim: int, most_keys: int) -> int:
    """How many floats `attend_rows` needs, for any window."""
    return rows * -(-most_keys // SPLIT_KEYS) * heads * (head_dim + 2)


def attend_rows(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    pages: Tensor,
    positions: Tensor,
    window: int | None,
    most_keys: int,
    workspace: Tensor,
    out: Tensor,
) -> None:
    """out [B, H d] fp32 = softmax(q k^T / sqrt(d)) v of each row over what it sees.

    q [B, H, d], keys and values [P, page, G, d] fp16, contiguous; a page is of a multiple of 64 keys. Row b
    is the token at positions[b], int32 [B], of the sequence whose keys and values lie in pages[b], int32
    [B, M], one page after the other; it sees the keys up to its own, of which the last `window` (None: all).
    most_keys: no row's position is as large. workspace: fp32, at least `attention_workspace` of this or a
    larger most_keys.
    """
    rows, heads, d = q.shape
    _, page, kv_heads, _ = keys.shape
    splits = triton.cdiv(most_keys, SPLIT_KEYS)
    if window is not None:
        splits = min(splits, triton.cdiv(window - 1, SPLIT_KEYS) + 1)
    parts = rows * splits * heads * d  # floats; behind them each one's sum and largest score
    assert heads % kv_heads == 0 and d % 16 == 0 and keys.shape == values.shape
    assert all(t.is_contiguous() for t in (q, keys, values, pages, out)) and page % _STEP == 0
    assert out.shape == (rows, heads * d) and len(pages) == len(positions) == rows
    assert workspace.ndim == 1 and workspace.numel() >= parts + parts // d * 2
    where = workspace, workspace[parts:]
    seen = _EVERY_KEY if window is None else window
    block, options = triton.next_power_of_2(d), launch_options(q.device)
    _attend_splits[(splits, kv_heads, rows)](
        q, keys, values, pages, positions, *where, pages.shape[1], splits, seen, PAGE=page,
        SCALE=d**-0.5 * math.log2(math.e), H=heads, G=kv_heads, d=d, BLOCK=block,
        QUERIES=max(16, triton.next_power_of_2(heads // kv_heads)), SPLIT=SPLIT_KEYS,
        STEP=_STEP, STAGES=SPLIT_KEYS // _STEP + 1 if block <= 128 else 2, UNSEEN=_UNSEEN,
        num_warps=4 if block <= 128 else 8, **options,
    )  # fmt: skip
    _join_rows[(heads, rows)](
        *where, positions, out, splits, seen, H=heads, d=d, BLOCK=block, JOINED=_JOINED,
        SPLIT=SPLIT_KEYS, num_warps=4, **options,
    )  # fmt: skip

