"""The packed folder from outside: a manifest from strangers, damaged files, and readers that check."""

import json
import queue
from pathlib import Path
from typing import Any

import pytest
from engines import build_engine
from tiny_models import make_tiny_checkpoint

from flashmoe.cli import main
from flashmoe.pack import PackOptions, pack
from storage.checkpoint import open_checkpoint
from storage.expert_file import MANIFEST_NAME, CheckedReader, describe_tensor, read_manifest, verify
from storage.expert_reader import Extent, open_reader, plan_read
from storage.host import allocate_aligned
from storage.read_queue import Completion, ReadQueue
from storage.storage_errors import CheckpointError, ReadError

EXPERT = "model.layers.1.block_sparse_moe.experts.5.packed"


@pytest.fixture(params=["int4", "bf16"])
def packed(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    source = make_tiny_checkpoint(tmp_path / "source")
    pack(source, tmp_path / "packed", PackOptions(request.param, "bf16", 1))
    return tmp_path / "packed"


def flip(path: Path, at: int, bits: int = 1) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ bits]))


def shard_of(packed: Path) -> Path:
    (path,) = packed.glob("*.safetensors")
    return path


def change(packed: Path, *where: str, to: Any) -> None:
    """Set one value of the manifest."""
    raw = json.loads((packed / MANIFEST_NAME).read_text())
    target = raw
    for key in where[:-1]:
        target = target[key]
    target[where[-1]] = to
    (packed / MANIFEST_NAME).write_text(json.dumps(raw))


# Damage


def test_a_flipped_byte_of_an_expert_is_found_by_verify_and_named(packed: Path) -> None:
    info = open_checkpoint(packed).tensors[EXPERT]
    verify(packed)
    flip(shard_of(packed), info.offset + info.nbytes - 1)  # of the padding: every byte counts
    with pytest.raises(
        CheckpointError, match=r"model-00001-of-00001\.safetensors: expert 5 of layer 1 is damaged: checksum"
    ):
        verify(packed)


def test_every_other_byte_is_checked_too(packed: Path) -> None:
    """Of dense tensors, headers, copied files, the index and the manifest itself."""
    dense = open_checkpoint(packed).tensors["model.norm.weight"].offset
    blank = shard_of(packed).read_bytes().index(b"}   ") + 2
    for path, at, bits, words in (
        (shard_of(packed), dense, 1, "tensor 'model.norm.weight' is damaged"),
        (shard_of(packed), blank, 0x29, "the header is damaged"),  # a tab for a space: JSON like before
        (packed / "tokenizer.json", 1, 0x2A, "tokenizer.json was changed"),
        (packed / "model.safetensors.index.json", 1, 0x2A, "index.json was changed"),
    ):
        flip(path, at, bits)
        with pytest.raises(CheckpointError, match=words):
            verify(packed)
        flip(path, at, bits)
    verify(packed)
    change(packed, "source", "name", to="another")
    with pytest.raises(CheckpointError, match=r"flashmoe\.json was changed after packing"):
        verify(packed)


def test_several_damages_are_counted(packed: Path) -> None:
    for expert in (3, 4):
        at = (
            open_checkpoint(packed).tensors[f"model.layers.0.block_sparse_moe.experts.{expert}.packed"].offset
        )
        flip(shard_of(packed), at)
    with pytest.raises(CheckpointError, match=r"expert 3 of layer 0 .* \(and 1 more\); pack the model again"):
        verify(packed)


