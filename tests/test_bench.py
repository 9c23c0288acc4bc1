"""The benchmark: its tokens, its arithmetic, and a run over a tiny model."""

import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flashmoe.bench import COLUMNS, DECODE_PREFIX, Bench, BenchResult, Repetition, context_for
from flashmoe.bench_text import BUILT_IN_TEXT, TokenText, read_prompts
from flashmoe.config import RunConfig
from flashmoe.errors import ConfigError, ContextError
from flashmoe.expert_slots import CacheCounters
from flashmoe.loader import load_engine, open_model, plan_model


class LetterTokenizer:
    """a is 1, b is 2 …; a text begins with 0."""

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return [0] * add_special_tokens + [ord(letter) - ord("a") + 1 for letter in text]


class RecordingEngine:
    """Notes what it is asked to run; each token costs a hit."""

    def __init__(self, counters: CacheCounters) -> None:
        self.calls: list[tuple[str, list[int]]] = []
        self.counters = counters

    def reset(self) -> None:
        self.calls.append(("reset", []))

    def reuse(self, tokens: list[int]) -> int:
        return 0

    def prefill(self, tokens: list[int]) -> None:
        self.calls.append(("prefill", tokens))
        self.counters.hits += len(tokens)

    def decode_one_token(self, token: int) -> None:
        self.calls.append(("decode", [token]))
        self.counters.hits += 1

    def settle(self) -> None:
        """Its counters know at once."""


def recording_bench() -> tuple[Bench, RecordingEngine]:
    counters = CacheCounters()
    engine = RecordingEngine(counters)
    loaded: Any = SimpleNamespace(
        engine=engine, cache=SimpleNamespace(counters=counters), probed=SimpleNamespace(read_mb_per_s=100.0)
    )
    unused: Any = None
    on_cpu: Any = SimpleNamespace(vram=None)
    return Bench("letters", unused, on_cpu, loaded), engine


def letters(*texts: str) -> TokenText:
    tokenizer: Any = LetterTokenizer()
    return TokenText(tokenizer, texts)


def test_a_text_goes_on_where_the_last_take_ended_and_wraps_around():
    text = letters("ab", "cde")
    assert text.take(4) == [0, 1, 2, 3]
    assert text.take(4) == [0, 4, 5, 1]
    assert text.take(1) == [0]


def test_an_empty_text_is_refused():
    with pytest.raises(ConfigError, match="empty"):
        letters("", "")


def test_the_built_in_text_is_long_enough_for_pp512():
    assert len(BUILT_IN_TEXT.split()) > 700


def test_every_repetition_starts_afresh_on_another_part_of_the_text():
    bench, engine = recording_bench()
    results = list(bench.run(letters("abcdef"), prompt_tokens=[3, 2], decode_tokens=[], repeat=2))
    assert [result.name for result in results] == ["pp3", "pp2"]
    assert engine.calls == [
        ("reset", []), ("prefill", [0, 1, 2]),
        ("reset", []), ("prefill", [0, 3, 4]),
        ("reset", []), ("prefill", [0, 5]),
        ("reset", []), ("prefill", [0, 6]),
    ]  # fmt: skip


def test_decoding_follows_the_text_and_its_prompt_is_not_counted():
    bench, engine = recording_bench()
    [result] = bench.run(letters("abcdefg" * 10), prompt_tokens=[], decode_tokens=[3], repeat=1)
    assert [kind for kind, _ in engine.calls] == ["reset", "prefill", "decode", "decode", "decode"]
    assert len(engine.calls[1][1]) == DECODE_PREFIX
    [repetition] = result.repetitions
    assert result.name == "tg3"
    assert (repetition.tokens, repetition.hits) == (3, 3)


def test_progress_is_told_of_every_repetition():
    bench, _ = recording_bench()
    told: list[str] = []
    list(bench.run(letters("abc"), [2], [1], 2, progress=told.append))
    assert told == ["pp2, 1 of 2", "pp2, 2 of 2", "tg1, 1 of 2", "tg1, 2 of 2"]


def repetition(seconds: float, stall_s: float = 0.0, bytes_read: int = 0) -> Repetition:
    return Repetition(
        tokens=10, seconds=seconds, hits=30, misses=10, bytes_read=bytes_read, stall_s=stall_s,
        read_s=2 * stall_s, drive_mb_per_s=100.0,
    )  # fmt: skip


def test_the_bound_is_the_drive_where_reading_takes_longer_than_computing():
    slow = repetition(seconds=4.0, stall_s=3.0, bytes_read=200_000_000)  # 2 s at 100 MB/s, 1 s of computing
    assert slow.tokens_per_s == 2.5
    assert slow.bound_tokens_per_s == 5.0
    assert slow.share_of_bound == 0.5
    assert slow.mb_per_token == 20.0
    assert slow.stall_share == 0.75
    assert slow.read_mb_per_s == pytest.approx(33.3, abs=0.1)  # 200 MB in the 6 s of reads in flight
    assert slow.hit_rate == 0.75


