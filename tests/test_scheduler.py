"""Many requests over one decoder: every answer is that of the request alone, whoever comes, goes or fails."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashmoe.background_prefill import BackgroundPrefill
from flashmoe.batch import next_tokens
from flashmoe.decoder import Decoder, Stretch
from flashmoe.errors import ContextError, ModelError, QueueFullError
from flashmoe.generation import GenerationRequest, Piece
from flashmoe.kv_cache import KVPool
from flashmoe.queue_pace import UNKNOWN_S, QueuePace
from flashmoe.recorder import Recorder
from flashmoe.sampler import SamplingParams
from flashmoe.scheduler import Scheduler
from flashmoe.session_store import SessionStore
from flashmoe.tokenizer import Tokenizer
from kernels.native import make_context
from storage.storage_errors import ReadError
from tests.engines import build_engine
from tests.tiny_models import FAMILIES, make_tiny_checkpoint

CONTEXT = 256


# What a layer may be beside the plain one.
KINDS: dict[str, dict[str, Any]] = {
    **{family: {} for family in sorted(FAMILIES)},
    "mixtral, window": {"sliding_window": 16},
    "qwen3_moe, dense layer": {"mlp_only_layers": [1]},
    "qwen2_moe, dense layer, windows": {
        "mlp_only_layers": [0], "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1,
    },
    "olmoe, clipped": {"clip_qkv": 0.5},
}  # fmt: skip


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four experts a token: a sum of two could not show its order."""
    made, family = tmp_path_factory.mktemp("model"), request.param.split(",")[0]
    return make_tiny_checkpoint(
        made, family, num_experts_per_tok=4, max_position_embeddings=CONTEXT, **KINDS[request.param]
    )


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model, for what does not depend on its kind."""
    made = tmp_path_factory.mktemp("one")
    return make_tiny_checkpoint(made, num_experts_per_tok=4, max_position_embeddings=CONTEXT)


@pytest.fixture(scope="module")
def alone_one(one: Path) -> Iterator["Bench"]:
    bench = Bench(one, slots=None, background=False, most_running=1)
    yield bench
    bench.close()


class Bench:
    """A scheduler over `slots` of the 24 experts, and what it said."""

    def __init__(
        self, folder: Path, slots: int | None = 10, kv_tokens: int = 4 * CONTEXT, most_running: int = 4,
        background: bool = True, policy: str = "lru", **options: Any,
    ) -> None:  # fmt: skip
        self.engine = build_engine(folder, slots=slots, policy=policy, context=CONTEXT)
        decoder = self.engine.decoder
        assert isinstance(decoder, Decoder)
        self.decoder, self.pieces = decoder, dict[int, list[Piece]]()
        self.pool = KVPool(decoder.config, CONTEXT, kv_tokens)
        self.scheduler = Scheduler(
            decoder, self.pool, Tokenizer(folder),
            lambda stats: Recorder(stats, lambda: decoder.experts.counters, lambda _: None),
            most_running, **options,
        )  # fmt: skip
        if background:
            self.scheduler.use_background(BackgroundPrefill(decoder, make_context(2), slots=2))

    def submit(self, prompt: list[int], tokens: int, **options: Any) -> GenerationRequest:
        pieces: list[Piece] = []
        params = SamplingParams(max_tokens=tokens, **options)
        request = self.scheduler.submit(prompt, params, pieces.append)
        self.pieces[request.number] = pieces
        return request

    def run(self) -> None:
        while self.scheduler.step():
            pass

    def answer(self, prompt: list[int], tokens: int, **options: Any) -> list[int]:
        request = self.submit(prompt, tokens, **options)
        self.run()
        return request.tokens[len(prompt) :]

    def close(self) -> None:
        self.scheduler.stop()
        self.scheduler.use_background(None)
        self.decoder.experts.close()


@pytest.fixture(scope="module")
def alone(folder: Path) -> Iterator[Bench]:
    """One request at a time, every expert resident, no prompt beside anything."""
    bench = Bench(folder, slots=None, background=False, most_running=1)
    yield bench
    bench.close()


def prompt(seed: int, length: int) -> list[int]:
    return [(seed * 31 + i * i * 7 + i) % 200 + 3 for i in range(length)]


def check_ended(bench: Bench, request: GenerationRequest, reason: str = "length") -> None:
    pieces = bench.pieces[request.number]
    assert [p.finish_reason for p in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].finish_reason == reason == request.stats.finish_reason
    assert [p.token_id for p in pieces if p.token_id is not None] == request.tokens[request.prompt_tokens :]
    assert "".join(p.text for p in pieces) == request.stats.text


@pytest.mark.parametrize("policy", ["lru", "learned"])
@pytest.mark.parametrize("slots", [4, 10, None])
def test_requests_that_come_at_any_time_say_what_they_say_alone(
    folder: Path, alone: Bench, slots: int | None, policy: str
) -> None:
    """Prompts of a token and of many, begun together and while others decode; with 4 slots no step of several
    has room for all its experts."""
    bench = Bench(folder, slots, policy=policy)
    lengths = [1, 40, 7, 90, 33, 3, 64]
    requests = []
    for i, length in enumerate(lengths):
        requests.append(bench.submit(prompt(i, length), 5 + 3 * i))
        for _ in range(i % 3):
            bench.scheduler.step()
    bench.run()
    for i, request in enumerate(requests):
        check_ended(bench, request)
        assert request.tokens[lengths[i] :] == alone.answer(prompt(i, lengths[i]), 5 + 3 * i)
    assert bench.scheduler.totals.finished == len(lengths)
    bench.close()


def test_sampling_does_not_depend_on_who_runs_beside(folder: Path, alone: Bench) -> None:
    options = {"temperature": 0.9, "seed": 5, "top_p": 0.9, "frequency_penalty": 0.5, "presence_penalty": 0.3}
    bench = Bench(folder)
    requests = [bench.submit(prompt(i, 20), 12, **options) for i in range(3)]
    bench.run()
    for i, request in enumerate(requests):
        assert request.tokens[20:] == alone.answer(prompt(i, 20), 12, **options)
    bench.close()


def test_who_has_no_room_gives_way_and_comes_back_with_the_same_answer(one: Path, alone_one: Bench) -> None:
    bench = Bench(one, kv_tokens=CONTEXT)
    requests = [bench.submit(prompt(i, 50), 60) for i in range(4)]
    bench.run()
    assert bench.scheduler.totals.preempted > 0
    for i, request in enumerate(requests):
        check_ended(bench, request)
        assert request.tokens[50:] == alone_one.answer(prompt(i, 50), 60)
    bench.close()


def test_a_prompt_runs_only_what_no_other_has_run(one: Path, alone_one: Bench) -> None:
    """The next turn, a shared beginning of one that is kept, and of one that runs just now."""
    bench = Bench(one)
    system = prompt(0, 60)
    first = bench.submit(system + prompt(1, 9), 8)
    bench.run()
    turn = first.tokens + prompt(2, 5)
    second, other = bench.submit(turn, 4), bench.submit(system + prompt(3, 30), 4)
    bench.run()
    assert second.stats.cached_tokens == len(first.tokens) - 1  # the last one was never run
    assert other.stats.cached_tokens == 60
    twins = [bench.submit(prompt(7, 80) + prompt(i, 4), 4) for i in range(3)]
    bench.run()
    assert [twin.stats.cached_tokens for twin in twins] == [0, 80, 80]
    assert second.tokens[len(turn) :] == alone_one.answer(turn, 4)
    for i, twin in enumerate(twins):
        assert twin.tokens[84:] == alone_one.answer(prompt(7, 80) + prompt(i, 4), 4)
    bench.close()


def test_cancelling_one_leaves_the_others_alone(one: Path, alone_one: Bench) -> None:
    """While it waits, in its prompt beside others, alone in its prompt, and while it decodes."""
    bench = Bench(one, most_running=3)
    staying = bench.submit(prompt(0, 30), 40)
    bench.scheduler.step()
    decoding = bench.submit(prompt(1, 5), 40)
    for _ in range(4):
        bench.scheduler.step()
    in_prompt, waiting = bench.submit(prompt(2, 90), 40), bench.submit(prompt(3, 9), 40)
    bench.scheduler.step()
    assert in_prompt.generated == 0 and decoding.generated > 0
    for request in (decoding, in_prompt, waiting):
        request.cancel()
    bench.run()
    for request in (decoding, in_prompt, waiting):
        check_ended(bench, request, "cancelled")
    check_ended(bench, staying)
    assert staying.tokens[30:] == alone_one.answer(prompt(0, 30), 40)
    assert bench.scheduler.totals.cancelled == 3
    assert bench.pool.used_tokens == sum(bench.pool._counted.values()) and not bench.scheduler.running
    bench.close()


class Unhappy:
    """A constraint that raises."""

    is_complete = False

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def allowed(self) -> None:
        return None

    def accept(self, token_id: int) -> None:
        raise self.error


class Panic(BaseException):
    """As a library in Rust raises."""


@pytest.mark.parametrize("error", [ModelError("enough"), ValueError("a bug"), Panic("unwrap")])
def test_a_request_that_fails_by_itself_takes_nobody_along(
    one: Path, alone_one: Bench, error: BaseException
) -> None:
    bench = Bench(one)
    bench.scheduler.start()
    staying, pieces = bench.submit(prompt(0, 10), 12), list[Piece]()
    params = SamplingParams(max_tokens=9)
    bench.scheduler.submit(prompt(1, 10), params, pieces.append, constraint=Unhappy(error))
    bench.scheduler.stop(drain_s=60)
    assert pieces[-1].finish_reason == "error" and str(error) in str(pieces[-1].error)
    check_ended(bench, staying)
    assert staying.tokens[10:] == alone_one.answer(prompt(0, 10), 12)
    assert bench.scheduler.totals.failed == 1
    bench.close()


@pytest.mark.parametrize("where", ["take", "decode", "background", "admit"])
def test_a_ctrl_c_anywhere_leaves_requests_that_can_go_on(
    one: Path, alone_one: Bench, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    bench = Bench(one, slots=6)
    first, second = bench.submit(prompt(0, 10), 20), bench.submit(prompt(1, 12), 20)
    for _ in range(3):
        bench.scheduler.step()
    third = bench.submit(prompt(2, 90), 5)
    target, name = {
        "take": (first, "take"), "decode": (bench.decoder.expert_ffn, "end"),
        "background": (bench.scheduler._lane.background.decoder.expert_ffn, "add"),  # type: ignore[union-attr]
        "admit": (bench.pool, "grow"),
    }[where]  # fmt: skip
    method, broken = getattr(target, name), [True]

    def interrupted(*arguments: Any) -> Any:
        if broken:
            broken.pop()
            raise KeyboardInterrupt
        return method(*arguments)

    monkeypatch.setattr(target, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        bench.run()
    bench.run()
    for request, length, count in ((first, 10, 20), (second, 12, 20), (third, 90, 5)):
        check_ended(bench, request)
        of_prompt = request.tokens[:length]
        assert request.tokens[length:] == alone_one.answer(of_prompt, count)
    assert bench.pool.used_tokens == sum(bench.pool._counted.values())
    assert len(bench.pool._counted) == len(bench.pool.kept)
    bench.close()


def test_closing_a_stream_from_within_a_step_is_seen_to_after_it(one: Path, alone_one: Bench) -> None:
    """As the garbage collector may do with one that was abandoned."""
    bench, victims = Bench(one), list[GenerationRequest]()

    def callback() -> bool:
        if victims:
            bench.scheduler.retire(victims.pop())
        return False

    pieces: list[Piece] = []
    staying = bench.scheduler.submit(
        prompt(0, 40), SamplingParams(max_tokens=12), pieces.append, cancelled=callback
    )
    leaving = bench.submit(prompt(1, 40), 12)
    bench.scheduler.step()
    victims.append(leaving)
    bench.run()
    assert staying.tokens[40:] == alone_one.answer(prompt(0, 40), 12)
    later = bench.submit(prompt(2, 30), 9)
    bench.run()
    assert later.stats.cached_tokens == 0
    assert later.tokens[30:] == alone_one.answer(prompt(2, 30), 9)
    bench.close()


def test_the_youngest_gives_way_even_if_its_prompt_is_under_way(one: Path, alone_one: Bench) -> None:
    bench = Bench(one, slots=6, kv_tokens=CONTEXT)
    oldest = bench.submit(prompt(0, 125), 100)
    for _ in range(2):
        bench.scheduler.step()
    youngest = bench.submit(prompt(1, 120), 4)
    assert bench.scheduler._lane is not None
    bench.scheduler._lane.run_beside = lambda decoding, step: step()  # type: ignore[method-assign, assignment]
    for _ in range(6):  # the chunk stands still; the oldest wants its third block
        bench.scheduler.step()
    assert bench.scheduler.totals.preempted > 0
    assert [running.request for running in bench.scheduler._running] == [oldest]
    del bench.scheduler._lane.run_beside
    bench.run()
    for request, length, count in ((oldest, 125, 100), (youngest, 120, 4)):
        assert request.tokens[length:] == alone_one.answer(request.tokens[:length], count)
    bench.close()


def test_conversations_that_are_dropped_while_another_decodes_are_on_disk(
    one: Path, alone_one: Bench, tmp_path: Path
) -> None:
    bench = Bench(one)
    bench.pool._store = store = SessionStore(tmp_path / "kept", 1 << 30, "ab" * 32)
    staying = bench.submit(prompt(9, 5), 250)
    turns = [bench.submit(prompt(0, 120), 4)]
    while not staying.is_finished:
        bench.scheduler.step()
        if turns[-1].is_finished and len(turns) < 9:
            turns.append(bench.submit(prompt(len(turns), 120), 4))
    bench.run()
    in_memory = {tuple(kv.tokens[:120]) for kv in bench.pool.kept}
    gone = [turn for turn in turns if tuple(turn.tokens[:120]) not in in_memory]
    assert len(turns) == 9 and gone
    for turn in gone:
        assert store.longest_prefix(turn.tokens)[1] == len(turn.tokens) - 1
    again = bench.submit([*gone[0].tokens, 5], 9)
    bench.run()
    assert again.stats.cached_tokens == len(gone[0].tokens) - 1
    assert again.tokens[-9:] == alone_one.answer([*gone[0].tokens, 5], 9)
    bench.pool.close()
    bench.close()


def test_nobody_waits_behind_one_who_waits_for_a_shared_beginning(one: Path) -> None:
    bench = Bench(one, most_running=3)
    decoding = bench.submit(prompt(9, 5), 200)
    bench.scheduler.step()
    bench.scheduler.step()
    bench.submit(prompt(0, 200) + [5], 2)
    bench.scheduler.step()
    waiting, other = bench.submit(prompt(0, 200) + [6], 2), bench.submit([7, 8, 9], 2)
    while not other.is_finished:
        bench.scheduler.step()
    assert not waiting.generated and not decoding.is_finished
    bench.run()
    assert waiting.stats.cached_tokens == 200
    bench.close()


@given(st.lists(st.integers(1, 900), min_size=1, max_size=8))
def test_of_prompts_the_oldest_goes_on_and_then_the_shortest_go_first(lengths: list[int]) -> None:
    class Fake:
        def __init__(self, missing: int) -> None:
            self.missing, self.pending = missing, list(range(missing))

    prompts: Any = [Fake(length) for length in lengths]
    work = next_tokens(prompts, 512)
    given_to = {id(running): len(tokens) for running, tokens in work}
    assert sum(given_to.values()) == min(512, sum(lengths))
    assert given_to[id(prompts[0])] >= min(lengths[0], 256)
    unfinished = [p.missing for p in prompts[1:] if given_to.get(id(p), 0) < p.missing]
    begun = [p.missing for p in prompts[1:] if given_to.get(id(p), 0)]
    assert not unfinished or max(begun, default=0) <= max(unfinished)


@pytest.mark.parametrize("when", ["prompt", "decode", "background"])
def test_after_an_error_of_the_drive_it_goes_on(
    one: Path, alone_one: Bench, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    bench = Bench(one, slots=4)
    reader = bench.decoder.experts._reader
    read, broken = reader.read_run, threading.Event()

    def read_run(*arguments: Any) -> int:
        if broken.is_set():
            raise ReadError("the drive is gone; plug it in again")
        return read(*arguments)

    monkeypatch.setattr(type(reader), "read_run", lambda self, *arguments: read_run(*arguments))
    first = bench.submit(prompt(0, 20), 30)
    if when != "prompt":
        bench.scheduler.step()
        bench.scheduler.step()
    if when == "background":
        bench.submit(prompt(1, 90), 5)
    broken.set()
    bench.scheduler.step()
    bench.run()
    broken.clear()
    check_ended(bench, first, "error")
    assert bench.scheduler.totals.failed == (2 if when == "background" else 1)
    again = bench.submit(prompt(0, 20), 30)
    bench.run()
    check_ended(bench, again)
    assert again.tokens[20:] == alone_one.answer(prompt(0, 20), 30)
    bench.close()


def test_too_many_too_long_and_unknown_are_refused_at_once(one: Path) -> None:
    bench = Bench(one, most_running=1, most_waiting=2)
    for _ in range(2):
        bench.submit([5], 2)
    with pytest.raises(QueueFullError, match="2 requests wait already") as full:
        bench.submit([5], 2)
    assert full.value.retry_after_s == UNKNOWN_S
    bench.run()
    with pytest.raises(ContextError, match=f"{CONTEXT + 1} tokens, the context holds {CONTEXT}"):
        bench.submit([5] * (CONTEXT + 1), 2)
    with pytest.raises(ContextError, match="no tokens"):
        bench.submit([], 2)
    with pytest.raises(ModelError, match="id 99999"):
        bench.submit([99999], 2)
    bench.close()


def test_a_full_queue_says_when_those_that_wait_will_have_begun(one: Path) -> None:
    """Whatever way they leave: done, or cancelled while they run or wait."""
    now_s = [0.0]
    bench = Bench(one, most_running=1, most_waiting=2)
    bench.scheduler.queue_pace = QueuePace(lambda: now_s[0])
    first = bench.submit([5], 2)
    bench.scheduler.step()
    now_s[0] += 12
    first.cancel()
    bench.run()
    second = bench.submit([6], 9)
    bench.scheduler.step()
    now_s[0] += 4
    third, fourth = bench.submit([7], 2), bench.submit([8], 2)
    with pytest.raises(QueueFullError) as full:
        bench.submit([9], 2)
    assert full.value.retry_after_s == 3 * 12.0
    fourth.cancel()
    bench.run()
    assert second.is_finished and third.is_finished and fourth.is_finished
    pace = bench.scheduler.queue_pace
    assert not pace._began and list(pace._took) == [12.0, 4.0, 0.0]
    bench.close()


def test_a_full_context_ends_the_answer(one: Path) -> None:
    bench = Bench(one)
    request = bench.submit(prompt(0, CONTEXT - 3), 50)
    bench.run()
    check_ended(bench, request, "context")
    assert len(request.tokens) == CONTEXT + 1
    bench.close()


def test_a_thread_of_its_own_serves_all_and_drains_at_the_end(one: Path, alone_one: Bench) -> None:
    bench = Bench(one, most_running=3, most_waiting=99)
    bench.scheduler.start()
    requests: dict[int, GenerationRequest] = {}

    def client(i: int) -> None:
        requests[i] = bench.submit(prompt(i, 10 + 5 * i), 6)
        if i % 3 == 2:
            requests[i].cancel()

    clients = [threading.Thread(target=client, args=[i]) for i in range(9)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()
    bench.scheduler.stop(drain_s=60)
    for i, request in requests.items():
        assert request.is_finished
        if i % 3 != 2:
            check_ended(bench, request)
            assert request.tokens[10 + 5 * i :] == alone_one.answer(prompt(i, 10 + 5 * i), 6)
    assert bench.answer([5], 1) == alone_one.answer([5], 1)  # whoever asks computes again
    bench.close()


def test_a_bug_of_ours_ends_who_meets_it_and_nobody_else(
    one: Path, alone_one: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a step, and before the first: a server must not stand still."""
    bench = Bench(one)
    broken = [True, True]

    def fails(method: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            if broken.pop():
                raise RuntimeError("a bug")
            return method(*arguments, **options)

        return call

    monkeypatch.setattr(bench.pool, "take", fails(bench.pool.take))
    bench.scheduler.start()
    first = bench.submit(prompt(0, 9), 4)
    while not first.is_finished:
        time.sleep(0.001)
    monkeypatch.undo()
    monkeypatch.setattr(bench.decoder, "forward_batch", fails(bench.decoder.forward_batch))
    second = bench.submit(prompt(1, 9), 4)
    while not second.is_finished:
        time.sleep(0.001)
    monkeypatch.undo()
    third = bench.submit(prompt(2, 9), 4)
    bench.scheduler.stop(drain_s=60)
    check_ended(bench, first, "error")
    check_ended(bench, second, "error")
    check_ended(bench, third)
    assert third.tokens[9:] == alone_one.answer(prompt(2, 9), 4)
    bench.close()


def test_stopping_without_patience_cancels_what_is_left(one: Path) -> None:
    bench = Bench(one)
    bench.scheduler.start()
    requests = [bench.submit(prompt(i, 40), 200) for i in range(6)]
    while not requests[0].generated:
        time.sleep(0.001)
    bench.scheduler.stop()
    for request in requests:
        assert request.is_finished
    assert any(request.stats.finish_reason == "cancelled" for request in requests)
    bench.close()


class WholeChunks:
    """A decoder that runs one prompt at a time, and takes 1 s for a chunk and 1/8 s for a step."""

    observer, runs_prompts_together = None, False

    def __init__(self, decoder: Decoder) -> None:
        self.decoder, self.now_s, self.passes = decoder, 0.0, list[list[int]]()

    def forward_batch(self, batch: Sequence[Stretch], check: Callable[[], None] | None = None) -> Tensor:
        self.passes.append([len(stretch.tokens) for stretch in batch])
        self.now_s += 1.0 if len(batch[0].tokens) > 1 else 0.125
        return self.decoder.forward_batch(batch, check)


def test_a_decoder_of_whole_chunks_runs_them_when_the_others_have_had_their_time(
    one: Path, alone_one: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(one, slots=None, background=False)
    whole = bench.scheduler.decoder = WholeChunks(bench.decoder)
    monkeypatch.setattr("flashmoe.scheduler.PREFILL_CHUNK", 16)
    clock = SimpleNamespace(perf_counter=lambda: whole.now_s, monotonic=time.monotonic)
    monkeypatch.setattr("flashmoe.scheduler.time", clock)
    first, second, long = prompt(1, 5), prompt(2, 5), prompt(3, 48)
    early = [bench.submit(first, 60), bench.submit(second, 60)]
    while whole.now_s < 4:  # what they owe each other is paid
        bench.scheduler.step()
    whole.passes.clear()
    late = [bench.submit(long, 3), bench.submit(prompt(4, 10), 3)]
    bench.run()
    # Two decode and two prompts wait: half of the time for each. Then one waits: a third.
    assert whole.passes[:10] == [[16], *[[1, 1]] * 8, [10]]
    chunks = [i for i, tokens in enumerate(whole.passes) if tokens[0] > 1]
    assert [whole.passes[i] for i in chunks] == [[16], [10], [16], [16]]
    assert chunks[:3] == [0, 9, 18] and chunks[3] in (35, 36)  # two thirds are no number of this machine's
    for request, tokens, count in zip([*early, *late], (first, second, long), (60, 60, 3), strict=False):
        assert request.tokens[len(tokens) :] == alone_one.answer(tokens, count)
    bench.close()


def test_what_a_chunk_owes_ends_with_those_it_was_owed_to(one: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(one, slots=None, background=False)
    whole = bench.scheduler.decoder = WholeChunks(bench.decoder)
    monkeypatch.setattr("flashmoe.scheduler.PREFILL_CHUNK", 16)
    clock = SimpleNamespace(perf_counter=lambda: whole.now_s, monotonic=time.monotonic)
    monkeypatch.setattr("flashmoe.scheduler.time", clock)
    early = bench.submit(prompt(1, 5), 3)
    while not early.generated:
        bench.scheduler.step()
    bench.submit(prompt(2, 20), 1)  # owes eight steps, of which there are two
    bench.run()
    later = bench.submit(prompt(3, 5), 9)
    while not later.generated:
        bench.scheduler.step()
    bench.submit(prompt(4, 10), 1)
    bench.scheduler.step()
    assert whole.passes[-2:] == [[10], [1]]
    bench.run()
    bench.close()


def test_what_is_one_token_short_decodes_with_the_others(one: Path) -> None:
    bench = Bench(one, slots=None, background=False)
    bench.answer(prompt(1, 40), 1)
    whole = bench.scheduler.decoder = WholeChunks(bench.decoder)
    bench.submit(prompt(2, 5), 9)
    bench.scheduler.step()
    bench.submit(prompt(1, 40), 2)  # all but its last token is kept
    bench.run()
    assert whole.passes[:2] == [[5], [1, 1]]
    bench.close()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_order_of_events(alone: Bench, folder: Path, data: st.DataObject) -> None:
    bench = Bench(
        folder, data.draw(st.sampled_from([4, 9, 24])), data.draw(st.sampled_from([CONTEXT, 3 * CONTEXT]))
    )
    requests: list[tuple[GenerationRequest, list[int], int]] = []
    for _ in range(data.draw(st.integers(1, 14))):
        match data.draw(st.sampled_from(["submit", "step", "step", "cancel"])):
            case "submit":
                shared = prompt(50, data.draw(st.sampled_from([0, 20, 70])))
                tokens = shared + prompt(data.draw(st.integers(0, 3)), data.draw(st.integers(1, 40)))
                count = data.draw(st.integers(1, 25))
                requests.append((bench.submit(tokens, count), tokens, count))
            case "step":
                bench.scheduler.step()
            case "cancel" if requests:
                requests[data.draw(st.integers(0, len(requests) - 1))][0].cancel()
    bench.run()
    for request, tokens, count in requests:
        assert request.is_finished
        expected = alone.answer(tokens, count)
        generated = request.tokens[len(tokens) :]
        assert generated == expected[: len(generated)]
        assert request.stats.finish_reason == "cancelled" or generated == expected
    assert bench.pool.used_tokens == sum(bench.pool._counted.values())
    assert bench.scheduler._lane is not None and not bench.scheduler._lane._left_behind
    assert not bench.scheduler.running
    bench.close()
