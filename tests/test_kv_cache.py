"""Memory of keys and values: what is valid, what is forgotten, who shares a beginning, what is counted."""

import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmoe.config import ModelConfig, parse_model_config
from flashmoe.kv_cache import BLOCK, KVCache, KVPool, shared_prefix
from flashmoe.session_store import Saving, SessionStore
from storage.storage_errors import StorageError

LAYERS, GROUPS, HEAD = 3, 2, 4
CONTEXT = 4 * BLOCK


def config() -> ModelConfig:
    return parse_model_config(dict(
        model_type="qwen3_moe", vocab_size=9, hidden_size=8, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=GROUPS, head_dim=HEAD, num_experts=2, num_experts_per_tok=1,
        moe_intermediate_size=4,
    ))  # fmt: skip


def fill(kv: KVCache, tokens: list[int]) -> None:
    """As a decoder would: rows that tell token and place."""
    for layer in range(LAYERS):
        for place, token in enumerate(tokens, kv.length):
            keys, values = kv.tensors(layer)
            keys[place], values[place] = 100 * layer + token, 1000 * layer + token + place
    kv.append(tokens)


def holds(kv: KVCache, tokens: list[int]) -> bool:
    if kv.tokens != tokens:
        return False
    for layer in range(LAYERS):
        keys, values = kv.tensors(layer)
        for place, token in enumerate(tokens):
            if not (keys[place] == 100 * layer + token).all():
                return False
            if not (values[place] == 1000 * layer + token + place).all():
                return False
    return True


def test_truncating_forgets_the_end_and_never_makes_longer() -> None:
    kv_cache = KVCache(config(), context=10)
    kv_cache.append([1, 2, 3, 4, 5, 6])
    kv_cache.truncate(8)
    assert kv_cache.length == 6
    kv_cache.truncate(2)
    assert kv_cache.tokens == [1, 2]
    kv_cache.truncate(0)
    assert kv_cache.length == 0


def test_layers_do_not_share_memory_and_lie_where_native_code_expects_them() -> None:
    kv_cache = KVCache(config(), context=5)
    size = 5 * GROUPS * HEAD * 4
    begins = []
    for layer in range(LAYERS):
        for tensor, offset in zip(kv_cache.tensors(layer), kv_cache.offsets(layer), strict=True):
            assert tensor.shape == (5, GROUPS, HEAD) and tensor.is_contiguous()
            assert tensor.dtype == torch.float32
            assert tensor.data_ptr() == kv_cache.address + offset
            begins.append(offset)
    assert begins == list(range(0, 2 * LAYERS * size, size))


def test_its_memory_is_what_the_budget_counts() -> None:
    kv_cache = KVCache(config(), context=12)
    assert kv_cache._all.nbytes == 12 * config().kv_bytes_per_token


def test_what_is_given_back_is_gone_and_what_is_not_stays() -> None:
    """Rows of a page, so that pages and blocks agree."""
    big = parse_model_config(dict(
        model_type="qwen3_moe", vocab_size=9, hidden_size=8, num_hidden_layers=2, num_attention_heads=16,
        num_key_value_heads=16, head_dim=64, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=4,
    ))  # fmt: skip
    kv_cache = KVCache(big, context=16)
    kv_cache._all.fill_(7)
    kv_cache.give_back(4)
    for layer in range(2):
        for tensor in kv_cache.tensors(layer):
            assert (tensor[:4] == 7).all() and (tensor[4:] == 0).all()


@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)))
def test_the_shared_prefix_is_the_longest_one(a: list[int], b: list[int]) -> None:
    length = shared_prefix(a, b)
    assert a[:length] == b[:length]
    assert length == min(len(a), len(b)) or a[length] != b[length]


def pool(total: int = 8 * BLOCK) -> KVPool:
    return KVPool(config(), CONTEXT, total)


def kept(pool: KVPool, tokens: list[int]) -> KVCache:
    kv = pool.take(tokens)
    assert pool.grow(kv, len(tokens))
    fill(kv, tokens[kv.length :])
    pool.keep(kv)
    return kv


