"""Keys and values in pages: who has which, what is counted, and that no bit depends on where they lie.

Without a GPU on ordinary memory, and the decoder in Triton's interpreter.
"""

from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_gpu_decoder import RUN, Opened, _few_programs  # noqa: F401  (a fixture that holds here, too)
from test_kv_cache import GROUPS, HEAD, LAYERS, check_whatever_happens, config
from tiny_models import make_tiny_checkpoint
from torch import Tensor

from flashmoe.decoder import Stretch
from flashmoe.gpu_kv_cache import GpuKVCache, GpuPages
from flashmoe.kv_cache import BLOCK, KVPool

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # as in test_gpu_decoder

CPU = torch.device("cpu")
CONTEXT = 150  # three pages, the last one not whole


def open_pages(tokens: int = 3 * CONTEXT, sequences: int = 1) -> GpuPages:
    return GpuPages(config(), CONTEXT, tokens, sequences, CPU)


def sequences(pages: GpuPages, lengths: tuple[int, ...]) -> list[GpuKVCache]:
    found = [GpuKVCache(pages) for _ in lengths]
    for kv, length in zip(found, lengths, strict=True):
        kv.claim(length)
    return found


def flat(pages: GpuPages, layer: int) -> list[Tensor]:
    """Keys and values, [P x BLOCK, G, d] each."""
    return [tensor.view(-1, GROUPS, HEAD) for tensor in pages.tensors(layer)]


def expected(tokens: list[int], layer: int) -> tuple[Tensor, Tensor]:
    """Rows that tell token and place, in numbers that fp16 has."""
    ids, places = torch.tensor(tokens), torch.arange(len(tokens))
    return (100 * layer + ids).half()[:, None, None], (500 * layer + ids + places).half()[:, None, None]


def fill(kv: GpuKVCache, tokens: list[int]) -> None:
    """As a decoder would."""
    begin, whole = kv.length, kv.tokens + tokens
    rows = kv.rows(len(whole))[begin:]
    for layer in range(LAYERS):
        for tensor, value in zip(flat(kv._memory, layer), expected(whole, layer), strict=True):
            tensor[rows] = value[begin:].expand(-1, GROUPS, HEAD)
    kv.append(tokens)


def holds(kv: GpuKVCache, tokens: list[int]) -> bool:
    if kv.tokens != tokens:
        return False
    rows = kv.rows(len(tokens))
    return all(
        bool((tensor[rows] == value).all())
        for layer in range(LAYERS)
        for tensor, value in zip(flat(kv._memory, layer), expected(tokens, layer), strict=True)
    )


def check_owners(pages: GpuPages, owners: list[GpuKVCache]) -> None:
    """No page has two, or none and is not free either."""
    assert sorted([page for kv in owners for page in kv.pages] + pages._free) == list(pages._all)


def test_a_sequence_takes_a_page_when_its_tokens_reach_it() -> None:
    pages = open_pages()
    (kv,), all_of_them = sequences(pages, (1,)), pages.free + 1
    assert len(kv.pages) == 1
    kv.claim(BLOCK)
    assert len(kv.pages) == 1
    kv.claim(BLOCK + 1)
    kv.claim(CONTEXT)
    assert len(kv.pages) == pages.most_pages == 3 and pages.free == all_of_them - 3
    kv.claim(5)
    assert len(kv.pages) == 3, "claiming gives nothing back"


def test_a_page_goes_back_once_none_of_its_tokens_is_left() -> None:
    pages = open_pages()
    first, second = sequences(pages, (CONTEXT, CONTEXT))
    kept = first.pages[:2]
    first.give_back(BLOCK + 1)
    assert first.pages == kept
    first.give_back(BLOCK)
    assert first.pages == kept[:1]
    check_owners(pages, [first, second])
    second.claim(CONTEXT)
    first.give_back(0)
    assert not first.pages
    check_owners(pages, [second])


