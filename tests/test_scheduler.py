"""Many requests over one decoder: every answer is that of the request alone, whoever comes, goes or fails."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flashmoe.background_prefill import BackgroundPrefill
from flashmoe.decoder import Decoder
from flashmoe.errors import ContextError, ModelError, QueueFullError
from flashmoe.generation import GenerationRequest, Piece
from flashmoe.kv_cache import KVPool
from flashmoe.recorder import Recorder
from flashmoe.sampler import SamplingParams
from flashmoe.scheduler import Scheduler
from flashmoe.tokenizer import Tokenizer
from kernels.native import make_context
from storage.storage_errors import ReadError
from tests.engines import build_engine
from tests.tiny_models import FAMILIES, make_tiny_checkpoint

CONTEXT = 256


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four experts a token: a sum of two could not show its order."""
    made = tmp_path_factory.mktemp("model")
    return make_tiny_checkpoint(
        made, request.param, num_experts_per_tok=4, max_position_embeddings=CONTEXT
    )


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
            self.scheduler.background = BackgroundPrefill(decoder, make_context(2), slots=2)

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
        if self.scheduler.background is not None:
            self.scheduler.background.end()
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


def test_who_has_no_room_gives_way_and_comes_back_with_the_same_answer(folder: Path, alone: Bench) -> None:
    bench = Bench(folder, kv_tokens=CONTEXT)
    requests = [bench.submit(prompt(i, 50), 60) for i in range(4)]
    bench.run()
    assert bench.scheduler.totals.preempted > 0
    for i, request in enumerate(requests):
        check_ended(bench, request)
        assert request.tokens[50:] == alone.answer(prompt(i, 50), 60)
    bench.close()


def test_a_prompt_runs_only_what_no_other_has_run(folder: Path, alone: Bench) -> None:
    """The next turn, a shared beginning of one that is kept, and of one that runs just now."""
    bench = Bench(folder)
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
    assert second.tokens[len(turn) :] == alone.answer(turn, 4)
    for i, twin in enumerate(twins):
        assert twin.tokens[84:] == alone.answer(prompt(7, 80) + prompt(i, 4), 4)
    bench.close()


def test_cancelling_one_leaves_the_others_alone(folder: Path, alone: Bench) -> None:
    """While it waits, in its prompt beside others, alone in its prompt, and while it decodes."""
    bench = Bench(folder, most_running=3)
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
    assert staying.tokens[30:] == alone.answer(prompt(0, 30), 40)
    assert bench.scheduler.totals.cancelled == 3
    assert bench.pool.used_tokens == sum(bench.pool._counted.values()) and not bench.scheduler.running
    bench.close()


def test_a_request_that_fails_by_itself_takes_nobody_along(folder: Path, alone: Bench) -> None:
    class Unhappy:
        is_complete = False

        def allowed(self) -> None:
            return None

        def accept(self, token_id: int) -> None:
            raise ModelError("this grammar has had enough")

    bench = Bench(folder)
    staying = bench.submit(prompt(0, 10), 12)
    pieces: list[Piece] = []
    bench.scheduler.submit(prompt(1, 10), SamplingParams(max_tokens=9), pieces.append, constraint=Unhappy())
    bench.run()
    assert pieces[-1].finish_reason == "error" and isinstance(pieces[-1].error, ModelError)
    assert staying.tokens[10:] == alone.answer(prompt(0, 10), 12)
    assert bench.scheduler.totals.failed == 1
    bench.close()


@pytest.mark.parametrize("when", ["prompt", "decode", "background"])
def test_after_an_error_of_the_drive_it_goes_on(
    folder: Path, alone: Bench, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    bench = Bench(folder, slots=4)
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
    assert again.tokens[20:] == alone.answer(prompt(0, 20), 30)
    bench.close()


def test_too_many_too_long_and_unknown_are_refused_at_once(folder: Path) -> None:
    bench = Bench(folder, most_running=1, most_waiting=2)
    for _ in range(2):
        bench.submit([5], 2)
    with pytest.raises(QueueFullError, match="2 requests wait already") as full:
        bench.submit([5], 2)
    assert full.value.retry_after_s > 0
    bench.run()
    with pytest.raises(ContextError, match=f"{CONTEXT + 1} tokens, the context holds {CONTEXT}"):
        bench.submit([5] * (CONTEXT + 1), 2)
    with pytest.raises(ContextError, match="no tokens"):
        bench.submit([], 2)
    with pytest.raises(ModelError, match="id 99999"):
        bench.submit([99999], 2)
    bench.close()


def test_a_full_context_ends_the_answer(folder: Path) -> None:
    bench = Bench(folder)
    request = bench.submit(prompt(0, CONTEXT - 3), 50)
    bench.run()
    check_ended(bench, request, "context")
    assert len(request.tokens) == CONTEXT + 1
    bench.close()


def test_a_thread_of_its_own_serves_whoever_submits_and_drains_at_the_end(folder: Path, alone: Bench) -> None:
    bench = Bench(folder, most_running=3, most_waiting=99)
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
            assert request.tokens[10 + 5 * i :] == alone.answer(prompt(i, 10 + 5 * i), 6)
    with pytest.raises(QueueFullError, match="shutting down"):
        bench.submit([5], 1)
    bench.close()


def test_a_bug_of_ours_ends_who_meets_it_and_nobody_else(
    folder: Path, alone: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a step, and before the first: a server must not stand still."""
    bench = Bench(folder)
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
    assert third.tokens[9:] == alone.answer(prompt(2, 9), 4)
    bench.close()


def test_stopping_without_patience_cancels_what_is_left(folder: Path) -> None:
    bench = Bench(folder)
    bench.scheduler.start()
    requests = [bench.submit(prompt(i, 40), 200) for i in range(6)]
    while not requests[0].generated:
        time.sleep(0.001)
    bench.scheduler.stop()
    for request in requests:
        assert request.is_finished
    assert any(request.stats.finish_reason == "cancelled" for request in requests)
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
    assert not bench.scheduler._left_behind and not bench.scheduler.running
    bench.close()
