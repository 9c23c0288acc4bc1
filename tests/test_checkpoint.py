"""Opening checkpoints: good ones as the safetensors library sees them, hostile ones refused by name."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from storage.checkpoint import INDEX_NAME, SINGLE_NAME, open_checkpoint
from storage.storage_errors import CheckpointError, ReadError, StorageError


def write_file(path: Path, header: Any, data: bytes = b"") -> Path:
    """A safetensors file with any header at all: an object to dump, or raw bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: str, shape: list[Any], begin: Any, end: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


ONE_BYTE = {"a": entry("U8", [1], 0, 1)}


def test_a_file_of_the_safetensors_library_opens_with_the_same_names_shapes_and_bytes(tmp_path: Path) -> None:
    arrays = {
        "up": np.arange(12, dtype=np.float32).reshape(3, 4),
        "down": np.arange(6, dtype=np.int64),
        "scalar": np.array(7, dtype=np.uint8),
        "empty": np.zeros((0, 5), dtype=np.float16),
    }
    save_file(arrays, tmp_path / SINGLE_NAME, metadata={"format": "pt"})
    checkpoint = open_checkpoint(tmp_path)
    assert set(checkpoint.tensors) == set(arrays)
    for name, array in arrays.items():
        info = checkpoint.tensors[name]
        assert (info.shape, info.nbytes, info.shard) == (array.shape, array.nbytes, 0)
        assert checkpoint.read_tensor(name) == array.tobytes()
    assert checkpoint.tensors["up"].dtype == "F32"
    assert checkpoint.shard_bytes == ((tmp_path / SINGLE_NAME).stat().st_size,)


def test_a_tensor_can_be_read_into_a_given_buffer(tmp_path: Path) -> None:
    write_file(tmp_path / SINGLE_NAME, {"a": entry("U8", [3], 0, 3), "b": entry("U8", [2], 3, 5)}, b"abcde")
    room = bytearray(b"........")
    open_checkpoint(tmp_path).read_tensor("b", memoryview(room)[4:6])
    assert room == b"....de.."


def test_shards_are_joined_by_their_index(tmp_path: Path) -> None:
    write_file(tmp_path / "two.safetensors", {"b": entry("U8", [2], 0, 2)}, b"bb")
    write_file(tmp_path / "one.safetensors", ONE_BYTE, b"a")
    write_index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    checkpoint = open_checkpoint(tmp_path)
    assert [path.name for path in checkpoint.shards] == ["one.safetensors", "two.safetensors"]
    assert (checkpoint.tensors["a"].shard, checkpoint.tensors["b"].shard) == (0, 1)
    assert checkpoint.read_tensor("b") == b"bb"