def test_rows_follow_the_pages_in_whatever_order_these_lie() -> None:
    pages = open_pages()
    first, second = sequences(pages, (BLOCK, BLOCK))
    first.claim(CONTEXT)
    assert first.pages != list(range(first.pages[0], first.pages[0] + 3))
    rows = first.rows(CONTEXT).tolist()
    assert rows == [first.pages[place // BLOCK] * BLOCK + place % BLOCK for place in range(CONTEXT)]
    for length in (0, 1, BLOCK, BLOCK + 1):
        assert first.rows(length).tolist() == rows[:length]
    fill(first, [1] * CONTEXT)
    fill(second, [2] * BLOCK)
    assert holds(first, [1] * CONTEXT) and holds(second, [2] * BLOCK)
    assert (pages.tensors(1)[0][second.pages[0]] == 102).all()


def test_a_copy_has_pages_of_its_own() -> None:
    pages = open_pages()
    first, copy = sequences(pages, (CONTEXT, 1))
    fill(first, [1] * CONTEXT)
    copy.copy_from(first, BLOCK + 2)
    check_owners(pages, [first, copy])
    assert holds(copy, [1] * (BLOCK + 2)) and len(copy.pages) == 2
    fill(copy, [2] * 3)
    first.truncate(0)
    fill(first, [7] * CONTEXT)
    assert holds(copy, [1] * (BLOCK + 2) + [2] * 3) and holds(first, [7] * CONTEXT)


def test_the_lender_gives_way_when_nothing_is_free_and_not_before() -> None:
    pages = open_pages(tokens=CONTEXT)  # four pages
    lender, other = sequences(pages, (BLOCK + 1, 1))
    pages.lender = lender
    fill(lender, [1] * 9)
    other.claim(2 * BLOCK)
    assert pages.free == 0 and holds(lender, [1] * 9)
    other.claim(CONTEXT)
    assert lender.length == 0 and not lender.pages, "and knows that its keys and values are gone"
    check_owners(pages, [lender, other])


def test_more_than_was_planned_is_our_bug_and_takes_nothing_from_anybody() -> None:
    pages = open_pages(tokens=CONTEXT)
    lender, other = sequences(pages, (BLOCK, 3 * BLOCK))
    pages.lender = lender
    with pytest.raises(AssertionError, match="more tokens than were planned"):
        pages.take(lender)  # nor does it give way to itself
    assert len(lender.pages) == 1 and len(other.pages) == 3


def test_a_page_that_a_ctrl_c_loses_is_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between its leaving one list and its coming to another."""
    pages = open_pages(tokens=CONTEXT)
    first, second = sequences(pages, (2 * BLOCK, BLOCK))

    def interrupted(_: list[int]) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pages, "give_back", interrupted)
        with pytest.raises(KeyboardInterrupt):
            first.give_back(BLOCK)
    pages.take(first)  # which it never got
    assert len(first.pages) == 1 and not pages.free
    second.claim(CONTEXT)
    check_owners(pages, [first, second])


def test_a_closed_memory_holds_nothing() -> None:
    pages = open_pages()
    (kv,) = sequences(pages, (BLOCK,))
    pages.close()
    kv.give_back(0)
    with pytest.raises(IndexError):
        pages.tensors(0)


def pool_of(pages: GpuPages, tokens: int) -> KVPool:
    return KVPool(config(), CONTEXT, tokens, None, lambda: GpuKVCache(pages))


def test_a_context_that_ends_within_a_page_is_filled_by_as_many_as_were_planned() -> None:
    """The pool counts such a sequence's last block as what the context leaves of it; a page is a page."""
    pages = open_pages(tokens=3 * CONTEXT, sequences=3)
    pool = pool_of(pages, 3 * CONTEXT)
    running = [pool.take([place] * 100) for place in range(3)]
    for length in range(30, CONTEXT + 1, 30):
        assert all(pool.grow(kv, length) for kv in running)
    assert pool.used_tokens == 3 * CONTEXT and [len(kv.pages) for kv in running] == [3] * 3
    late = pool.take([9] * 9)
    assert not pool.grow(late, 1) and not late.pages
    pool.truncate(running[0], 2 * BLOCK)
    assert pool.used_tokens == 2 * CONTEXT + 2 * BLOCK and len(running[0].pages) == 2
    assert not pool.grow(late, 1), "22 tokens are no block"
    pool.truncate(running[0], BLOCK)
    assert pool.grow(late, 1) and len(late.pages) == 1
    for kv in (*running, late):
        pool.release(kv)
    check_owners(pages, [])
    assert pool.used_tokens == 0


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_whatever_happens_every_page_has_one_owner_and_what_is_counted_has_pages(data: st.DataObject) -> None:
    tokens = data.draw(st.integers(CONTEXT, 3 * CONTEXT))
    pages = open_pages(tokens, sequences=-(-tokens // CONTEXT))
    pool, lender = pool_of(pages, tokens), GpuKVCache(pages)
    pages.lender = lender

    def also() -> None:
        check_owners(pages, [*pool._counted, *pool._idle, lender])
        assert all(len(kv.pages) == -(-counted // BLOCK) for kv, counted in pool._counted.items())
        lender.claim(BLOCK * (len(lender.pages) + data.draw(st.integers(0, pages.free))))

    check_whatever_happens(data, pool, fill, holds, also)
    pool.forget()
    also()


# The decoder

STRETCHES = ((0, 63), (63, 64), (64, 65), (65, 130), (130, 131))  # chunks and steps, to and over pages' ends


def run(opened: Opened, pool: KVPool, batch: list[tuple[GpuKVCache, list[int]]]) -> list[Tensor]:
    assert all(pool.grow(kv, kv.length + len(tokens)) for kv, tokens in batch)
    return list(opened.decoder.forward_batch([Stretch(kv, tokens) for kv, tokens in batch]).clone())


def in_turn(
    opened: Opened, pool: KVPool, texts: list[list[int]]
) -> tuple[list[GpuKVCache], list[list[Tensor]]]:
    """Each text begins when the one before has run its first stretch: chunks beside steps, steps together,
    and pages that take turns. -> the sequences, and the logits of each one's stretches"""
    kv_caches = [pool.take(text) for text in texts]
    found: list[list[Tensor]] = [[] for _ in texts]
    for time in range(len(STRETCHES) + len(texts) - 1):
        now = [i for i in range(len(texts)) if 0 <= time - i < len(STRETCHES)]
        spans = [STRETCHES[time - i] for i in now]
        batch = [(kv_caches[i], texts[i][slice(*span)]) for i, span in zip(now, spans, strict=True)]
        for i, logits in zip(now, run(opened, pool, batch), strict=True):
            found[i].append(logits)
    return kv_caches, found


def test_no_bit_depends_on_where_the_pages_lie_nor_on_who_had_them(tmp_path: Path) -> None:
    """Copied from one that runs and taken over from one that was kept, too."""
    random = Random(3)
    texts = [[random.randrange(250) for _ in range(131)] for _ in range(2)]
    shape = {"num_hidden_layers": 2, "num_local_experts": 4, "num_experts_per_tok": 1}
    folder = make_tiny_checkpoint(tmp_path / "model", "mixtral", **shape)
    with Opened(folder, 0, run=replace(RUN, context=CONTEXT), conversations=3) as opened:
        decoder = opened.decoder
        pool = KVPool(decoder.config, CONTEXT, 3 * CONTEXT, None, decoder.new_sequence)
        alone: list[list[Tensor]] = []
        for text in texts:
            (kv,), (logits,) = in_turn(opened, pool, [text])
            alone.append(logits)
            pool.release(kv)

        (first, second), together = in_turn(opened, pool, texts)
        assert sorted(first.pages) != list(range(min(first.pages), min(first.pages) + 3))
        assert all(map(torch.equal, together[0], alone[0])) and all(map(torch.equal, together[1], alone[1]))

        copy = pool.take(texts[0][:130] + [1])
        assert copy.length == 130 and not set(copy.pages) & {*first.pages, *second.pages}
        pool.keep(second)
        again = pool.take(texts[1])
        assert again is second and again.length == 130
        last = run(opened, pool, [(copy, texts[0][130:]), (again, texts[1][130:])])
        assert all(torch.equal(last[i], alone[i][-1]) for i in range(2))
        check_owners(decoder.model.pages, [first, second, copy, decoder.kv_cache])
