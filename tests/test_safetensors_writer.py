"""Writing safetensors: readable by the library, aligned, streaming, and whole or not there at all."""

import errno
import json
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from storage import safetensors_writer
from storage.checkpoint import INDEX_NAME, SINGLE_NAME, open_checkpoint
from storage.safetensors_writer import TensorSpec, write_safetensors, write_sharded
from storage.storage_errors import StorageError

SPECS = [
    TensorSpec("gate", "BF16", (3, 5)),
    TensorSpec("bias", "F32", (2,)),
    TensorSpec("none", "U8", (0, 4)),
]
BYTES = {"gate": bytes(range(30)), "bias": bytes(8), "none": b""}


def byte_spec(name: str, nbytes: int) -> TensorSpec:
    return TensorSpec(name, "U8", (nbytes,))


def test_the_file_loads_with_the_safetensors_library(tmp_path: Path) -> None:
    gate = torch.randn(3, 5).bfloat16()
    data = {**BYTES, "gate": memoryview(gate.view(torch.uint8).numpy()).cast("B")}
    write_safetensors(tmp_path / SINGLE_NAME, SPECS, data.__getitem__, metadata={"format": "pt"})
    loaded = load_file(tmp_path / SINGLE_NAME)
    assert torch.equal(loaded["gate"], gate) and loaded["none"].shape == (0, 4)
    with safe_open(tmp_path / SINGLE_NAME, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("align", [1, 64, 4096])
def test_the_data_begins_aligned_and_the_tensors_follow_in_the_order_given(
    tmp_path: Path, align: int
) -> None:
    write_safetensors(tmp_path / SINGLE_NAME, SPECS, BYTES.__getitem__, align=align)
    tensors = open_checkpoint(tmp_path).tensors
    begin = tensors["gate"].offset
    assert begin % align == 0
    assert [tensors[spec.name].offset - begin for spec in SPECS] == [0, 30, 38]
    if align == 4096:
        assert begin == 4096


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tensors=st.dictionaries(st.text(max_size=8), st.binary(max_size=300), max_size=6))
def test_what_is_written_is_what_is_read(tmp_path: Path, tensors: dict[str, bytes]) -> None:
    tensors.pop("__metadata__", None)
    tensors = {name: data for name, data in tensors.items() if name.isprintable()}
    specs = [byte_spec(name, len(data)) for name, data in tensors.items()]
    write_safetensors(tmp_path / SINGLE_NAME, specs, iter(tensors.values()))
    checkpoint = open_checkpoint(tmp_path)
    assert {name: bytes(checkpoint.read_tensor(name)) for name in checkpoint.tensors} == tensors


def test_one_tensor_is_asked_for_at_a_time(tmp_path: Path) -> None:
    """The next tensor is fetched only after the one before has been handed to the file."""
    sizes_at_fetch = []

    def fetch(name: str) -> bytes:
        sizes_at_fetch.append(sum(part.stat().st_size for part in tmp_path.glob(".*.partial")))
        return bytes(1 << 20)

    write_safetensors(tmp_path / SINGLE_NAME, [byte_spec(name, 1 << 20) for name in "abc"], fetch)
    assert sizes_at_fetch[2] >= 2 << 20


def test_wrong_specs_and_wrong_data_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    path = tmp_path / SINGLE_NAME
    with pytest.raises(StorageError, match="tensor 'a': 3 bytes given, 4 needed"):
        write_safetensors(path, [byte_spec("a", 4)], lambda name: b"123")
    with pytest.raises(StorageError, match="tensor 'b': 0 bytes given, 4 needed"):
        write_safetensors(path, [byte_spec("a", 4), byte_spec("b", 4)], [b"1234"])
    with pytest.raises(StorageError, match="'a' is taken"):
        write_safetensors(path, [byte_spec("a", 1), byte_spec("a", 1)], lambda name: b"1")
    with pytest.raises(StorageError, match="I3 .* cannot be written"):
        write_safetensors(path, [TensorSpec("a", "I3", (1,))], lambda name: b"1")
    with pytest.raises(KeyboardInterrupt):
        write_safetensors(path, [byte_spec("a", 1)], _interrupted)
    assert list(tmp_path.iterdir()) == []


