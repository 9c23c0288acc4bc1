"""Routing traces as files: hostile .npz, checks of a trace's numbers, what a recorder writes, the command."""

import io
import json
import os
import signal
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines import build_engine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of

from flashmoe import cli
from flashmoe.documents import Document, in_turn, read_documents
from flashmoe.engine import Engine
from flashmoe.errors import ConfigError, TraceError
from flashmoe.npz import StreamedArray, read_npz, write_npz
from flashmoe.trace import TraceRecorder, load_trace

ROOT = Path(__file__).parent.parent
SEVERAL_FILES = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
DTYPES = st.sampled_from(["u1", "i1", "<u2", "<i4", "<i8", "<u8", "<f2", "<f4", "<f8", "?"])


def npy(array: Any, **options: Any) -> bytes:
    """As numpy itself writes it."""
    out = io.BytesIO()
    np.lib.format.write_array(out, np.asanyarray(array), **options)
    return out.getvalue()


def npy_of(header: str, data: bytes = b"", version: int = 1) -> bytes:
    text = header.encode("latin-1")
    return (
        b"\x93NUMPY"
        + bytes((version, 0))
        + struct.pack("<H" if version == 1 else "<I", len(text))
        + text
        + data
    )


def header(descr: str = "|u1", fortran: bool = False, shape: str = "(3,)") -> str:
    return f"{{'descr': '{descr}', 'fortran_order': {fortran}, 'shape': {shape}, }}\n"


