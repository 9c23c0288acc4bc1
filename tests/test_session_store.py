"""Stored sessions: the longest one is found, damage is never used, and the folder stays within its limit."""

import errno
import json
import logging
import os
import stat
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_models import make_tiny_checkpoint
from torch import Tensor

from flashmoe.config import load_model_config
from flashmoe.errors import ConfigError
from flashmoe.pack import PackOptions, pack
from flashmoe.session_file import BLOCK_ROWS, file_bytes, read_head, session_key
from flashmoe.session_store import SessionStore, fingerprint
from storage import safetensors_writer

PRINT = "ab" * 32
L, G, D = 2, 2, 4  # layers, KV heads, head size
LIMIT = 1 << 30
Rows = list[tuple[Tensor, Tensor]]
in_one_folder = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def rows(tokens: int, seed: int = 0, layers: int = L, heads: int = G, head_dim: int = D) -> Rows:
    random = torch.Generator().manual_seed(seed)
    shape = (tokens, heads, head_dim)
    return [
        (torch.randn(shape, generator=random), torch.randn(shape, generator=random)) for _ in range(layers)
    ]


def room(tokens: int, layers: int = L, heads: int = G, head_dim: int = D) -> Rows:
    """Tensors to load into, as those of a KV cache: longer than what comes, and of zeros."""
    return [
        (torch.zeros(tokens, heads, head_dim), torch.zeros(tokens, heads, head_dim)) for _ in range(layers)
    ]


def open_store(folder: Path, limit: int = LIMIT, of: str = PRINT) -> SessionStore:
    return SessionStore(folder, limit, of)


def files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def assert_same(loaded: Rows, saved: Rows, tokens: int) -> None:
    for got, put in zip(loaded, saved, strict=True):
        for a, b in zip(got, put, strict=True):
            assert torch.equal(a[:tokens], b[:tokens])
            assert not a[tokens:].any(), "nothing behind the tokens asked for is touched"


def test_a_long_prompt_is_found_again_by_the_next_process(tmp_path: Path) -> None:
    tokens, saved = list(range(1000, 1700)), rows(700)
    open_store(tmp_path).save(tokens, saved)
    later = open_store(tmp_path)
    key, shared = later.longest_prefix([*tokens[:600], 7, 7])
    assert shared == 600
    loaded = room(720)
    assert later.load(key, shared, loaded) == 600
    assert_same(loaded, saved, 600)


@in_one_folder
@given(st.integers(1, 3 * BLOCK_ROWS), st.integers(0, 2**32 - 700), st.data())
def test_what_is_saved_is_what_is_loaded(tmp_path: Path, count: int, first: int, data: st.DataObject) -> None:
    for path in files(tmp_path):
        path.unlink()
    store, tokens, saved = open_store(tmp_path), list(range(first, first + count)), rows(count)
    if first + count > 2**32:
        tokens = [first] * count
    store.save(tokens, saved)
    wanted = data.draw(st.integers(0, count))
    loaded = room(count + 3)
    key, shared = store.longest_prefix(tokens)
    assert (shared, store.load(key, wanted, loaded)) == (count, wanted)
    assert_same(loaded, saved, wanted)


def test_rows_that_are_views_into_a_larger_cache_are_saved_and_loaded(tmp_path: Path) -> None:
    """A KV cache [context, layers, G, d] gives tensors whose rows do not lie side by side."""
    arena, target = torch.randn(300, L, 2, G, D), torch.zeros(300, L, 2, G, D)
    views = [(arena[:270, layer, 0], arena[:270, layer, 1]) for layer in range(L)]
    store = open_store(tmp_path)
    store.save(range(270), views)
    key, _ = store.longest_prefix(range(270))
    assert store.load(key, 270, [(target[:, layer, 0], target[:, layer, 1]) for layer in range(L)]) == 270
    assert torch.equal(target[:270], arena[:270]) and not target[270:].any()