def test_the_bound_is_the_computing_where_everything_is_resident():
    assert repetition(seconds=2.0).share_of_bound == 1.0


def test_a_result_gives_median_and_spread_of_its_repetitions():
    result = BenchResult("tg10", (repetition(1.0), repetition(5.0), repetition(2.0)))
    assert result.median("tokens_per_s") == 5.0
    assert result.spread("tokens_per_s") == (2.0, 10.0)
    values = json.loads(json.dumps(result.as_dict()))
    assert values["tokens_per_s"] == 5.0
    assert [r["seconds"] for r in values["repetitions"]] == [1.0, 5.0, 2.0]


def test_the_context_holds_the_longest_test():
    assert context_for([128, 512], [32]) == 512
    assert context_for([8], [100]) == DECODE_PREFIX + 100
    assert context_for([1], []) == 16


def test_prompts_come_from_lines_of_json_or_a_whole_text(tmp_path: Path):
    lines = ["plain", {"prompt": "one"}, {"text": "two", "licence": "x"}, {"turns": ["three", "four"]}]
    jsonl, text = tmp_path / "p.jsonl", tmp_path / "p.txt"
    jsonl.write_text("\n\n".join(json.dumps(line) for line in lines) + "\n", "utf-8")
    text.write_text("one\ntwo\n", "utf-8")
    assert read_prompts(jsonl) == ["plain", "one", "two", "three", "four"]
    assert read_prompts(text) == ["one\ntwo\n"]


def test_a_line_separator_inside_a_prompt_does_not_end_its_line(tmp_path: Path):
    path = tmp_path / "p.jsonl"
    path.write_text('"one\u2028line"\n', "utf-8")
    assert read_prompts(path) == ["one\u2028line"]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b'"good"\n{"prompt": ', "line 2 is not JSON"),
        (b"7\n", "line 1 has no text"),
        (b'{"answer": "x"}\n', "line 1 has no text"),
        (b'{"turns": ["x", 1]}\n', "line 1 has no text"),
        (b"[" * 100_000, "line 1 is not JSON"),
        (b"\xff\xfe", "cannot read prompts"),
    ],
)
def test_a_file_of_prompts_that_cannot_be_used_is_an_error_with_its_line(
    tmp_path: Path, content: bytes, complaint: str
):
    path = tmp_path / "p.jsonl"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=complaint):
        read_prompts(path)


def test_a_missing_file_of_prompts_is_an_error(tmp_path: Path):
    with pytest.raises(ConfigError, match="cannot read prompts"):
        read_prompts(tmp_path / "none.txt")


def tiny_bench(folder: Path, context: int) -> tuple[Bench, TokenText]:
    run = RunConfig("8G", "lfu", "buffered", context)
    model = open_model(folder)
    plan = plan_model(model, run)
    bench = Bench("tiny", model, plan, load_engine(model, plan, run))
    return bench, TokenText(model.tokenizer, [BUILT_IN_TEXT])


def test_a_run_over_a_model_counts_its_experts(tiny_model: Path):
    bench, text = tiny_bench(tiny_model, context=128)
    try:
        prefill, decode = list(bench.run(text, [32], [16], repeat=2))
        cold, warm = prefill.repetitions
        assert cold.misses > 0
        assert cold.bytes_read > 0
        assert warm.misses < cold.misses
        [again] = bench.run(text, [32], [], repeat=2, cold=True)
        assert [one.hits for one in again.repetitions] == [0, 0]
        layers, top_k = 3, 2
        for one in decode.repetitions:
            assert one.hits + one.misses == layers * top_k * 16
        assert len(bench.row(decode)) == len(COLUMNS)
        assert "6 experts of 0.04 MB a token" in bench.bound_line()
        report = json.loads(json.dumps(bench.as_dict([prefill, decode])))
        assert report["policy"] == "lfu"
        assert report["probe"]["reader"] == "buffered"
        assert report["plan"]["slots"] == 24
        assert [test["test"] for test in report["tests"]] == ["pp32", "tg16"]
        assert report["tests"][0]["repetitions"][0]["misses"] == asdict(cold)["misses"]
    finally:
        bench.loaded.cache.close()


def test_a_test_longer_than_the_context_is_an_error(tiny_model: Path):
    bench, text = tiny_bench(tiny_model, context=16)
    try:
        with pytest.raises(ContextError, match="the context holds 16"):
            list(bench.run(text, [17], [], repeat=1))
    finally:
        bench.loaded.cache.close()
