"""Prefetch: what guesses do in the cache, when they are asked for, and that they change nothing that is
computed."""

import queue
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from engines import build_engine, greedy
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from test_expert_cache import EXPERT_BYTES, ScriptedDrive, fetch, make_cache, stream
from torch import Tensor

from flashmoe import LLM, prefetch
from flashmoe.config import PREDICTOR_NAMES, RunConfig
from flashmoe.engine import Engine
from flashmoe.errors import BudgetError, ConfigError
from flashmoe.expert_cache import ExpertCache, _Read
from flashmoe.loader import load_engine, open_model, plan_model, share_slots
from flashmoe.predictors import PREDICTORS, ExpertMaps, LearnedPredictor, NextRouter, TransitionTable
from flashmoe.prefetch import Guess, Prefetcher, Trial
from storage.expert_reader import ReadPlan
from storage.read_queue import Completion, Request
from storage.storage_errors import ReadError


class PatientDrive(ScriptedDrive):
    """Demand reads arrive at once, guesses when `arrive` is called or when they are promoted. Guesses that
    have `begun` cannot be withdrawn."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: dict[Request, tuple[_Read, ReadPlan, memoryview, queue.SimpleQueue[Completion]]] = {}
        self.broken_guesses: set[tuple[int, int]] = set()
        self.begun = False

    def submit(self, tag, plan, slot, done, prefetch=False):  # type: ignore[no-untyped-def]
        if not prefetch:
            return super().submit(tag, plan, slot, done)
        request = Request(tag, plan, slot, done, True)
        self.waiting[request] = (tag, plan, slot, done)
        return request

    def arrive(self) -> None:
        for request in list(self.waiting):
            self.promote(request)

    def promote(self, request: Request) -> None:
        if request in self.waiting:
            tag, plan, slot, done = self.waiting.pop(request)
            healthy, self.broken = self.broken, self.broken | self.broken_guesses
            super().submit(tag, plan, slot, done)
            self.broken = healthy

    def cancel(self, request: Request) -> bool:
        if self.begun and request in self.waiting:
            tag, _, _, done = self.waiting.pop(request)
            done.put(Completion(tag, None, ReadError("cancelled"), EXPERT_BYTES // 2, 0.0))
        return not self.begun and self.waiting.pop(request, None) is not None


def make_patient(slots: int = 4, spare: int = 2, layers: int = 2):  # type: ignore[no-untyped-def]
    return make_cache(slots, layers, drive=PatientDrive(), spare=spare)


def test_a_guess_that_has_arrived_is_served_with_the_hits_and_is_a_miss_of_the_policy() -> None:
    cache, drive = make_patient()
    cache.prefetch([(0, 1), (0, 2)], 2)
    drive.arrive()
    assert fetch(cache, 0, [3, 2, 1]) == [2, 1, 3]
    assert drive.asked == [(0, 1), (0, 2), (0, 3)]
    c = cache.counters
    assert (c.hits, c.misses, c.prefetch_issued, c.prefetch_hits) == (0, 3, 2, 2)
    assert c.bytes_read == 3 * EXPERT_BYTES and c.prefetch_bytes_wasted == 0


def test_a_guess_still_in_flight_becomes_a_demand_read() -> None:
    cache, drive = make_patient()
    cache.prefetch([(0, 1)], 2)
    assert fetch(cache, 0, [2, 1]) == [1, 2]
    assert cache.counters.prefetch_late == 1 and drive.asked == [(0, 1), (0, 2)]


def test_a_wrong_guess_evicts_nothing_and_its_slot_is_free_again() -> None:
    cache, drive = make_patient()
    fetch(cache, 0, [0, 1])
    fetch(cache, 1, [0, 1])
    for arrives, begun in ((True, False), (False, False), (False, True)):
        cache.prefetch([(0, 6), (0, 7)], 2)
        drive.begun = begun
        if arrives:
            drive.arrive()
        fetch(cache, 0, [0, 1])
        assert cache.resident == {(0, 0), (0, 1), (1, 0), (1, 1)}
    stream(cache, 1, [0, 1])  # a prefill takes every spare slot
    assert len(cache._free) == 2
    c = cache.counters
    assert (c.prefetch_wasted, c.prefetch_cancelled) == (2, 4)
    assert c.prefetch_bytes_wasted == 2 * EXPERT_BYTES + 2 * (EXPERT_BYTES // 2)


def test_only_what_is_not_in_memory_is_asked_for_and_no_more_than_there_is_room() -> None:
    cache, drive = make_patient()
    fetch(cache, 0, [0, 1])
    cache.prefetch([(0, 0), (1, 4)], 1)
    cache.prefetch([(1, 4), (1, 5), (1, 6)], 9)
    assert [request.tag.key for request in drive.waiting] == [(1, 4), (1, 5)]
    plain, _ = make_cache(4)
    plain.prefetch([(0, 0)], 1)  # no spare slots, no guesses
    assert plain.counters.prefetch_issued == 0


@pytest.mark.parametrize("arrives", [True, False])
def test_a_guess_that_cannot_be_read_is_nobodys_error_and_is_read_again_when_asked_for(arrives: bool) -> None:
    cache, drive = make_patient()
    drive.broken_guesses = {(0, 1), (0, 2)}
    cache.prefetch([(0, 1), (0, 2)], 2)
    if arrives:
        drive.arrive()
    assert sorted(fetch(cache, 0, [1, 3])) == [1, 3]
    assert cache.counters.prefetch_failed == (2 if arrives else 1)
    drive.broken = {(0, 4)}
    cache.prefetch([(0, 4)], 1)
    with pytest.raises(ReadError):  # asked for, it is an error like any other
        fetch(cache, 0, [4])
    assert sorted(fetch(cache, 0, [1, 2, 3, 5])) == [1, 2, 3, 5]


def test_a_guess_whose_request_was_never_noted_is_read_again_and_gives_its_slot_back() -> None:
    """Ctrl-C between taking a slot and noting the request: asked for, the slot was lost."""
    cache, drive = make_patient()
    cache.prefetch([(0, 1)], 2)
    cache._guesses[0, 1].guess = None
    assert sorted(fetch(cache, 0, [1, 2])) == [1, 2]
    drive.arrive()
    stream(cache, 1, [0, 1])
    cache.evict_all()
    assert len(cache._free) == cache.slots


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_mix_of_events_and_guesses_loses_no_slot_and_keeps_to_the_capacity(data: st.DataObject) -> None:
    slots, spare = data.draw(st.integers(3, 12)), data.draw(st.integers(0, 4))
    cache, drive = make_patient(slots, spare)
    plain, sick = make_patient(slots, spare)
    experts, failed = st.lists(st.integers(0, 7), min_size=1, max_size=3, unique=True), False
    for _ in range(data.draw(st.integers(1, 10))):
        layer, routed = data.draw(st.integers(0, 1)), data.draw(experts)
        event = fetch if data.draw(st.booleans()) else stream
        drive.broken_guesses = {(layer, expert) for expert in data.draw(experts)}
        drive.broken = sick.broken = {(layer, routed[0])} if data.draw(st.integers(0, 4)) == 0 else set()
        cache.prefetch([(data.draw(st.integers(0, 1)), expert) for expert in data.draw(experts)], 9)
        drive.begun = data.draw(st.booleans())
        if data.draw(st.booleans()):
            drive.arrive()
        for each in (cache, plain):
            try:
                assert sorted(event(each, layer, routed)) == sorted(routed)
            except ReadError:
                failed = True
                assert drive.broken
        assert len(cache.resident) <= slots
        c, without = cache.counters, plain.counters
        assert failed or (c.hits, c.misses) == (without.hits, without.misses)
        staging = len(cache._guesses) + len(cache._staged) + len(cache._cancelled)
        assert len(cache._free) + len(cache._residents) + staging == slots + spare and staging <= spare
        assert set(cache._residents) == cache.resident
    for each in (cache, plain):
        each.close()
        assert len(each._free) == slots + spare


class Anything:
    """Guesses experts of all layers at random."""

    def __init__(self) -> None:
        self.random = random.Random(0)

    def forward_begins(self, token_ids: Sequence[int]) -> None:
        pass

    def predict(self, layer: int, x: Tensor, routed: Sequence[int], scores: Sequence[float]) -> list[Guess]:
        return [Guess(self.random.randrange(3), self.random.randrange(8), 1.0) for _ in range(6)]


def add_prefetcher(engine: Engine, kind: str, monkeypatch: pytest.MonkeyPatch) -> Prefetcher:
    decoder = engine.decoder
    config, weights = decoder.config, decoder._weights
    predictor = {
        "next router": lambda: NextRouter(config, weights, decoder.kernels),
        "two layers ahead": lambda: NextRouter(config, weights, decoder.kernels, horizon=2),
        "transitions": lambda: TransitionTable(config),
        "maps": lambda: ExpertMaps(config, decoder.embed),
        "learned": lambda: LearnedPredictor(config),
        "anything": Anything,
    }[kind]()
    decoder.prefetcher = Prefetcher(predictor, 4)
    monkeypatch.setattr(decoder.prefetcher._clock, "reads_that_fit", lambda cache: 4)
    return decoder.prefetcher


KINDS = ("next router", "two layers ahead", "transitions", "maps", "learned", "anything")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("broken", [False, True])
def test_tokens_hits_and_misses_are_the_same_with_guesses_and_without(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, kind: str, broken: bool
) -> None:
    prompts = ([5, 9, 200, 30, 7, 41], [17] * 40)
    plain = build_engine(tiny_model, slots=6, spare=3)
    expected = [greedy(plain, prompt, 20) for prompt in prompts]
    engine = build_engine(tiny_model, slots=6, spare=3)
    add_prefetcher(engine, kind, monkeypatch)
    cache = engine.decoder.experts
    if broken:  # a drive that fails whenever it reads ahead
        submit, guessed = cache._reads.submit, set[int]()
        read_run = cache._reader.read_run

        def note(tag, plan, slot, done, prefetch=False):  # type: ignore[no-untyped-def]
            (guessed.add if prefetch else guessed.discard)(id(plan.runs[0]))
            return submit(tag, plan, slot, done, prefetch=prefetch)

        def read_or_fail(run, *args):  # type: ignore[no-untyped-def]
            if id(run) in guessed:
                raise ReadError("broken")
            return read_run(run, *args)

        monkeypatch.setattr(cache._reads, "submit", note)
        monkeypatch.setattr(cache._reader, "read_run", read_or_fail)
    assert [greedy(engine, prompt, 20) for prompt in prompts] == expected
    with_guesses, without = cache.counters, plain.decoder.experts.counters
    assert (with_guesses.hits, with_guesses.misses) == (without.hits, without.misses)
    c = with_guesses
    assert c.prefetch_issued > 0 and (c.prefetch_failed > 0) == broken
    assert not broken or c.prefetch_hits == 0
    for each in (engine, plain):
        each.decoder.experts.close()


def test_a_trial_says_whether_guessing_pays_and_asks_again_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch, "VERDICT_TOKENS", 10)
    for with_it, without, verdict in ((1.0, 1.2, True), (1.2, 1.0, False), (1.0, 1.0, False)):
        trial = Trial()
        for _ in range(2 * prefetch.TURNS * prefetch.TURN_TOKENS):
            trial.token_took(with_it if trial.on else without)
        assert trial.on == verdict and trial.gain == 1 - with_it / without
        for _ in range(10):
            assert trial.on == verdict
            trial.token_took(9.0)
        assert trial.on  # a new trial begins


def test_the_next_router_guesses_better_than_chance(tiny_model: Path) -> None:
    engine = build_engine(tiny_model)
    decoder = engine.decoder
    predictor = NextRouter(decoder.config, decoder._weights, decoder.kernels)
    right, guessed = [], {}

    class Watcher:
        def forward_begins(self, token_ids: Sequence[int]) -> None:
            pass

        def routed(
            self, cache: ExpertCache, layer: int, x: Tensor, routed: Sequence[int], scores: Sequence[float]
        ) -> None:
            if layer in guessed:
                right.append(len(guessed[layer].intersection(routed)) / len(routed))
            guesses = predictor.predict(layer, x, routed, scores)
            guessed.update({layer + 1: {guess.expert for guess in guesses}} if guesses else {})
            assert all(guess.layer == layer + 1 and 0 < guess.confidence <= 1 for guess in guesses)

        def forward_ends(self) -> None:
            pass

    decoder.prefetcher = Watcher()  # type: ignore[assignment]
    greedy(engine, [5, 6, 7], 30)
    assert sum(right) / len(right) > 2 * 2 / 8


class Times:
    """What the prefetcher reads off a cache: 10 ms a read, `busy_s` of demand reads."""

    seconds_per_read, demand_busy_s = 0.010, 0.0


def test_guesses_are_bounded_by_the_time_that_demand_reads_leave_the_drive(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now_s = 0.0
    monkeypatch.setattr("flashmoe.prefetch.time.perf_counter", lambda: now_s)
    for elapsed_s, busy_s, fit in ((0.030, 0.005, 3), (0.030, 0.030, 0), (0.012, 0.004, 1)):
        clock, times = prefetch._IdleClock(), Times()
        for _ in range(300):
            reads = clock.reads_that_fit(times)  # type: ignore[arg-type]
            now_s += elapsed_s
            times.demand_busy_s += busy_s
        assert reads == fit + prefetch.BEYOND_IDLE
    times.seconds_per_read = 0.0  # nothing has been read yet
    assert clock.reads_that_fit(times) == 0  # type: ignore[arg-type]


def test_maps_are_kept_and_read_again(tiny_model: Path, tmp_path: Path) -> None:
    engine = build_engine(tiny_model)
    decoder = engine.decoder
    maps = ExpertMaps(decoder.config, decoder.embed)
    decoder.prefetcher = Prefetcher(maps, 4)
    decoder.prefetcher._clock.reads_that_fit = lambda cache: 4  # type: ignore[method-assign]
    greedy(engine, [5, 9, 200, 30], 12)
    maps.save(tmp_path / "maps.safetensors")
    again = ExpertMaps(decoder.config, decoder.embed)
    again.load(tmp_path / "maps.safetensors")
    assert (again._maps == maps._maps).all() and again._kept == maps._kept == 11
    (tmp_path / "other").write_bytes(b"nonsense")
    with pytest.raises(ConfigError, match="no expert maps"):
        again.load(tmp_path / "other")
    save_file({"maps": again._maps[:9, :1].copy(), "prompts": again._prompts[:9]}, tmp_path / "foreign")
    with pytest.raises(ConfigError, match="another model"):
        again.load(tmp_path / "foreign")


def test_an_llm_with_guesses_says_the_same_and_reports_them(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_model(tiny_model)
    monkeypatch.setattr("flashmoe.loader.MAX_STAGING", 3)
    kept = []
    for how in ("off", "3", "auto"):
        run = RunConfig("100%", prefetch=how)
        plan = replace(plan_model(opened, run), slots=16)
        loaded = load_engine(opened, plan, run)
        kept.append(greedy(loaded.engine, [7, 8, 9, 100], 16))
        assert (loaded.engine.decoder.prefetcher is None) == (how == "off")
        assert loaded.cache.slots == 16 and loaded.cache._residency.spare == (0 if how == "off" else 1)
        loaded.cache.close()
    assert kept[0] == kept[1] == kept[2]
    for scope, slots in (("layer", 16), ("layer", 5)):
        run = RunConfig("100%", scope=scope)
        plan = replace(plan_model(opened, run), slots=slots)
        if slots == 5:
            with pytest.raises(BudgetError, match="5 slots for 3 layers"):
                load_engine(opened, plan, run)
        else:
            cache = load_engine(opened, plan, run).cache
            assert (cache._residency.slots, cache._residency.spare) == (15, 1)
            cache.close()


def test_where_every_expert_has_a_slot_there_is_nothing_to_guess(tiny_model: Path) -> None:
    opened, run = open_model(tiny_model), RunConfig("100%", prefetch="auto")
    plan = plan_model(opened, run)
    assert (plan.slots, plan.staging_slots) == (plan.experts, 0)
    for slots, staging in ((plan.experts, 0), (plan.experts - 1, 1)):
        loaded = load_engine(opened, replace(plan, slots=slots), run)
        assert (loaded.cache._residency.slots, loaded.cache._residency.spare) == (slots - staging, staging)
        assert (loaded.engine.decoder.prefetcher is None) == (staging == 0)
        loaded.cache.close()


def test_guesses_take_no_slot_that_a_layer_needs_to_run(tiny_model: Path) -> None:
    """Where each layer had slots for its top-k and no more, guesses made a budget too small that was not."""
    opened = open_model(tiny_model)
    config = replace(opened.config, num_experts_per_tok=8)
    plan = replace(plan_model(opened, RunConfig("100%")), experts=100)
    run = RunConfig(prefetch="auto", scope="layer")
    shared = [share_slots(replace(plan, slots=slots), config, run).staging_slots for slots in (23, 24, 25)]
    assert shared == [0, 0, 1], "3 layers of top-8"
    anywhere = share_slots(replace(plan, slots=24), config, replace(run, scope="global"))
    assert anywhere.staging_slots == 1


def test_what_a_predictor_holds_is_in_the_plan(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashmoe.loader.host.rss_bytes", lambda: 1 << 20)
    opened = open_model(tiny_model)
    off = plan_model(opened, RunConfig(prefetch="off")).process_bytes
    config = opened.config
    built: dict[str, object] = {
        "transitions": TransitionTable(config), "learned": LearnedPredictor(config),
        "maps": ExpertMaps(config, lambda ids: Tensor()),
    }  # fmt: skip
    for name in PREDICTOR_NAMES:
        counted = plan_model(opened, RunConfig(prefetch="auto", predictor=name)).process_bytes - off
        arrays = vars(built[name]).values() if name in built else ()
        held = sum(array.nbytes for array in arrays if isinstance(array, np.ndarray))
        assert 0.8 * held <= counted <= 1.4 * held, name
    assert plan_model(opened, RunConfig(prefetch="off", predictor="maps")).process_bytes == off


def test_every_predictor_there_is_can_be_asked_for_by_name(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tuple(PREDICTORS) == PREDICTOR_NAMES
    monkeypatch.setattr("flashmoe.api.plan_model", lambda *given: replace(plan_model(*given), slots=16))
    kinds = []
    with LLM(tiny_model, context=64, prefetch="2", predictor="maps") as llm:
        for name in (None, *PREDICTOR_NAMES):
            llm.use_policy("lfru", predictor=name)
            assert llm.engine.decoder.prefetcher is not None
            kinds.append(type(llm.engine.decoder.prefetcher.predictor))
        assert llm.plan.staging_slots == 1
        llm.use_policy("lfru", prefetch="off")
        assert llm.plan.staging_slots == 0
    assert kinds == [ExpertMaps, NextRouter, TransitionTable, ExpertMaps, LearnedPredictor]
    with pytest.raises(ConfigError, match="unknown predictor 'dice'; known are next-router, transitions"):
        RunConfig(predictor="dice")


@pytest.mark.parametrize("bad", ["", "0", "-1", "65", "on", "2.5", 3])
def test_a_bad_prefetch_option_is_an_error(bad: object) -> None:
    with pytest.raises(ConfigError, match="prefetch"):
        RunConfig(prefetch=bad)  # type: ignore[arg-type]