def _interrupted(name: str) -> bytes:
    raise KeyboardInterrupt


def test_a_disk_known_to_be_too_full_is_refused_before_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100, 60, 40))
    with pytest.raises(
        StorageError, match=r"model\.safetensors: the disk is too full; needs 4596 bytes, 40 are free"
    ):
        write_safetensors(
            tmp_path / SINGLE_NAME, [byte_spec("a", 500)], lambda name: pytest.fail("asked for data")
        )


def test_a_disk_that_fills_up_while_writing_leaves_the_old_file_and_no_half_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / SINGLE_NAME
    write_safetensors(path, [byte_spec("a", 2)], lambda name: b"ab")
    old = path.read_bytes()

    def no_space(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(safetensors_writer.os, "fsync", no_space)
    with pytest.raises(
        StorageError, match=r"model\.safetensors: No space left on device; needs 4099 bytes, \d+ are"
    ):
        write_safetensors(path, [byte_spec("a", 3)], lambda name: b"abc")
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_the_system_refuses_half_way_leaves_nothing(tmp_path: Path) -> None:
    """A real refusal in the middle of a tensor: the process may write no file above 64 KiB."""
    resource = pytest.importorskip("resource", reason="this system has no file size limits")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(StorageError, match="File too large; needs 1052672 bytes"):
            write_safetensors(tmp_path / SINGLE_NAME, [byte_spec("a", 1 << 20)], lambda name: bytes(1 << 20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_does_not_exist_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="No such file or directory"):
        write_safetensors(tmp_path / "no" / SINGLE_NAME, SPECS, BYTES.__getitem__)


def test_shards_keep_an_experts_tensors_together_and_open_as_one_checkpoint(tmp_path: Path) -> None:
    names = ["embed", *(f"{part}.{expert}" for part in ("gate", "down") for expert in range(4)), "head"]
    specs = [byte_spec(name, 100) for name in names]
    paths = write_sharded(
        tmp_path,
        specs,
        lambda name: name.encode().ljust(100),
        max_shard_bytes=350,
        together=lambda name: name.partition(".")[2] or None,
    )
    checkpoint = open_checkpoint(tmp_path)
    assert [path.name for path in paths] == [f"model-0000{n}-of-00004.safetensors" for n in (1, 2, 3, 4)]
    assert checkpoint.shards == paths
    for expert in range(4):
        assert checkpoint.tensors[f"gate.{expert}"].shard == checkpoint.tensors[f"down.{expert}"].shard
    assert all(checkpoint.read_tensor(name) == name.encode().ljust(100) for name in names)
    assert json.loads((tmp_path / INDEX_NAME).read_text())["metadata"]["total_size"] == 1000


def test_a_group_larger_than_a_shard_is_not_split(tmp_path: Path) -> None:
    specs = [byte_spec(name, 100) for name in "abc"]
    paths = write_sharded(
        tmp_path, specs, lambda name: bytes(100), max_shard_bytes=50, together=lambda name: 1
    )
    assert len(paths) == 1 and set(open_checkpoint(tmp_path).tensors) == {"a", "b", "c"}


def test_a_failed_sharded_write_removes_the_shards_it_wrote(tmp_path: Path) -> None:
    def fetch(name: str) -> bytes:
        return bytes(100) if name == "a" else b"short"

    with pytest.raises(StorageError, match="tensor 'b'"):
        write_sharded(tmp_path, [byte_spec("a", 100), byte_spec("b", 100)], fetch, max_shard_bytes=100)
    assert list(tmp_path.iterdir()) == []