def zip_of(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def complaint(path: Path, **options: Any) -> str:
    """What is wrong with a file, which is one line that names it."""
    with pytest.raises(TraceError) as caught:
        read_npz(path, **options)
    text = str(caught.value)
    assert text.startswith(str(path))
    assert "\n" not in text
    return text


# .npz


@SEVERAL_FILES
@given(
    st.dictionaries(
        st.from_regex(r"[a-z_]{1,12}", fullmatch=True),
        DTYPES.flatmap(lambda dtype: arrays_of.arrays(dtype, arrays_of.array_shapes(min_dims=0, min_side=0))),
        min_size=1,
        max_size=4,
    )
)
def test_what_is_written_is_read_by_us_and_by_numpy(tmp_path: Path, arrays: dict[str, Any]):
    path = tmp_path / "a.npz"
    write_npz(path, arrays)
    ours = read_npz(path)
    with np.load(path, allow_pickle=False) as theirs:
        assert set(ours) == set(theirs.files) == set(arrays)
        for name, array in arrays.items():
            assert ours[name].dtype == theirs[name].dtype == array.dtype
            np.testing.assert_array_equal(ours[name], array)
            np.testing.assert_array_equal(theirs[name], array)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_what_numpy_writes_is_read(compressed: bool, version: tuple[int, int], tmp_path: Path):
    arrays = {
        "a": np.arange(24.0).reshape(2, 3, 4),
        "names": np.array(["é", "long name"]),
        "one": np.int64(7),
    }
    method = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
    members = {f"{name}.npy": npy(array, version=version) for name, array in arrays.items()}
    read = read_npz(zip_of(tmp_path / "a.npz", members, method))
    for name, array in arrays.items():
        np.testing.assert_array_equal(read[name], array)


def test_arrays_are_written_from_pieces_and_the_same_ones_give_the_same_file(tmp_path: Path):
    whole = np.arange(1000, dtype=np.int16).reshape(10, 100)
    for name in ("a.npz", "b.npz"):
        pieces = (whole[row : row + 3].tobytes() for row in range(0, 10, 3))
        write_npz(tmp_path / name, {"x": StreamedArray(whole.dtype, whole.shape, pieces)})
    np.testing.assert_array_equal(read_npz(tmp_path / "a.npz")["x"], whole)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_a_writer_that_fails_leaves_the_old_file(tmp_path: Path):
    def pieces() -> Any:
        yield b"ab"
        raise KeyboardInterrupt

    path = tmp_path / "a.npz"
    write_npz(path, {"x": np.arange(3)})
    with pytest.raises(KeyboardInterrupt):
        write_npz(path, {"x": StreamedArray(np.dtype("u1"), (4,), pieces())})
    assert read_npz(path)["x"].tolist() == [0, 1, 2]
    assert [file.name for file in tmp_path.iterdir()] == ["a.npz"]


class Mine:
    """Unpickling one would run `mark`."""

    def __reduce__(self) -> Any:
        return (os.mkdir, ("was unpickled",))


def test_pickled_objects_are_refused_and_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    path = zip_of(tmp_path / "a.npz", {"x.npy": npy(np.array([Mine()], dtype=object))})
    assert "dtype '|O'" in complaint(path)
    assert not (tmp_path / "was unpickled").exists()


@pytest.mark.parametrize(
    ("member", "said"),
    [
        (b"", "does not begin as one"),
        (b"PK\x03\x04 not numpy", "does not begin as one"),
        (npy_of(header(), b"abc", version=4), "format version 4.0"),
        (npy_of(header(), b"ab"), "needs 3 bytes, it holds 2"),
        (npy_of(header(), b"abcd"), "needs 3 bytes, it holds 4"),
        (npy_of(header(shape="(99999999999999999,)"), b"abc"), "needs 99999999999999999 bytes"),
        (npy_of(header(shape="(9999999999999999999999,)"), b"abc"), "which is none"),
        (npy_of(header(shape="(-1,)"), b"abc"), "numpy did not write"),
        (npy_of(header(shape="(3,,)"), b"abc"), "which is none"),
        (npy_of(header(shape="(1,1,1,1,1,1,1,1,3)"), b"abc"), "which is none"),
        (npy_of(header("<U0", shape="(999999999999999,)")), "dtype '<U0'"),
        (npy_of(header("|S3"), b"abcabcabc"), "dtype '|S3'"),
        (npy_of(header("|V1"), b"abc"), "dtype '|V1'"),
        (npy_of(header(">u2"), b"abcdef"), "dtype '>u2'"),
        (npy_of(header("<M8[ns]"), bytes(24)), "dtype '<M8[ns]'"),
        (npy_of(header(fortran=True, shape="(3, 1)"), b"abc"), "Fortran order"),
        (npy_of(header("<U1", shape="(1,)"), b"\xff\xff\xff\xff"), "no text"),
        (npy_of(header("|b1"), b"\x00\x01\x02"), "neither true nor false"),
        (npy_of(header("").replace("''", "[('a', '<i4')]"), bytes(4)), "did not write"),
        (npy_of(header().replace("{", "{'descr': '|u1', "), b"abc"), "did not write"),
        (npy_of("{'descr': '|u1', 'shape': (3,)}", b"abc"), "did not write"),
        (npy_of("{'descr': '|u1' 'fortran_order': False, 'shape': (3,)}", b"abc"), "did not write"),
        (npy_of("__import__('os').mkdir('x')"), "did not write"),
        (npy_of("{" * 9000), "did not write"),
        (npy_of("{" + " " * 9000 + "'"), "did not write"),
        (npy_of(header() + " " * 20_000, version=2), "header of 2"),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\xff{", "header of 4294967295 bytes"),
        (npy_of(header())[:20], "truncated within its header"),
    ],
)  # fmt: skip
def test_an_array_that_is_not_as_numpy_writes_it_is_one_line(member: bytes, said: str, tmp_path: Path):
    assert said in complaint(zip_of(tmp_path / "a.npz", {"x.npy": member}))


@pytest.mark.parametrize("name", ["x.txt", "../x.npy", "a/x.npy", "a\\x.npy", ".npy", "x.npy/"])
def test_members_that_are_no_arrays_are_refused(name: str, tmp_path: Path):
    assert "is no array" in complaint(zip_of(tmp_path / "a.npz", {"good.npy": npy([1]), name: npy([1])}))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_an_array_that_is_there_twice_is_refused(tmp_path: Path):
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", npy([1]))
        archive.writestr("x.npy", npy([2]))
    assert "'x.npy' is there twice" in complaint(path)


def patched(path: Path, at_entry: int, at_local: int, value: bytes) -> Path:
    """A field of the first member, in the zip's directory and before the member itself."""
    data = bytearray(path.read_bytes())
    entry = data.index(b"PK\x01\x02")
    data[entry + at_entry : entry + at_entry + len(value)] = value
    data[at_local : at_local + len(value)] = value
    path.write_bytes(data)
    return path


def test_an_encrypted_array_is_refused(tmp_path: Path):
    path = patched(zip_of(tmp_path / "a.npz", {"x.npy": npy([1])}), 8, 6, b"\x01\x00")
    assert "save it without a password" in complaint(path)


def test_an_unusual_compression_is_refused(tmp_path: Path):
    path = zip_of(tmp_path / "a.npz", {"x.npy": npy([1])}, zipfile.ZIP_BZIP2)
    assert "compressed by method 12" in complaint(path)


def test_sizes_that_deflate_cannot_reach_are_refused_before_anything_is_allocated(tmp_path: Path):
    size = 4_000_000_000
    bomb = npy_of(header(shape=f"({size - 80},)"))
    path = patched(zip_of(tmp_path / "a.npz", {"x.npy": bomb}), 24, 22, struct.pack("<I", size))
    assert "unpack to 4000000000: impossible" in complaint(path)


def test_a_bomb_that_is_possible_meets_the_limit_of_all_arrays_together(tmp_path: Path):
    zeros = npy(np.zeros(30_000_000, dtype=np.uint8))
    path = zip_of(tmp_path / "a.npz", {"x.npy": zeros, "y.npy": zeros}, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 100_000
    assert "the limit is 40000000" in complaint(path, limit_bytes=40_000_000)
    assert list(read_npz(path, ["x"], limit_bytes=40_000_000)) == ["x"]  # what is not wanted does not count


def test_a_size_that_is_larger_than_what_comes_is_a_truncated_array(tmp_path: Path):
    there = npy_of(header(shape="(60000,)"), bytes(100))
    promised = len(there) - 100 + 60000
    path = zip_of(tmp_path / "a.npz", {"x.npy": there}, zipfile.ZIP_DEFLATED)
    path = patched(path, 24, 22, struct.pack("<I", promised))
    assert "truncated" in complaint(path) or "damaged" in complaint(path)


def test_a_changed_byte_is_noticed(tmp_path: Path):
    path = zip_of(tmp_path / "a.npz", {"x.npy": npy(np.arange(100))})
    data = bytearray(path.read_bytes())
    data[300] ^= 1
    path.write_bytes(data)
    assert "Bad CRC-32" in complaint(path)


def test_a_table_of_contents_for_millions_is_not_even_read(tmp_path: Path):
    many = zip_of(tmp_path / "many.npz", {f"{i}.npy": b"" for i in range(3000)})
    assert "table of contents" in complaint(many)
    some = zip_of(tmp_path / "some.npz", {f"{i}.npy": npy([1]) for i in range(65)})
    assert "holds 65 arrays" in complaint(some)
    assert "holds 0 arrays" in complaint(zip_of(tmp_path / "none.npz", {}))


def test_a_file_cut_anywhere_is_one_line(tmp_path: Path):
    whole = zip_of(tmp_path / "a.npz", {"x.npy": npy(np.arange(9)), "y.npy": npy([1])}).read_bytes()
    cut = tmp_path / "cut.npz"
    for length in range(len(whole)):
        cut.write_bytes(whole[:length])
        complaint(cut)


def test_a_file_that_is_not_there_is_one_line(tmp_path: Path):
    assert "No such file" in complaint(tmp_path / "none.npz")
    assert "cannot be read" in complaint(tmp_path)


@SEVERAL_FILES
@given(st.data())
def test_random_changes_give_arrays_or_one_line(tmp_path: Path, data: st.DataObject):
    path = tmp_path / "a.npz"
    write_npz(path, {"x": np.arange(9, dtype=np.int16), "names": np.array(["a", "bc"])})
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        read_npz(path)
    except TraceError as error:
        assert "\n" not in str(error)


@SEVERAL_FILES
@given(st.binary(max_size=300), st.sampled_from([b"", b"PK\x05\x06" + bytes(18), b"\x93NUMPY\x01\x00"]))
def test_random_bytes_are_one_line(tmp_path: Path, content: bytes, extra: bytes):
    path = tmp_path / "a.npz"
    path.write_bytes(content + extra)
    complaint(path)
    zip_of(path, {"x.npy": extra + content})
    try:
        read_npz(path)
    except TraceError as error:
        assert "\n" not in str(error)


# Checks of a trace


def small(**changes: Any) -> dict[str, Any]:
    """4 tokens, 2 layers, top-2 of 8, two sequences; a change to None leaves an array out."""
    arrays: dict[str, Any] = {
        "experts": np.array(
            [[[0, 1], [2, 3]], [[1, 4], [3, 2]], [[5, 6], [0, 7]], [[6, 5], [7, 0]]], np.uint8
        ),
        "weights": np.full((4, 2, 2), 0.5, np.float16),
        "scores": np.full((4, 2, 8), 0.125, np.float16),
        "token": np.array([3, 1, -1, 4], np.int32),
        "phase": np.array([0, 0, 1, 1], np.uint8),
        "seq_offsets": np.array([0, 3, 4]),
        "forward_offsets": np.array([0, 2, 3, 4]),
        "dataset": np.array(["code", "prose"]),
        "num_experts": np.array(8),
        "meta": np.array('{"format": 1}'),
    } | changes
    return {name: array for name, array in arrays.items() if array is not None}


def written(path: Path, arrays: dict[str, Any]) -> Path:
    write_npz(path, {name: np.asarray(array) for name, array in arrays.items()})
    return path


def test_a_trace_comes_back_as_it_was_written(tmp_path: Path):
    arrays = small()
    trace = load_trace(written(tmp_path / "mine.npz", arrays))
    assert (trace.name, trace.num_experts, trace.layers, trace.top_k, len(trace)) == ("mine", 8, 2, 2, 4)
    assert trace.datasets == ("code", "prose")
    for ours, name in (
        (trace.experts, "experts"),
        (trace.weights, "weights"),
        (trace.scores, "scores"),
        (trace.tokens, "token"),
        (trace.seq_offsets, "seq_offsets"),
        (trace.forward_offsets, "forward_offsets"),
    ):
        np.testing.assert_array_equal(ours, arrays[name])
    assert trace.scores is not None
    assert trace.scores.dtype == np.float16


def test_scores_can_be_left_in_the_file(tmp_path: Path):
    path = written(tmp_path / "a.npz", small())
    assert load_trace(path, with_scores=False).scores is None
    with_room_for_the_rest = sum(array.nbytes for array in small(scores=None).values()) + 10 * 128
    assert load_trace(path, with_scores=False, limit_bytes=with_room_for_the_rest).weights is not None


def test_a_foreign_trace_needs_only_ids_and_sequences(tmp_path: Path):
    arrays = {"experts": small()["experts"], "seq_offsets": np.array([0, 4])}
    trace = load_trace(written(tmp_path / "foreign.npz", arrays))
    assert trace.datasets == ("foreign",)
    assert trace.weights is trace.scores is trace.tokens is None
    assert trace.forward_offsets.tolist() == [0, 1, 2, 3, 4]


def test_phase_stands_for_missing_borders_of_passes(tmp_path: Path):
    arrays = small(forward_offsets=None, seq_offsets=np.array([0, 4]), dataset=np.array(["x"]))
    assert load_trace(written(tmp_path / "a.npz", arrays)).forward_offsets.tolist() == [0, 2, 3, 4]


@pytest.mark.parametrize(("largest", "experts"), [(7, 8), (8, 16), (31, 32), (47, 48), (63, 64), (159, 160)])
def test_the_number_of_experts_of_a_foreign_trace_is_guessed(largest: int, experts: int, tmp_path: Path):
    ids = np.array([[[0, largest]]], np.uint8)
    path = written(tmp_path / "a.npz", {"experts": ids, "seq_offsets": np.array([0, 1])})
    assert load_trace(path).num_experts == experts


def with_ids(row: int, layer: int, ids: list[int]) -> Any:
    experts = small()["experts"].copy()
    experts[row, layer] = ids
    return experts


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"experts": None}, "has no array experts; a trace has"),
        ({"seq_offsets": None}, "has no array seq_offsets"),
        ({"experts": np.zeros((4, 2, 2))}, "experts should be integers of shape [tokens, layers, top-k]"),
        ({"experts": np.zeros((4, 4), np.uint8)}, "experts should be integers of shape"),
        ({"experts": np.zeros((0, 2, 2), np.uint8)}, "at least one token"),
        ({"experts": with_ids(2, 1, [8, 1])}, "row 2, layer 1 chose [8, 1]; experts go from 0 to 7"),
        ({"experts": with_ids(3, 0, [4, 4])}, "row 3, layer 0 chose an expert twice: [4, 4]"),
        ({"experts": small()["experts"].astype(np.int8) - 1}, "chose [-1, 0]; experts go from 0"),
        ({"seq_offsets": np.array([0, 3])}, "seq_offsets should rise from 0 to the 4 rows"),
        ({"seq_offsets": np.array([0, 3, 2, 4])}, "seq_offsets should rise"),
        ({"seq_offsets": np.array([1, 3, 4])}, "seq_offsets should rise"),
        ({"seq_offsets": np.array([4])}, "at least two integers"),
        ({"seq_offsets": np.array([0, 2**64 - 1, 4], np.uint64)}, "seq_offsets should rise"),
        # Each difference is positive, for it comes round.
        ({"seq_offsets": np.array([0, 2**63 - 1, 1 - 2**63, -1, 4])}, "seq_offsets should rise"),
        ({"forward_offsets": np.array([0, 2, 4])}, "a sequence begins at row 3"),
        ({"forward_offsets": np.array([0, 9])}, "forward_offsets should rise from 0 to the 4 rows"),
        ({"weights": np.full((4, 2, 3), 0.5)}, "weights should be floats of shape [4, 2, 2]"),
        ({"weights": np.full((4, 2, 2), 1)}, "weights should be floats"),
        ({"weights": np.full((4, 2, 2), np.nan)}, "row 0, layer 0 has weights that are no finite numbers"),
        ({"scores": np.full((4, 2, 7), 0.1)}, "scores should be floats of shape [4, 2, 8]"),
        ({"scores": np.full((4, 2, 8), np.inf)}, "has scores that are no finite numbers"),
        ({"token": np.array([1, 2, 3])}, "token should be 4 integers"),
        ({"token": np.array([-2, 1, 1, 1])}, "token should be ids from 0"),
        ({"token": np.array([2**40, 1, 1, 1])}, "token should be ids from 0"),
        ({"phase": np.array([0, 1, 2, 1])}, "phase should be 0 for prefill"),
        ({"dataset": np.array(["one"])}, "dataset should be 2 names"),
        ({"dataset": np.array([1, 2])}, "dataset should be 2 names"),
        ({"num_experts": np.array(1)}, "num_experts should be from top-k 2"),
        ({"num_experts": np.array([8, 8])}, "num_experts should be one integer"),
        ({"num_experts": np.array(4)}, "experts go from 0 to 3"),
        ({"meta": np.array("[[[")}, "meta should be one text of JSON"),
        ({"meta": np.array(3)}, "meta should be one text of JSON"),
        ({"meta": np.array('{"format": 2}')}, "trace format 2, this flashmoe knows 1; update it"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_trace_is_one_line(changes: dict[str, Any], said: str, tmp_path: Path):
    path = written(tmp_path / "a.npz", small(**changes))
    with pytest.raises(TraceError) as caught:
        load_trace(path)
    assert said in str(caught.value)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["gpt-oss-20b", "olmoe-1b-7b", "gemma-4-26b-a4b-top6"])
def test_published_traces_load(name: str):
    path = ROOT.parent / "shared" / "traces" / f"{name}.npz"
    if not path.is_file():
        pytest.skip(f"{path.name} is not here")
    trace = load_trace(path)
    assert trace.num_experts == {"gpt-oss-20b": 32, "olmoe-1b-7b": 64}.get(name, 128)
    assert len(trace.datasets) == len(trace.seq_offsets) - 1


# Recording


def recorder_of(engine: Engine, folder: Path | None = None) -> TraceRecorder:
    c = engine.decoder.config
    recorder = TraceRecorder(c.num_moe_layers, c.num_experts, c.num_experts_per_tok, spool_folder=folder)
    engine.decoder.observer = recorder
    return recorder


def test_a_recorded_run_is_what_the_model_routed(tmp_path: Path):
    """Against transformers, on a model whose second layer has no experts; a prompt, then two tokens alone."""
    pytest.importorskip("transformers", reason="transformers is the oracle")
    from test_parity import QWEN, save_random_model

    model = save_random_model(tmp_path / "m", "Qwen3Moe", QWEN | dict(head_dim=8, mlp_only_layers=[1]))
    ids = [5, 17, 80, 3, 44, 21]
    with torch.no_grad():
        logits = model(torch.tensor([ids]), output_router_logits=True).router_logits
    expected = torch.stack([layer.float() for layer in logits], dim=1).softmax(-1).numpy()  # [T, L, E]

    engine = build_engine(tmp_path / "m", slots=8)
    recorder = recorder_of(engine)
    recorder.begin_sequence("first")
    engine.prefill(ids[:4])
    engine.decode_one_token(ids[4])
    engine.decode_one_token(ids[5])
    recorder.save(tmp_path / "a.npz")
    trace = load_trace(tmp_path / "a.npz")
    assert trace.tokens is not None and trace.scores is not None and trace.weights is not None
    assert trace.tokens.tolist() == ids
    assert trace.forward_offsets.tolist() == [0, 4, 5, 6]
    assert (trace.layers, trace.num_experts, trace.datasets) == (2, 7, ("first",))
    np.testing.assert_allclose(trace.scores, expected, atol=1e-3)
    np.testing.assert_array_equal(trace.experts, np.argsort(-expected, axis=2)[:, :, :2])
    of_chosen = np.take_along_axis(expected, trace.experts.astype(np.int64), axis=2)
    np.testing.assert_allclose(trace.weights, of_chosen / of_chosen.sum(axis=2, keepdims=True), atol=1e-3)
    recorder.close()


def test_the_trace_in_memory_is_the_one_in_the_file(tiny_model: Path, tmp_path: Path):
    engine = build_engine(tiny_model)
    recorder = recorder_of(engine, tmp_path)
    for name, tokens in (("a", [5, 6, 7]), ("empty", []), ("b", [8, 9])):
        engine.reset()
        recorder.begin_sequence(name)
        for token in tokens:
            engine.decode_one_token(token)
    assert recorder.sequences == 2
    recorder.save(tmp_path / "t.npz")
    memory, file = recorder.trace("t"), load_trace(tmp_path / "t.npz")
    for name in ("experts", "weights", "scores", "tokens", "seq_offsets", "forward_offsets"):
        np.testing.assert_array_equal(getattr(memory, name), getattr(file, name))
    assert memory.datasets == file.datasets == ("a", "b")
    assert memory.seq_offsets.tolist() == [0, 3, 5]
    recorder.close()


def test_a_pass_that_was_cut_short_is_not_in_the_trace(tiny_model: Path):
    engine = build_engine(tiny_model)
    recorder = recorder_of(engine)
    calls = iter([None, None, KeyboardInterrupt()])

    def check() -> None:
        if (error := next(calls)) is not None:
            raise error

    engine.decode_one_token(5)
    with pytest.raises(KeyboardInterrupt):
        engine.decode_one_token(6, check)
    engine.decode_one_token(7)
    trace = recorder.trace("t")
    assert trace.tokens is not None
    assert trace.tokens.tolist() == [5, 7]
    assert trace.forward_offsets.tolist() == [0, 1, 2]
    recorder.close()


def test_a_pass_that_was_written_in_part_is_written_over(tiny_model: Path, monkeypatch: pytest.MonkeyPatch):
    """Ctrl-C between the ids and the weights of a token: the next token's ids go where its were."""
    engine, undisturbed = build_engine(tiny_model), build_engine(tiny_model)
    recorder, expected = recorder_of(engine), recorder_of(undisturbed)

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    for token in (5, 6, 7):
        undisturbed.decode_one_token(token)
    engine.decode_one_token(5)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(type(recorder._spools[1]), "append", lambda spool, *a: (
            interrupted() if spool is recorder._spools[1] else spool._file.write(a[0].data)))  # fmt: skip
        engine.decode_one_token(9)
    engine.decode_one_token(6)
    engine.decode_one_token(7)
    assert recorder.trace("t").experts.tolist() == expected.trace("t").experts.tolist()
    recorder.close()
    expected.close()


def test_recording_changes_no_logits(tiny_model: Path):
    plain, watched = build_engine(tiny_model), build_engine(tiny_model)
    recorder = recorder_of(watched)
    assert torch.equal(plain.prefill([5, 6, 7]), watched.prefill([5, 6, 7]))
    assert torch.equal(plain.decode_one_token(8), watched.decode_one_token(8))
    recorder.close()


def test_a_recorder_that_saw_nothing_has_nothing_to_save(tmp_path: Path):
    recorder = TraceRecorder(3, 8, 2)
    with pytest.raises(TraceError, match="no token ran"):
        recorder.save(tmp_path / "a.npz")
    recorder.close()


def test_more_experts_than_a_byte_counts():
    recorder = TraceRecorder(1, 300, 1)
    recorder.forward_begins([1])
    recorder.routed(0, torch.tensor([[299]], dtype=torch.int32), torch.ones(1, 1), torch.zeros(1, 300))
    recorder.forward_ends()
    assert recorder.trace("t").experts.tolist() == [[[299]]]
    recorder.close()


# Texts


def test_data_sets_come_in_turn_while_they_last():
    pairs = [("a", 1), ("a", 2), ("a", 3), ("b", 4), ("c", 5), ("c", 6)]
    assert list(in_turn(pairs)) == [("a", 1), ("b", 4), ("c", 5), ("a", 2), ("c", 6), ("a", 3)]


def test_documents_are_texts_prompts_or_conversations(tmp_path: Path):
    path = tmp_path / "some.jsonl"
    lines = [
        {"domain": "novels", "text": "one"}, {"category": "math", "turns": ["two", "three"]},
        {"prompt": "four"}, "five",
    ]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, lines)) + "\n", "utf-8")
    assert read_documents(path) == [
        Document("novels", "one"),
        Document("math", turns=("two", "three")),
        Document("some", turns=("four",)),
        Document("some", "five"),
    ]
    plain = tmp_path / "book.txt"
    plain.write_text("all\nof it", "utf-8")
    assert read_documents(plain) == [Document("book", "all\nof it")]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "holds no text"),
        ("{", "line 1 is not JSON"),
        ("3", "line 1 is neither a text nor an object"),
        ('{"turns": []}', 'line 1 has no "text"'),
        ('"a"\n{"turns": [1]}', 'line 2 has no "text"'),
        ('{"text": " "}', "holds no text"),
    ],
)
def test_a_file_without_usable_text_is_one_line(content: str, said: str, tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text(content, "utf-8")
    with pytest.raises(ConfigError, match=said):
        read_documents(path)


# The command


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    lines = [
        {"domain": "one", "text": "the expert that was used longest ago leaves first " * 4},
        {"domain": "one", "text": "what is the capital of France " * 4},
        {"domain": "two", "text": "user system assistant " * 9},
    ]
    path.write_text("\n".join(map(json.dumps, lines)), "utf-8")
    return path


def trace_command(model: Path, text: Path, output: Path, *options: str) -> list[str]:
    needed = ["--model", str(model), "--ram-budget", "8G", "--text", str(text), "--output", str(output)]
    return ["trace", *needed, *options]


def test_trace_records_texts_token_by_token_domains_in_turn(
    tiny_model: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    output = tmp_path / "mine.npz"
    options = ["--tokens-per-sequence", "16", "--max-tokens", "40"]
    assert cli.main(trace_command(tiny_model, texts, output, *options)) == 0
    trace = load_trace(output)
    assert trace.datasets == ("one", "two", "one")
    assert trace.seq_offsets.tolist() == [0, 16, 32, 40]
    assert len(trace.forward_offsets) == 41
    assert trace.num_experts == 8
    out, err = capsys.readouterr()
    assert out == ""
    assert "40 tokens in 3 sequences, 3 layers of 8 experts" in err
    meta = json.loads(str(read_npz(output, ["meta"])["meta"]))
    assert meta["format"] == 1
    assert (meta["model"], meta["model_type"], meta["policy"]) == ("mixtral", "mixtral", "learned")


def test_trace_in_prefill_chunks_routes_the_same(tiny_model: Path, texts: Path, tmp_path: Path):
    a, b = tmp_path / "a.npz", tmp_path / "b.npz"
    options = ["--tokens-per-sequence", "16", "--max-tokens", "32"]
    assert cli.main(trace_command(tiny_model, texts, a, *options)) == 0
    assert cli.main(trace_command(tiny_model, texts, b, *options, "--prefill")) == 0
    alone, together = load_trace(a), load_trace(b)
    assert together.forward_offsets.tolist() == [0, 16, 32]
    np.testing.assert_array_equal(alone.experts, together.experts)
    assert alone.scores is not None and together.scores is not None
    np.testing.assert_array_equal(alone.scores, together.scores)


def test_trace_answers_conversations(tiny_model: Path, tmp_path: Path):
    prompts, output = tmp_path / "p.jsonl", tmp_path / "p.npz"
    line = {"category": "chat", "turns": ["what is the capital", "of France"]}
    prompts.write_text(json.dumps(line), "utf-8")
    assert cli.main(trace_command(tiny_model, prompts, output, "--generate", "5")) == 0
    trace = load_trace(output)
    sizes = np.diff(trace.forward_offsets).tolist()
    assert trace.datasets == ("chat",)
    # A prompt, four steps for five tokens, the last of them with the next prompt, four steps.
    assert [size > 1 for size in sizes] == [True, False, False, False, False] * 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--output", "/no/such/folder/a.npz"], "no folder /no/such/folder to write a.npz to"),
        (["--text", "/no/such.txt"], "cannot read text from /no/such.txt"),
        (["--context", "16", "--tokens-per-sequence", "20"], "the context holds 16"),
    ],
)
def test_what_the_user_can_mend_is_one_line(
    options: list[str], said: str, tiny_model: Path, texts: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    command = trace_command(tiny_model, texts, tmp_path / "a.npz", "--quiet", *options)
    assert cli.main(command) == 1
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
    assert not (tmp_path / "a.npz").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has other signals")
def test_ctrl_c_keeps_what_has_run(tiny_model: Path, tmp_path: Path):
    text, output = tmp_path / "long.txt", tmp_path / "mine.npz"
    text.write_text("the expert that was used longest ago leaves first " * 20_000, "utf-8")
    command = trace_command(tiny_model, text, output, "--quiet", "--tokens-per-sequence", "64")
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED_AFTER_100, *command], cwd=ROOT, stderr=subprocess.PIPE
    )
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert err.startswith(b"interrupted; ")
    assert len(load_trace(output)) >= 100


INTERRUPTED_AFTER_100 = f"""
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests may have it ignored
from flashmoe.cli import main
from flashmoe.trace import TraceRecorder
ends = TraceRecorder.forward_ends
def forward_ends(recorder):
    ends(recorder)
    if len(recorder) == 100:
        os.kill(os.getpid(), {int(signal.SIGINT)})
TraceRecorder.forward_ends = forward_ends
sys.exit(main(sys.argv[1:]))
"""