def test_symlinked_shards_are_followed_as_in_the_hugging_face_cache(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    write_file(tmp_path / "blobs" / "0a1b", ONE_BYTE, b"a")
    (tmp_path / "snapshot" / SINGLE_NAME).symlink_to("../blobs/0a1b")
    assert open_checkpoint(tmp_path / "snapshot").read_tensor("a") == b"a"
    (tmp_path / "blobs" / "0a1b").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing; download"):
        open_checkpoint(tmp_path / "snapshot")


def test_opening_reads_no_tensor_data(tmp_path: Path) -> None:
    path = write_file(tmp_path / SINGLE_NAME, {"huge": entry("U8", [2**40], 0, 2**40)})
    os.truncate(path, path.stat().st_size + 2**40)  # a sparse terabyte
    assert open_checkpoint(tmp_path).tensors["huge"].nbytes == 2**40


NOT_FILLED = r"needs \d+ bytes, its offsets"
BAD_OFFSETS = "data_offsets are not"
BAD_SHAPE = "shape is not a list of non-negative integers"


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": entry("U8", [4], 0, 3)}, b"xxx", NOT_FILLED),
        ({"a": entry("BF16", [4], 0, 4)}, b"xxxx", NOT_FILLED),
        ({"a": entry("F4", [3], 0, 1)}, b"x", "is no possible number of bytes"),
        ({"a": entry("U8", [2**32, 2**32], 0, 0)}, b"", "is no possible number of bytes"),
        ({"a": entry("U8", [2**62, 4, 0], 0, 0)}, b"", "is no possible number of bytes"),
        ({"a": entry("U8", [-1], 0, 1)}, b"x", BAD_SHAPE),
        ({"a": entry("U8", [True], 0, 1)}, b"x", BAD_SHAPE),
        ({"a": entry("U8", [1.0], 0, 1)}, b"x", BAD_SHAPE),
        ({"a": entry("U8", [2**64], 0, 1)}, b"x", BAD_SHAPE),
        ({"a": {"dtype": "U8", "shape": 1, "data_offsets": [0, 1]}}, b"x", BAD_SHAPE),
        ({"a": entry("U8", [1], False, True)}, b"x", BAD_OFFSETS),
        ({"a": entry("U8", [1], -1, 0)}, b"x", BAD_OFFSETS),
        ({"a": entry("U8", [1], 1, 0)}, b"x", BAD_OFFSETS),
        ({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1, 2]}}, b"x", BAD_OFFSETS),
        ({"a": {"dtype": "U8", "shape": [1]}}, b"x", BAD_OFFSETS),
        ({"a": entry("I3", [1], 0, 1)}, b"x", "unknown dtype 'I3'"),
        ({"a": {"shape": [1], "data_offsets": [0, 1]}}, b"x", "unknown dtype 'None'"),
        ({"a": [1, 2]}, b"", "entry is not an object"),
        ({"__metadata__": {"format": 1}}, b"", "__metadata__ must map strings to strings"),
        ({"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 1, 3)}, b"xxx", "tensors 'a' and 'b' overlap"),
        (
            {"a": entry("U8", [1], 0, 1), "b": entry("U8", [1], 2, 3)},
            b"xxx",
            "1 bytes before 'b' belong to no",
        ),
        ({"a": entry("U8", [1], 1, 2)}, b"xx", "1 bytes before 'a' belong to no tensor"),
        (ONE_BYTE, b"xyz", "2 bytes after the last tensor belong to no tensor"),
        ({"\x1b[2J": entry("I3", [1], 0, 1)}, b"x", r"tensor '\\x1b\[2J'"),
        (b'{"a":1,"a":2}', b"", "key 'a' appears twice"),
        (b"[]", b"", "does not begin with"),
        (b"", b"", "does not begin with"),
        (b'{"a":', b"", "not valid JSON"),
        (b'{"a":NaN}', b"", "NaN is not JSON"),
        (b'{"\xff":1}', b"", "not valid JSON"),
        (b'{"a":' + b"[" * 100_000, b"", "nested too deeply"),
        (b'{"a":' + b"9" * 5000 + b"}", b"", "not valid JSON"),
    ],
)
def test_a_malformed_header_is_refused(tmp_path: Path, header: Any, data: bytes, message: str) -> None:
    write_file(tmp_path / SINGLE_NAME, header, data)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