def test_the_next_turn_of_a_conversation_takes_its_sequence_over() -> None:
    memory = pool()
    first = kept(memory, [1, 2] * 20)
    again = memory.take([1, 2] * 20 + [3, 4])
    assert again is first and again.length == 40 and not memory.kept


def test_a_prompt_that_is_wholly_known_still_runs_its_last_token() -> None:
    memory = pool()
    kept(memory, [1, 2] * 20)
    assert memory.take([1, 2] * 20).length == 39


def test_a_shared_beginning_is_copied_if_the_rest_is_worth_keeping() -> None:
    memory = pool()
    system = [5] * BLOCK
    first = kept(memory, system + [1] * 2 * BLOCK)
    second = memory.take(system + [2] * 5)
    assert second is not first and holds(second, system)
    assert memory.kept == [first] and holds(first, system + [1] * 2 * BLOCK)


def test_a_running_sequence_lends_its_beginning_too() -> None:
    memory = pool()
    running = memory.take([5] * 40)
    assert memory.grow(running, 41)
    fill(running, [5] * 30)
    other = memory.take([5] * 40)
    assert other is not running and holds(other, [5] * 30)


@pytest.mark.parametrize("is_running", [False, True])
@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_a_copy_that_fails_costs_nothing(
    error: type[BaseException], is_running: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory, tokens = pool(), [5] * BLOCK + [1] * 2 * BLOCK
    if is_running:
        first = memory.take(tokens)
        assert memory.grow(first, len(tokens))
        fill(first, tokens)
    else:
        first = kept(memory, tokens)

    def fail(*_: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(KVCache, "copy_from", fail)
        with pytest.raises(error):
            memory.take([5] * BLOCK + [2] * 5)
    assert memory.used_tokens == 3 * BLOCK and memory.kept == ([] if is_running else [first])
    assert holds(first, tokens)


def test_room_is_made_of_kept_sequences_the_least_recently_used_first() -> None:
    memory = KVPool(config(), CONTEXT, 4 * BLOCK)
    for first in range(4):
        kept(memory, [first] * BLOCK)
    memory.keep(memory.take([0] * BLOCK + [7]))  # used again
    running = memory.take([8] * 2 * BLOCK)
    assert memory.grow(running, 2 * BLOCK)
    assert [kv.tokens[0] for kv in memory.kept] == [3, 0]
    assert memory.used_tokens == 4 * BLOCK


def test_what_has_left_memory_comes_back_from_the_store(tmp_path: Path) -> None:
    """Dropped for want of room, saved while idle, or at the end; in another process, too."""
    def opened() -> KVPool:
        store = SessionStore(tmp_path / "kept", 1 << 30, "ab" * 32)
        return KVPool(config(), CONTEXT, 4 * BLOCK, store)

    memory, system = opened(), [4] * 2 * BLOCK
    kept(memory, system + [1] * 20)
    other = memory.take([8] * 4 * BLOCK)
    assert memory.grow(other, 4 * BLOCK) and not memory.kept
    memory.release(other)
    again = memory.take(system + [2] * 5)
    assert holds(again, system)
    memory.release(again)
    kept(memory, [5] * 2 * BLOCK)
    assert memory.save_one() and not memory.save_one()
    kept(memory, [6] * 2 * BLOCK)
    memory.close()
    memory = opened()
    for tokens in (system + [1] * 20, [5] * 2 * BLOCK, [6] * 2 * BLOCK):
        kv = memory.take([*tokens, 7])
        assert holds(kv, tokens)
        memory.release(kv)
    assert memory.take([7] * 90).length == 0
    assert not KVPool(config(), CONTEXT, CONTEXT).save_one()


def test_a_new_prompt_that_shares_a_beginning_leaves_the_newest_conversation_alone() -> None:
    """In a full pool: every chat template begins alike."""
    memory, template = pool(6 * BLOCK), [5] * 10
    oldest = kept(memory, template + [1] * (2 * BLOCK + 20))
    newest = kept(memory, template + [2] * (2 * BLOCK + 20))
    fresh = memory.take(template + [3] * 20)
    assert holds(fresh, template)
    assert memory.kept == [newest] and oldest not in memory.kept
    assert newest.length == 2 * BLOCK + 30


def test_what_is_cut_for_want_of_room_is_stored_first(tmp_path: Path) -> None:
    store = SessionStore(tmp_path / "kept", 1 << 30, "ab" * 32)
    memory = KVPool(config(), CONTEXT, CONTEXT, store)
    whole = [5] * 20 + [1] * 2 * BLOCK
    kept(memory, whole)
    cut = memory.take([5] * 20 + [2] * 3 * BLOCK)
    assert cut.tokens == [5] * 20
    assert store.longest_prefix(whole)[1] == len(whole)


# Written while others decode


class Drive:
    """Writes wait for the test's word, or fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.may_write, self.asked = threading.Event(), threading.Semaphore(0)
        self.error: Exception | None = None
        write = Saving.write

        def slowly(saving: Saving) -> None:
            self.asked.release()
            assert self.may_write.wait(60)
            if self.error is None:
                write(saving)
            else:
                saving.error = self.error

        monkeypatch.setattr(Saving, "write", slowly)


@pytest.fixture
def drive(monkeypatch: pytest.MonkeyPatch) -> Drive:
    return Drive(monkeypatch)


@contextmanager
def busy_pool(folder: Path, total: int = 4 * BLOCK) -> Iterator[tuple[KVPool, SessionStore]]:
    store = SessionStore(folder / "kept", 1 << 30, "ab" * 32)
    memory = KVPool(config(), CONTEXT, total, store)
    memory.is_busy = True
    yield memory, store
    memory.close()
    assert memory.used_tokens == 0 and not memory.kept


def test_nothing_is_lost_that_is_dropped_while_others_decode(tmp_path: Path, drive: Drive) -> None:
    """The oldest is written while there still is room; when there is none, it goes, and comes back."""
    with busy_pool(tmp_path) as (memory, store):
        oldest, newer = [1] * 2 * BLOCK, [2] * (BLOCK + 20)
        kept(memory, oldest)
        memory.write_ahead()
        assert memory._writing is None  # half of all is free
        kept(memory, newer)
        memory.write_ahead()
        assert memory._writing is not None and [kv.tokens for kv in memory.kept] == [newer]
        assert memory.used_tokens == 4 * BLOCK, "its memory is counted"
        drive.may_write.set()
        running = memory.take([3] * 9)
        assert memory.grow(running, 9)
        memory.release(running)
        assert store.longest_prefix(oldest)[1] == len(oldest)
        assert [kv.tokens for kv in memory.kept] == [newer]


def test_what_is_on_disk_is_not_written_again_and_a_reserve_is_enough(tmp_path: Path, drive: Drive) -> None:
    drive.may_write.set()
    with busy_pool(tmp_path) as (memory, _):
        for first in (1, 2):
            kept(memory, [first] * 2 * BLOCK)
        for _ in range(9):
            memory.write_ahead()
            if memory._writing is not None:
                memory._writing.thread.join()
        assert [kv.tokens[0] for kv in memory.kept] == [1, 2]
        assert drive.asked.acquire(blocking=False) and not drive.asked.acquire(blocking=False)


def test_with_nobody_decoding_no_thread_writes(tmp_path: Path, drive: Drive) -> None:
    drive.may_write.set()
    with busy_pool(tmp_path) as (memory, _):
        kept(memory, [1] * CONTEXT)
        memory.is_busy = False
        memory.write_ahead()
        assert memory._writing is None and memory.save_one()


def test_a_conversation_that_goes_on_while_it_is_written_waits_and_is_whole(
    tmp_path: Path, drive: Drive
) -> None:
    with busy_pool(tmp_path) as (memory, store):
        tokens = [1] * (3 * BLOCK + 20)
        whole = kept(memory, tokens)
        memory.write_ahead()
        assert drive.asked.acquire(timeout=60)
        threading.Timer(0.0, drive.may_write.set).start()
        again = memory.take([*tokens, 7, 7])
        assert again is whole and holds(again, tokens) and memory._writing is None
        fill(again, [7, 7])
        memory.release(again)
        kv = memory.take([*tokens, 8])
        assert holds(kv, tokens), "what the file holds"
        memory.release(kv)


def test_a_beginning_is_copied_from_a_sequence_that_is_written(tmp_path: Path, drive: Drive) -> None:
    """Nobody waits: it is only read."""
    with busy_pool(tmp_path, 6 * BLOCK) as (memory, _):
        system = [1] * 20
        kept(memory, system + [2] * (3 * BLOCK + 20))
        running = memory.take([9] * 9)
        assert memory.grow(running, BLOCK + 1)
        memory.write_ahead()
        assert memory._writing is not None and not memory._writing.saving.is_written
        memory.release(running)
        fresh = memory.take(system + [3] * 20)
        assert holds(fresh, system) and memory._writing is not None
        memory.release(fresh)
        drive.may_write.set()


def test_a_disk_that_fails_costs_the_file_and_nothing_else(
    tmp_path: Path, drive: Drive, caplog: pytest.LogCaptureFixture
) -> None:
    drive.error = StorageError("no space left on device")
    drive.may_write.set()
    with busy_pool(tmp_path) as (memory, store):
        tokens = [1] * CONTEXT
        kv = kept(memory, tokens)
        memory.write_ahead()
        assert memory._writing is not None
        memory._writing.thread.join()
        memory.write_ahead()
        assert memory.kept == [kv] and holds(kv, tokens) and not len(store)
        memory.write_ahead()
        assert memory._writing is None, "it is not tried again for ever"
    assert [record.message for record in caplog.records] == [
        f"a session of {CONTEXT} tokens is not stored: no space left on device"
    ]


def test_closing_waits_for_what_is_written(tmp_path: Path, drive: Drive) -> None:
    with busy_pool(tmp_path) as (memory, store):
        kept(memory, [1] * 2 * BLOCK)
        kept(memory, [2] * 2 * BLOCK)
        memory.write_ahead()
        assert drive.asked.acquire(timeout=60)
        threading.Timer(0.0, drive.may_write.set).start()
    assert len(store) == 2


@pytest.mark.parametrize("where", ["start", "join", "end"])
def test_a_ctrl_c_around_a_write_loses_nothing(
    tmp_path: Path, drive: Drive, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Before the thread runs, while it is waited for, and before it is noted."""
    drive.may_write.set()
    with busy_pool(tmp_path) as (memory, store):
        kept(memory, [1] * CONTEXT)
        target: Any = SessionStore if where == "end" else threading.Thread
        name = {"start": "start", "join": "join", "end": "end_save"}[where]

        def interrupted(*_: Any) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            if where == "start":
                patch.setattr(target, name, interrupted)
                with pytest.raises(KeyboardInterrupt):
                    memory.write_ahead()
            else:
                memory.write_ahead()
                patch.setattr(target, name, interrupted)
                with pytest.raises(KeyboardInterrupt):
                    memory._end_write()
        memory._end_write()
        assert [holds(kv, [1] * CONTEXT) for kv in memory.kept] == [True]
        assert memory.used_tokens == sum(memory._counted.values())
    assert len(store) == 1


def test_what_became_a_beginning_of_another_while_it_was_written_is_not_kept_twice(
    tmp_path: Path, drive: Drive
) -> None:
    with busy_pool(tmp_path, 6 * BLOCK) as (memory, _):
        kept(memory, [1] * 2 * BLOCK)
        kept(memory, [2] * 3 * BLOCK)
        memory.write_ahead()
        longer = memory._new()
        drive.may_write.set()
        assert memory.grow(longer, 2 * BLOCK + 9)
        fill(longer, [1] * (2 * BLOCK + 9))
        memory.keep(longer)
        memory._end_write()
        assert [len(kv.tokens) for kv in memory.kept if kv.tokens[0] == 1] == [2 * BLOCK + 9]
        assert memory.used_tokens == sum(memory._counted.values())


def test_a_prompt_that_cannot_have_room_drops_nobody() -> None:
    memory = pool(CONTEXT)
    running = memory.take([1] * 9)
    assert memory.grow(running, CONTEXT - BLOCK)
    other = kept(memory, [2] * BLOCK)
    assert not memory.grow(memory.take([3] * 9), 2 * BLOCK)
    assert memory.kept == [other]


def test_there_is_no_room_when_those_that_run_have_it_all() -> None:
    memory = pool(CONTEXT)
    first, second = memory.take([1] * 9), memory.take([2] * 9)
    assert memory.grow(first, CONTEXT - BLOCK) and memory.grow(second, BLOCK)
    assert not memory.grow(second, BLOCK + 1)
    memory.release(first)
    assert memory.grow(second, CONTEXT) and memory.used_tokens == CONTEXT


def test_a_context_that_is_no_multiple_of_a_block_can_be_filled_by_one() -> None:
    memory = KVPool(config(), 100, 100)
    kv = memory.take([1] * 90)
    assert memory.grow(kv, 100) and memory.used_tokens == 100
    memory.release(kv)
    assert memory.used_tokens == 0


def test_a_sequence_that_is_the_beginning_of_another_is_not_kept_twice() -> None:
    memory = pool()
    first = memory.take([1] * 20)
    assert memory.grow(first, 20)
    fill(first, [1] * 20)
    longer = memory.take([1] * 30)
    assert memory.grow(longer, 30)
    fill(longer, [1] * (30 - longer.length))
    memory.keep(first)
    memory.keep(longer)
    assert memory.kept == [longer]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_whatever_happens_rows_are_those_of_their_tokens_and_the_count_is_right(data: st.DataObject) -> None:
    """With a folder that sequences are written to while others decode, too."""
    with tempfile.TemporaryDirectory() as folder:
        store = SessionStore(Path(folder, "kept"), 1 << 30, "ab" * 32) if data.draw(st.booleans()) else None
        memory = KVPool(config(), CONTEXT, 6 * BLOCK, store)
        check_whatever_happens(data, memory)
        memory.close()
        assert memory.used_tokens == sum(memory._counted.values())


def check_whatever_happens(
    data: st.DataObject, memory: KVPool, fill: Callable[[Any, list[int]], None] = fill,
    holds: Callable[[Any, list[int]], bool] = holds, also: Callable[[], None] = lambda: None,
) -> None:  # fmt: skip
    """`also` is checked after each step."""
    running: list[tuple[KVCache, list[int]]] = []
    for _ in range(data.draw(st.integers(1, 12))):
        memory.is_busy = data.draw(st.booleans())
        memory.write_ahead()
        if running and data.draw(st.booleans()):
            kv, tokens = running.pop(data.draw(st.integers(0, len(running) - 1)))
            assert holds(kv, tokens)
            memory.keep(kv) if data.draw(st.booleans()) else memory.release(kv)
        else:
            tokens = [data.draw(st.integers(0, 1))] * data.draw(st.integers(1, BLOCK))
            tokens += [data.draw(st.integers(0, 2))] * data.draw(st.integers(1, 2 * BLOCK))
            del tokens[memory.context :]
            kv = memory.take(tokens)
            if memory.grow(kv, len(tokens)):
                fill(kv, tokens[kv.length :])
                running.append((kv, tokens))
            else:
                memory.release(kv)
        assert all(holds(kv, tokens) for kv, tokens in running)
        assert all(kv.length == len(kv.tokens) and holds(kv, list(kv.tokens)) for kv in memory.kept)
        assert memory.used_tokens == sum(memory._counted.values()) <= memory.total_tokens
        for kv, counted in memory._counted.items():
            assert kv.length <= counted
        also()