@in_one_folder
@given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), max_size=8),
    st.lists(st.integers(0, 2), max_size=7),
)
def test_no_stored_session_shares_more_with_a_prompt_than_the_one_found(
    tmp_path: Path, sessions: list[list[int]], prompt: list[int]
) -> None:
    """Ids 0, 1 and 2, so that prefixes are common; against the plain way to find out."""
    for path in files(tmp_path):
        path.unlink()
    store = open_store(tmp_path)
    for session in sessions:
        store.save(session, rows(len(session)))

    def shared(session: list[int]) -> int:
        return next((i for i, (a, b) in enumerate(zip(session, prompt, strict=False)) if a != b),
                    min(len(session), len(prompt)))  # fmt: skip

    key, count = store.longest_prefix(prompt)
    assert count == max(map(shared, sessions), default=0)
    assert (key == "") == (count == 0)
    stored = [read_head(path).tokens.tolist() for path in files(tmp_path)]
    maximal = {tuple(s) for s in sessions if not any(o != s and o[: len(s)] == s for o in sessions)}
    assert sorted(map(tuple, stored)) == sorted(maximal), "each that no other goes on from, once"


def test_ids_are_compared_whole_and_not_by_their_bytes(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.save([0x01020304, 0x0A0B0C0D], rows(2))
    assert store.longest_prefix([0x01020304, 0x0A0B0C0E])[1] == 1
    assert store.longest_prefix([0x01020305]) == ("", 0)


def test_a_conversation_that_goes_on_replaces_its_beginning(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.save([1, 2, 3], rows(3))
    store.save([1, 2, 3, 4], rows(4, seed=1))
    assert len(files(tmp_path)) == len(store) == 1
    assert store.longest_prefix([1, 2, 3, 4])[1] == 4
    before = files(tmp_path)[0].read_bytes()
    store.save([1, 2], rows(2, seed=2))
    store.save([1, 2, 3, 4], rows(4, seed=3))
    assert [path.read_bytes() for path in files(tmp_path)] == [before]


def test_nothing_is_stored_of_no_tokens(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.save([], rows(0))
    assert files(tmp_path) == [] and store.longest_prefix([]) == ("", 0)


def test_the_least_recently_used_session_goes_first(tmp_path: Path) -> None:
    size = file_bytes(10, L, G, D)
    store = open_store(tmp_path, limit=3 * size)
    for first in (100, 200, 300):
        store.save([first] * 10, rows(10))
    assert store.load(store.longest_prefix([100] * 10)[0], 10, room(10)) == 10  # used again
    store.save([400] * 10, rows(10))
    assert store.longest_prefix([200] * 10) == ("", 0)
    assert [store.longest_prefix([first] * 10)[1] for first in (100, 300, 400)] == [10, 10, 10]
    assert sum(path.stat().st_size for path in files(tmp_path)) <= store.limit_bytes


def test_to_save_less_than_what_is_stored_counts_as_a_use(tmp_path: Path) -> None:
    store = open_store(tmp_path, limit=2 * file_bytes(10, L, G, D))
    store.save([100] * 10, rows(10))
    store.save([200] * 10, rows(10))
    store.save([100] * 9, rows(9))
    store.save([300] * 10, rows(10))
    assert store.longest_prefix([100])[1] == 1 and store.longest_prefix([200])[1] == 0


def test_the_order_of_use_outlives_the_process(tmp_path: Path) -> None:
    limit = 2 * file_bytes(10, L, G, D)
    first = open_store(tmp_path, limit)
    first.save([100] * 10, rows(10))
    first.save([200] * 10, rows(10))
    first.load(first.longest_prefix([100])[0], 1, room(10))
    second = open_store(tmp_path, limit)
    second.save([300] * 10, rows(10))
    assert second.longest_prefix([200]) == ("", 0) and second.longest_prefix([100])[1] == 1


def test_a_session_beyond_the_limit_is_not_written_and_drives_nobody_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(tmp_path, limit=file_bytes(10, L, G, D))
    store.save([1] * 10, rows(10))
    with caplog.at_level(logging.INFO):
        store.save([2] * 11, rows(11))
    assert "session of 11 tokens is not stored" in caplog.text and "--session-cache-size" in caplog.text
    assert store.longest_prefix([1] * 10)[1] == 10 and store.longest_prefix([2]) == ("", 0)


def test_replacing_a_beginning_at_the_limit_drives_nobody_else_out(tmp_path: Path) -> None:
    store = open_store(tmp_path, limit=2 * file_bytes(10, L, G, D))
    store.save([2] * 10, rows(10))
    store.save([1] * 9, rows(9))
    store.save([1] * 10, rows(10))
    assert store.longest_prefix([1] * 10)[1] == store.longest_prefix([2] * 10)[1] == 10


# Damage


@pytest.fixture
def stored(tmp_path: Path) -> tuple[SessionStore, str, Path, bytes]:
    """One session of 3 tokens, 1 layer, 1 head of 2 numbers, in a folder of its own."""
    store = open_store(tmp_path / "cache")
    store.save([5, 6, 7], rows(3, 0, 1, 1, 2))
    key, shared = store.longest_prefix([5, 6, 7])
    (path,) = files(tmp_path / "cache")
    assert shared == 3 and store.load(key, 3, room(3, 1, 1, 2)) == 3
    return store, key, path, path.read_bytes()


def damaged_rows(stored: tuple[SessionStore, str, Path, bytes], content: bytes) -> int:
    """What the store that knows the session loads of it once its file says something else."""
    store, key, path, whole = stored
    path.write_bytes(content)
    loaded = store.load(key, 3, room(3, 1, 1, 2))
    path.write_bytes(whole)
    store._folder_ns = -1
    assert store.longest_prefix([5, 6, 7]) == (key, 3)
    return loaded


def test_no_byte_can_be_flipped_unnoticed(stored: tuple[SessionStore, str, Path, bytes]) -> None:
    whole = stored[3]
    for at in range(len(whole)):
        flipped = bytearray(whole)
        flipped[at] ^= 1 << at % 8
        assert damaged_rows(stored, bytes(flipped)) == 0, f"byte {at} of {len(whole)}"
    assert damaged_rows(stored, whole) == 3


def test_a_file_cut_anywhere_gives_nothing(stored: tuple[SessionStore, str, Path, bytes]) -> None:
    whole = stored[3]
    for length in [*range(64), *range(4000, len(whole))]:
        assert damaged_rows(stored, whole[:length]) == 0, f"{length} of {len(whole)} bytes"
    assert damaged_rows(stored, whole + b"\0") == 0


def test_a_new_process_skips_a_damaged_head_and_says_so(
    stored: tuple[SessionStore, str, Path, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    _, _, path, whole = stored
    rows_begin = len(whole) - 2 * 3 * 2 * 4
    for at in [0, 5, 9, 300, 4000, *range(4096, rows_begin)]:
        flipped = bytearray(whole)
        flipped[at] ^= 0x10
        path.write_bytes(flipped)
        caplog.clear()
        assert open_store(path.parent).longest_prefix([5, 6, 7]) == ("", 0), f"byte {at}"
        assert "a stored session is skipped" in caplog.text and path.name in caplog.text


def test_damaged_rows_are_found_when_they_are_loaded_logged_and_removed(
    stored: tuple[SessionStore, str, Path, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    _, key, path, whole = stored
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    store = open_store(path.parent)
    assert store.longest_prefix([5, 6, 7]) == (key, 3)
    assert store.load(key, 3, room(3, 1, 1, 2)) == 0
    assert "damaged" in caplog.text and not path.exists()
    assert store.longest_prefix([5, 6, 7]) == ("", 0)


def test_damage_behind_the_rows_that_are_wanted_does_not_matter(tmp_path: Path) -> None:
    """Of a long conversation only the blocks that are wanted are read."""
    store, saved = open_store(tmp_path), rows(2 * BLOCK_ROWS)
    store.save(range(2 * BLOCK_ROWS), saved)
    (path,) = files(tmp_path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    key, _ = store.longest_prefix(range(2 * BLOCK_ROWS))
    loaded = room(2 * BLOCK_ROWS)
    assert store.load(key, BLOCK_ROWS, loaded) == BLOCK_ROWS
    assert_same(loaded, saved, BLOCK_ROWS)
    assert store.load(key, BLOCK_ROWS + 1, loaded) == 0


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=400), st.sampled_from([b"", b"{", b'{"__metadata__":{}}', b'{"a":[[[[']))
def test_any_bytes_under_our_name_are_no_session(tmp_path: Path, content: bytes, start: bytes) -> None:
    text = start + content
    path = tmp_path / f"session-{'0' * 32}.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    assert len(open_store(tmp_path)) == 0


def test_a_well_formed_safetensors_file_of_someone_else_is_no_session(tmp_path: Path) -> None:
    path = tmp_path / f"session-{'0' * 32}.safetensors"
    for tensors in ({}, {"a": torch.zeros(3)}, {str(i): torch.zeros(1, 1, 1) for i in range(6)}):
        save_file(tensors, path)
        assert len(open_store(tmp_path)) == 0


def test_a_session_under_the_name_of_another_is_not_used(
    stored: tuple[SessionStore, str, Path, bytes],
) -> None:
    _, _, path, whole = stored
    path.rename(path.with_name(f"session-{'0' * 32}.safetensors"))
    assert len(open_store(path.parent)) == 0
    path.write_bytes(whole)
    assert len(open_store(path.parent)) == 1


def test_a_session_of_another_shape_is_not_loaded(stored: tuple[SessionStore, str, Path, bytes]) -> None:
    whole = stored[3]
    store, key, path, _ = stored
    for target in (room(3, 2, 1, 2), room(3, 1, 2, 2), room(3, 1, 1, 4), room(2, 1, 1, 2), room(3, 0)):
        assert store.load(key, 3, target) == 0
        path.write_bytes(whole)
        store._folder_ns = -1
        store.longest_prefix([5])
    doubles = [(keys.double(), values.double()) for keys, values in room(3, 1, 1, 2)]
    assert store.load(key, 3, doubles) == 0


def test_numbers_that_are_not_finite_are_not_loaded(tmp_path: Path) -> None:
    saved = rows(3)
    saved[1][1][2, 0, 0] = torch.inf
    store = open_store(tmp_path)
    store.save([1, 2, 3], saved)
    assert store.load(store.longest_prefix([1, 2, 3])[0], 3, room(3)) == 0


def test_a_session_that_vanished_is_no_error(
    stored: tuple[SessionStore, str, Path, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    store, key, path, _ = stored
    path.unlink()
    with caplog.at_level(logging.INFO):
        assert store.load(key, 3, room(3, 1, 1, 2)) == 0
    assert "is gone" in caplog.text
    assert store.load(key, 3, room(3, 1, 1, 2)) == 0 and store.load("no such key", 1, room(3)) == 0


def test_a_folder_that_vanished_is_no_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = open_store(tmp_path / "cache")
    (tmp_path / "cache").rmdir()
    store.save([1], rows(1))
    assert store.longest_prefix([1]) == ("", 0)
    assert "is not stored" in caplog.text


# The folder


def test_folder_and_files_are_their_owners_alone(tmp_path: Path) -> None:
    previous = os.umask(0)
    try:
        store = open_store(tmp_path / "new" / "cache")
        store.save([1, 2, 3], rows(3))
    finally:
        os.umask(previous)
    assert stat.S_IMODE((tmp_path / "new/cache").stat().st_mode) == 0o700
    (path,) = files(tmp_path / "new/cache")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_an_empty_folder_that_was_there_becomes_private(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir(mode=0o755)
    open_store(tmp_path / "cache")
    assert stat.S_IMODE((tmp_path / "cache").stat().st_mode) == 0o700


def test_a_folder_in_which_others_may_write_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    folder.chmod(0o777)
    with pytest.raises(ConfigError, match=r"--session-cache .*cache is not yours alone.* mode 777; name"):
        open_store(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o777, "somebody's folder is left as it is"


def test_a_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--session-cache .*file cannot be used: "):
        open_store(tmp_path / "file")


def test_files_of_others_are_neither_read_nor_removed(tmp_path: Path) -> None:
    secret = tmp_path / "secret.safetensors"
    elsewhere = open_store(tmp_path / "elsewhere")
    elsewhere.save([9, 9], rows(2))
    (theirs,) = files(tmp_path / "elsewhere")
    folder = tmp_path / "cache"
    folder.mkdir(0o700)
    for name in ("session-1.safetensors", "notes.txt", ".session-x.partial", "model.safetensors"):
        (folder / name).write_bytes(bytes(1 << 16))
    (folder / theirs.name).symlink_to(theirs)
    before = files(folder)
    store = open_store(folder, limit=file_bytes(2, L, G, D))
    assert store.longest_prefix([9, 9]) == ("", 0), "a link is not followed"
    for first in range(3):
        store.save([first, first], rows(2))
    assert set(before) < set(files(folder)) and len(files(folder)) == len(before) + 1
    assert theirs.exists() and not secret.exists()


def test_sessions_of_another_model_are_not_used_and_go_when_room_is_needed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    limit = 2 * file_bytes(10, L, G, D)
    other = open_store(tmp_path, limit, "cd" * 32)
    other.save([1] * 10, rows(10))
    store = open_store(tmp_path, limit)
    assert store.longest_prefix([1] * 10) == ("", 0) and "another model" in caplog.text
    store.save([2] * 10, rows(10))
    assert other.longest_prefix([1] * 10)[1] == 10, "there is room for both"
    store.save([3] * 10, rows(10))
    assert other.longest_prefix([1] * 10) == ("", 0) and len(files(tmp_path)) == 2


def test_a_file_that_is_skipped_is_told_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / f"session-{'0' * 32}.safetensors").write_bytes(b"junk")
    store = open_store(tmp_path)
    for first in range(3):
        store.save([first], rows(1))
        store.longest_prefix([first])
    assert caplog.text.count("is skipped") == 1


def test_what_a_killed_process_left_half_written_goes_once_it_is_old(tmp_path: Path) -> None:
    size = file_bytes(10, L, G, D)
    old, new = (tmp_path / f".session-{letter * 32}.safetensors.7.partial" for letter in "01")
    for path in (old, new):
        path.write_bytes(bytes(size))
    os.utime(old, (1, 1))
    store = open_store(tmp_path, limit=size)
    store.save([1] * 10, rows(10))
    assert not old.exists() and new.exists(), "the new one may be another process's, being written"


# Disks


def test_a_full_disk_is_a_logged_line_and_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(tmp_path)
    store.save([1, 2], rows(2))

    def no_space(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(safetensors_writer.os, "fsync", no_space)
    store.save([1, 2, 3], rows(3))
    assert "a session of 3 tokens is not stored" in caplog.text and "No space left" in caplog.text
    assert len(files(tmp_path)) == 1 and store.longest_prefix([1, 2, 3])[1] == 2


def test_a_disk_known_to_be_too_full_is_a_logged_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(safetensors_writer.shutil, "disk_usage", lambda path: usage(9, 9, 0))
    open_store(tmp_path).save([1, 2], rows(2))
    assert "the disk is too full" in caplog.text and files(tmp_path) == []


def test_a_disk_that_stays_full_is_one_line_and_a_new_one_when_it_fills_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A busy server wrote a line a conversation."""
    usage = namedtuple("usage", "total used free")
    store = open_store(tmp_path)
    with monkeypatch.context() as full:
        full.setattr(safetensors_writer.shutil, "disk_usage", lambda path: usage(9, 9, 0))
        for first in range(5):
            store.save([first, 2], rows(2))
    assert caplog.text.count("is not stored") == 1
    store.save([7, 8], rows(2))
    monkeypatch.setattr(safetensors_writer.shutil, "disk_usage", lambda path: usage(9, 9, 0))
    store.save([9, 9], rows(2))
    assert caplog.text.count("is not stored") == 2 and len(store) == 1


def test_a_file_system_that_became_read_only_is_a_logged_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It also refuses to remove the file that it refused to make; that error ended whatever was computed."""
    read_only = OSError(errno.EROFS, os.strerror(errno.EROFS))

    def refuses(*_: object, **__: object) -> None:
        raise read_only

    store = open_store(tmp_path)
    store.save([1, 2], rows(2))
    monkeypatch.setattr("builtins.open", refuses)
    monkeypatch.setattr(Path, "unlink", refuses)
    monkeypatch.setattr(os, "utime", refuses)
    store.save([1, 2, 3], rows(3))
    message = caplog.records[-1].message
    assert message.startswith("a session of 3 tokens is not stored: cannot write ")
    assert "Read-only file system; needs " in message


def test_the_file_is_synced_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(safetensors_writer.os, "fsync", lambda fd: (order.append("sync"), fsync(fd))[1])
    monkeypatch.setattr(
        safetensors_writer.os, "replace", lambda a, b: (order.append("rename"), replace(a, b))[1]
    )
    open_store(tmp_path).save([1, 2], rows(2))
    assert order[:2] == ["sync", "rename"]


def test_any_safetensors_library_reads_the_file(tmp_path: Path) -> None:
    saved = rows(5)
    open_store(tmp_path).save([1, 2, 3, 4, 5], saved)
    (path,) = files(tmp_path)
    tensors = load_file(path)
    assert tensors["tokens"].tolist() == [1, 2, 3, 4, 5]
    assert torch.equal(tensors["layers.1.values"], saved[1][1])


# Two processes

WRITER = """
import json, sys
from pathlib import Path
import torch
from flashmoe.session_store import SessionStore
folder, limit, number = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
store = SessionStore(folder, limit, "ab" * 32)
good = bad = 0
for i in range(60):
    first = i % 7  # both processes write the same conversations, and each goes on in its own way
    tokens = [first] * 20 + [1000 * number + i] * (i % 5)
    full = torch.arange(float(len(tokens) * 8)).view(len(tokens), 2, 4) + first
    store.save(tokens, [(full, -full), (full, -full)])
    key, shared = store.longest_prefix([(i + 3) % 7] * 20)
    target = [(torch.zeros(30, 2, 4), torch.zeros(30, 2, 4)) for _ in range(2)]
    if store.load(key, shared, target):
        expected = torch.arange(float(shared * 8)).view(shared, 2, 4) + (i + 3) % 7
        if all(torch.equal(k[:shared], expected) and torch.equal(v[:shared], -expected) for k, v in target):
            good += 1
        else:
            bad += 1
print(json.dumps([good, bad]))
"""


def test_two_processes_share_a_folder_without_spoiling_a_file(tmp_path: Path) -> None:
    limit = 10 * file_bytes(24, L, G, D)
    root = Path(__file__).resolve().parent.parent
    both = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), str(limit), str(number)], cwd=root,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for number in (1, 2)
    ]  # fmt: skip
    said = [(*process.communicate(timeout=120), process.returncode) for process in both]
    loaded = 0  # one of them may find each of its own gone already
    for out, errors, status in said:
        assert status == 0, errors
        good, bad = json.loads(out)
        assert bad == 0 and "damaged" not in errors
        loaded += good
    assert loaded > 0
    assert all(len(read_head(path).tokens) >= 20 for path in files(tmp_path)), "each is whole, no partial"
    store = open_store(tmp_path, limit)
    store.save([50], rows(1))
    assert sum(path.stat().st_size for path in files(tmp_path)) <= limit


def test_a_session_that_another_process_stored_is_found(tmp_path: Path) -> None:
    here, there = open_store(tmp_path), open_store(tmp_path)
    there.save([1, 2, 3], rows(3))
    key, shared = here.longest_prefix([1, 2, 3])
    assert shared == 3 and here.load(key, 3, room(3)) == 3
    there.save([1, 2, 3, 4], rows(4))
    assert here.longest_prefix([1, 2, 3, 4])[1] == 4
    assert len(here) == 1, "what was replaced is forgotten here, too"


# What a session belongs to


def test_the_fingerprint_changes_with_weights_options_and_device(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path / "model")
    config = load_model_config(folder)
    prints = [fingerprint(config, folder, False), fingerprint(config, folder, True),
              fingerprint(config, folder, False, "cuda")]  # fmt: skip
    assert fingerprint(load_model_config(folder), folder, False) == prints[0] and len(prints[0]) == 64
    os.utime(folder / "model.safetensors", ns=(1, 1))
    prints.append(fingerprint(config, folder, False))
    other = make_tiny_checkpoint(tmp_path / "other", rope_theta=5000.0)
    os.utime(other / "model.safetensors", ns=(1, 1))
    prints.append(fingerprint(load_model_config(other), other, False))
    assert len(set(prints)) == 5


def test_a_packed_folder_keeps_its_fingerprint_when_it_is_copied(tmp_path: Path) -> None:
    """Its manifest names the checksum of every tensor, so times do not matter."""
    packed = tmp_path / "packed"
    pack(make_tiny_checkpoint(tmp_path / "model"), packed, PackOptions("int8"))
    config = load_model_config(packed)
    before = fingerprint(config, packed, False)
    for path in packed.iterdir():
        os.utime(path, ns=(1, 1))
    assert fingerprint(config, packed, False) == before
    other = tmp_path / "other"
    pack(make_tiny_checkpoint(tmp_path / "model2", seed=1), other, PackOptions("int8"))
    assert fingerprint(load_model_config(other), other, False) != before


def test_a_key_is_of_the_model_and_the_tokens() -> None:
    tokens = np.array([1, 2, 3])
    assert session_key(PRINT, tokens) != session_key("cd" * 32, tokens) != session_key("cd" * 32, tokens[:2])
