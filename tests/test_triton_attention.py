"""Attention of a few tokens, each of a sequence of its own, against float64; without a GPU in Triton's
interpreter. Whatever a row must not see is NaN.
"""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from kernels.triton_attention import attend_rows, attention_workspace

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDING = 5e-4  # of weights in fp16, relative to the result

SMALL = (4, 2, 16)
PAGE = 64


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).half()


class Rows:
    """Rows of queries, and sequences that are NaN beyond what their row may see."""

    def __init__(
        self, heads: tuple[int, int, int], positions: list[int], window: int | None = None, context: int = 0
    ) -> None:
        self.heads, self.window, count = heads, window, len(positions)
        context = -(-(context or max(positions) + 3) // PAGE) * PAGE
        self.q = random(1, count, heads[0], heads[2])
        self.keys, self.values = (random(i, count + 1, context, *heads[1:]) for i in (2, 3))
        self.sequences = torch.arange(count, 0, -1, dtype=torch.int32)  # row b: sequence count - b
        self.positions = torch.tensor(positions, dtype=torch.int32)
        self.keys[0] = self.values[0] = math.nan
        for sequence, seen in zip(self.sequences.tolist(), self.seen(), strict=True):
            self.keys[sequence, ~seen] = self.values[sequence, ~seen] = math.nan

    def seen(self) -> list[Tensor]:
        """Of each row: which keys, bool [context]."""
        place = torch.arange(self.keys.shape[1])
        window = len(place) if self.window is None else self.window
        return [(place <= p) & (place > p - window) for p in self.positions.tolist()]

    def paged(self) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values in pages of all sequences in any order, and which are each row's."""
        count, context, *heads = self.keys.shape
        of_sequence = torch.randperm(count * context // PAGE, generator=torch.Generator().manual_seed(4))
        of_sequence = of_sequence.view(count, -1).int()
        keys, values = (torch.empty(of_sequence.numel(), PAGE, *heads, dtype=torch.half) for _ in range(2))
        keys[of_sequence.long()] = self.keys.view(count, -1, PAGE, *heads)
        values[of_sequence.long()] = self.values.view(count, -1, PAGE, *heads)
        pages = of_sequence[self.sequences.long()]
        for row, position in enumerate(self.positions.tolist()):
            pages[row, position // PAGE + 1 :] = 1 << 30  # not to be looked at
        return keys, values, pages

    def attend(self, rows: list[int] | None = None, most_keys: int = 0) -> Tensor:
        """Of some rows, as one call."""
        rows = list(range(len(self.q))) if rows is None else rows
        keys, values, pages = self.paged()
        most_keys = most_keys or max(self.positions[rows].tolist()) + 1
        heads, _, d = self.heads
        floats = attention_workspace(len(rows), heads, d, most_keys)
        workspace = torch.full((floats,), math.nan, device=DEVICE)
        out = torch.full((len(rows), heads * d), math.nan, device=DEVICE)
        attend_rows(
            self.q[rows].to(DEVICE), keys.to(DEVICE), values.to(DEVICE), pages[rows].to(DEVICE),
            self.positions[rows].to(DEVICE), self.window, most_keys, workspace, out,
        )  # fmt: skip
        return out.cpu()

    def exact(self) -> Tensor:
        heads, kv_heads, d = self.heads
        results = []
        for q, sequence, seen in zip(self.q.double(), self.sequences.tolist(), self.seen(), strict=True):
            keys, values = (t[sequence, seen].double() for t in (self.keys, self.values))
            keys, values = (t.repeat_interleave(heads // kv_heads, 1) for t in (keys, values))
            weights = (torch.einsum("hd,bhd->hb", q, keys) / d**0.5).softmax(-1)
            results.append(torch.einsum("hb,bhd->hd", weights, values).flatten())
        return torch.stack(results)


def distance(a: Tensor, b: Tensor) -> float:
    """The largest |a - b| / |b| of a row."""
    return float(((a.double() - b).norm(dim=1) / b.norm(dim=1)).max())


@pytest.mark.parametrize(
    ("heads", "window"),
    [
        ((4, 4, 32), None), ((6, 2, 64), 40), ((8, 1, 80), None), ((16, 2, 96), 40), ((16, 1, 128), None),
        (SMALL, 1), (SMALL, 129), (SMALL, 300),
    ],
)  # fmt: skip
def test_each_row_sees_its_own_sequence_up_to_itself_within_the_window(
    heads: tuple[int, int, int], window: int | None
) -> None:
    rows = Rows(heads, [0, 127, 128, 300], window)
    assert distance(rows.attend(), rows.exact()) < ROUNDING


def test_a_long_row_is_joined_in_rounds() -> None:
    rows = Rows((2, 1, 16), [33 * 128 + 5, 32 * 128 - 1])
    rows.q *= 3  # some splits weigh far more than others
    assert distance(rows.attend(), rows.exact()) < ROUNDING


@pytest.mark.parametrize("window", [None, 150])
def test_no_bit_of_a_row_depends_on_the_rows_beside_it_or_on_the_bucket(window: int | None) -> None:
    rows = Rows((3, 1, 16), [310, 0, 127, 5, 128, 256, 77, 200], window)
    together = rows.attend()
    for row in range(8):
        assert torch.equal(rows.attend([row])[0], together[row])
    assert torch.equal(rows.attend(most_keys=1000), together)
    assert torch.equal(rows.attend([4, 0, 2])[1], together[0])


@pytest.mark.filterwarnings("ignore:All-NaN slice|invalid value:RuntimeWarning")  # the interpreter's
def test_what_is_no_number_in_a_query_reaches_the_result() -> None:
    rows = Rows(SMALL, [10, 140])
    rows.q[1, 2, 5] = math.nan
    found = rows.attend().view(2, 4, 16)
    assert found[1, 2].isnan().all() and not found[0].isnan().any() and not found[1, [0, 1, 3]].isnan().any()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("heads", "window"), [((32, 4, 128), None), ((16, 16, 128), 1000), ((40, 8, 64), None)]
)
def test_on_a_gpu_rows_of_real_size_are_no_less_exact_than_torchs_and_the_same_bits_in_any_company(
    heads: tuple[int, int, int], window: int | None
) -> None:
    rows = Rows(heads, [8190, 300, 4095, 0, 77, 6000, 128, 2500], window)
    together, exact = rows.attend(), rows.exact()
    theirs = []
    for q, sequence, seen in zip(rows.q, rows.sequences.tolist(), rows.seen(), strict=True):
        keys, values = (t[sequence, seen].transpose(0, 1)[None].cuda() for t in (rows.keys, rows.values))
        y = functional.scaled_dot_product_attention(q[None, :, None].cuda(), keys, values, enable_gqa=True)
        theirs.append(y.flatten().cpu())
    assert distance(together, exact) <= distance(torch.stack(theirs), exact)
    for row in range(8):
        assert torch.equal(rows.attend([row])[0], together[row])
    assert torch.equal(rows.attend(most_keys=1 << 16), together)
    assert torch.equal(rows.attend([6, 0, 3, 1]), together[[6, 0, 3, 1]])