def test_a_truncated_file_names_the_first_expert_that_is_not_whole(
    packed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    info = open_checkpoint(packed).tensors[EXPERT]
    with shard_of(packed).open("r+b") as file:
        file.truncate(info.offset + info.nbytes - 1)
    words = rf"model-00001-of-00001\.safetensors is truncated.*'{EXPERT}'"
    with pytest.raises(CheckpointError, match=words):
        verify(packed)
    assert main(["run", "--model", str(packed), "--prompt", "x"]) == 1
    assert EXPERT in capsys.readouterr().err


def test_a_missing_shard_and_a_missing_manifest_are_one_line(
    packed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard_of(packed).rename(packed / "elsewhere")
    assert main(["pack", "--verify", str(packed)]) == 1
    assert "model-00001-of-00001.safetensors is missing" in capsys.readouterr().err
    (packed / MANIFEST_NAME).unlink()
    assert main(["pack", "--verify", str(packed)]) == 1
    assert "is not a packed model" in capsys.readouterr().err


# At the read


@pytest.mark.parametrize("name", ["direct", "buffered", "mmap"])
def test_a_checked_reader_names_the_damaged_expert_and_gives_the_others(packed: Path, name: str) -> None:
    checkpoint, manifest = open_checkpoint(packed), read_manifest(packed)
    assert manifest is not None
    info = checkpoint.tensors[EXPERT]
    flip(shard_of(packed), info.offset + 70)
    reader = CheckedReader(open_reader(name, checkpoint.shards, checkpoint.shard_bytes), checkpoint, manifest)
    reads, done = ReadQueue(reader), queue.SimpleQueue[Completion]()
    for number in (4, 5, 6):
        other = checkpoint.tensors[f"model.layers.1.block_sparse_moe.experts.{number}.packed"]
        third = other.nbytes // 3
        extents = [Extent(other.shard, other.offset, third), Extent(other.shard, other.offset + third, third)]
        extents.append(Extent(other.shard, other.offset + 2 * third, other.nbytes - 2 * third))
        plan = plan_read(
            extents if number == 6 else [Extent(*extents[0][:2], other.nbytes)], checkpoint.shard_bytes
        )
        slot = None if reader.in_place else memoryview(allocate_aligned(plan.slot_bytes))
        reads.submit(number, plan, slot, done)
    found = {completion.tag: completion for completion in (done.get(timeout=20) for _ in range(3))}
    assert found[4].error is None and found[6].error is None
    assert isinstance(found[5].error, ReadError)
    assert "expert 5 of layer 1 is damaged: checksum" in str(found[5].error)
    reads.close()
    reader.close()


# A manifest from strangers


@pytest.mark.parametrize(
    "where, value, words",
    [
        (["format_version"], 2, "format_version 2; this flashmoe reads 1: update flashmoe"),
        (["format_version"], "1", "no format_version"),
        (["format_version"], True, "no format_version"),
        (["experts"], [], "experts is .., not an object"),
        (["experts", "format"], "int3", "experts.format is .* not one of int4"),
        (["experts", "layout"], "other", "experts.layout"),
        (["experts", "extent_bytes"], 4097, "multiple of 4096"),
        (["experts", "extent_bytes"], 2**60, "experts.extent_bytes"),
        (["experts", "hidden"], 1.5, "experts.hidden"),
        (["experts", "width"], -1, "experts.width"),
        (["source", "name"], None, "source.name is None, not text"),
        (["source", "revision"], 3, "source.revision"),
        (["dense", "format"], "int2", "dense.format"),
        (["error", "layers"], {}, "error.layers is .* not a list"),
        (["error", "layers"], [{"layer": "x"}], "error.layers.layer"),
        (["checksums", "algorithm"], "md5", "checksums.algorithm"),
        (["checksums", "tensors"], {"a": "XYZ"}, "16 hex digits"),
        (["checksums", "tensors"], 7, "checksums.tensors is 7, not an object"),
    ],
)
def test_a_manifest_that_is_not_as_it_should_be_is_refused_by_field(
    packed: Path, where: list[str], value: object, words: str
) -> None:
    change(packed, *where, to=value)
    with pytest.raises(CheckpointError, match=words):
        read_manifest(packed)


@pytest.mark.parametrize(
    "text", ["", "[1]", "{", '{"format_version": 1e999}', "[" * 100_000, '{"a": NaN}', "\xff"]
)
def test_a_manifest_that_is_no_object_is_refused(packed: Path, text: str) -> None:
    (packed / MANIFEST_NAME).write_text(text, "latin-1")
    with pytest.raises(CheckpointError, match=r"flashmoe\.json"):
        read_manifest(packed)


def test_a_manifest_without_end_is_refused_before_it_is_read(packed: Path) -> None:
    with (packed / MANIFEST_NAME).open("r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(CheckpointError, match="above the limit"):
        read_manifest(packed)


def test_a_folder_that_is_no_pack_has_no_manifest(tmp_path: Path) -> None:
    assert read_manifest(make_tiny_checkpoint(tmp_path / "plain")) is None


def test_a_manifest_that_promises_other_experts_than_the_config_is_a_model_error(packed: Path) -> None:
    change(packed, "experts", "extent_bytes", to=4096)
    with pytest.raises(Exception, match="the manifest asks for U8 .4096."):
        build_engine(packed)


def test_names_in_words() -> None:
    assert describe_tensor(EXPERT) == "expert 5 of layer 1"
    assert describe_tensor("lm_head.weight") == "tensor 'lm_head.weight'"


def test_check_reads_finds_the_flipped_byte_and_a_run_without_it_goes_on(
    packed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for expert in range(8):  # whatever the router chooses
        info = open_checkpoint(packed).tensors[f"model.layers.1.block_sparse_moe.experts.{expert}.packed"]
        flip(
            shard_of(packed), info.offset + info.nbytes - 1
        )  # of the padding, so that the weights stay sound
    command = ["run", "--model", str(packed), "--ram-budget", "8G", "--prompt", "x", "--max-tokens", "2"]
    assert main(command) == 0
    capsys.readouterr()
    assert main([*command, "--check-reads"]) == 1
    error = capsys.readouterr().err
    assert "model-00001-of-00001.safetensors: expert" in error and "of layer 1 is damaged" in error