def test_a_truncated_shard_is_named_with_its_expected_and_actual_size(tmp_path: Path) -> None:
    path = write_file(tmp_path / SINGLE_NAME, {"a": entry("U8", [100], 0, 100)}, bytes(100))
    whole = path.stat().st_size
    os.truncate(path, whole - 1)
    with pytest.raises(CheckpointError, match=rf"{SINGLE_NAME} is truncated.* {whole} .* has {whole - 1};"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("size", [0, 7, 8, 20])
def test_a_file_cut_inside_its_header_is_truncated_too(tmp_path: Path, size: int) -> None:
    os.truncate(write_file(tmp_path / SINGLE_NAME, ONE_BYTE, b"a"), size)
    with pytest.raises(CheckpointError, match="truncated"):
        open_checkpoint(tmp_path)


def test_a_header_length_beyond_the_limit_is_refused_before_it_is_allocated(tmp_path: Path) -> None:
    path = tmp_path / SINGLE_NAME
    path.write_bytes((2**62).to_bytes(8, "little"))
    os.truncate(path, 2**40)
    with pytest.raises(CheckpointError, match="above 100000000"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "shard_name",
    [
        "../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "..\\x.safetensors", "C:x.safetensors",
        "model.bin", "..", "", "a\0.safetensors", "\x1b[2J.safetensors", 7, None, ["x.safetensors"],
    ],
)  # fmt: skip
def test_an_index_may_only_name_plain_safetensors_files(tmp_path: Path, shard_name: Any) -> None:
    write_index(tmp_path, {"a": shard_name})
    with pytest.raises(CheckpointError, match="is not a plain"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("index", [b"[]", b"{}", b'{"weight_map": []}', b'{"weight_map": {}}', b"garbage"])
def test_an_index_without_a_weight_map_is_refused(tmp_path: Path, index: bytes) -> None:
    (tmp_path / INDEX_NAME).write_bytes(index)
    with pytest.raises(CheckpointError, match=INDEX_NAME):
        open_checkpoint(tmp_path)


def test_an_index_beyond_the_limit_is_refused_before_it_is_read(tmp_path: Path) -> None:
    (tmp_path / INDEX_NAME).touch()
    os.truncate(tmp_path / INDEX_NAME, 2**40)
    with pytest.raises(CheckpointError, match="above the limit of 100000000"):
        open_checkpoint(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write_index(tmp_path, {"a": "gone.safetensors"})
    with pytest.raises(CheckpointError, match=r"gone\.safetensors is missing"):
        open_checkpoint(tmp_path)


def test_a_tensor_that_its_shard_does_not_hold_is_named(tmp_path: Path) -> None:
    write_file(tmp_path / "one.safetensors", ONE_BYTE, b"a")
    write_index(tmp_path, {"a": "one.safetensors", "lost": "one.safetensors"})
    with pytest.raises(CheckpointError, match=r"tensor 'lost' is not in its shard one\.safetensors"):
        open_checkpoint(tmp_path)
    write_file(tmp_path / "two.safetensors", {"b": entry("U8", [1], 0, 1)}, b"b")
    write_index(tmp_path, {"a": "two.safetensors", "b": "one.safetensors"})
    with pytest.raises(CheckpointError, match=r"tensor 'a' is not in its shard two\.safetensors"):
        open_checkpoint(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    write_file(tmp_path / "one.safetensors", {**ONE_BYTE}, b"a")
    write_file(
        tmp_path / "two.safetensors", {"a": entry("U8", [1], 0, 1), "b": entry("U8", [1], 1, 2)}, b"ab"
    )
    write_index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    with pytest.raises(CheckpointError, match=r"tensor 'a' is in two shards, one\.safetensors and two\.s"):
        open_checkpoint(tmp_path)


def test_a_folder_without_safetensors_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match="has neither model.safetensors nor model.safetensors.index.json"
    ):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="is not a folder"):
        open_checkpoint(tmp_path / "nowhere")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
@pytest.mark.parametrize("name", [SINGLE_NAME, INDEX_NAME])
def test_a_pipe_in_place_of_a_file_is_refused_instead_of_waited_for(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(CheckpointError, match="is not a regular file"):
        open_checkpoint(tmp_path)


def test_a_shard_cut_off_after_opening_is_a_short_read_with_its_numbers(tmp_path: Path) -> None:
    path = write_file(tmp_path / SINGLE_NAME, {"a": entry("U8", [100], 0, 100)}, bytes(100))
    checkpoint = open_checkpoint(tmp_path)
    begin = checkpoint.tensors["a"].offset
    os.truncate(path, begin + 40)
    with pytest.raises(ReadError, match=rf"{SINGLE_NAME}: short read: 40 of 100 bytes at offset {begin}"):
        checkpoint.read_tensor("a")


def test_an_unknown_tensor_is_named(tmp_path: Path) -> None:
    write_file(tmp_path / SINGLE_NAME, ONE_BYTE, b"a")
    with pytest.raises(CheckpointError, match="has no tensor 'b'"):
        open_checkpoint(tmp_path).read_tensor("b")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 200), at=st.integers(0, 200), junk=st.binary(max_size=12), seed=st.randoms())
def test_damaged_files_open_within_bounds_or_are_refused(
    tmp_path: Path, cut: int, at: int, junk: bytes, seed: Any
) -> None:
    """Whatever a few wrong bytes do to a file: a StorageError, or tensors that lie inside the file."""
    path = write_file(tmp_path / SINGLE_NAME, {"a": entry("U8", [9], 0, 9), "b": entry("BF16", [2], 9, 13)})
    damaged = bytearray(path.read_bytes() + bytes(13))
    damaged[at : at + cut % 8] = junk
    digits = [n for n, byte in enumerate(damaged) if chr(byte).isdigit()]
    if digits:
        damaged[seed.choice(digits)] = seed.choice(b"0123456789")
    path.write_bytes(damaged)
    try:
        checkpoint = open_checkpoint(tmp_path)
    except StorageError:
        return
    position = min((info.offset for info in checkpoint.tensors.values()), default=len(damaged))
    for info in sorted(checkpoint.tensors.values(), key=lambda info: (info.offset, info.nbytes)):
        assert info.offset == position
        position += info.nbytes
    assert position == len(damaged)
