"""Traces, the rules of residency, replay, and the bound that Belady sets to every policy."""

import random
from collections.abc import Callable, Iterator
from functools import cache
from itertools import combinations
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_policies import lrb
from cache_policies.belady import NEVER, Belady, next_uses
from cache_policies.paper_network import PaperWeights
from cache_policies.policy import CachePolicy, ExpertId, Geometry
from cache_policies.registry import REPLAY_NAMES, make_policy
from cache_policies.replay import ReplayCounts, replay, serving_order
from cache_policies.residency import ChunkPlan, Residency
from cache_policies.routing_trace import PREFILL_CHUNK, SPAN, RoutingTrace, forwards_of
from flashmoe.policies import build_policy

E = 8
ALL_NAMES = (*REPLAY_NAMES, "learned")
every_policy = pytest.mark.parametrize("name", ALL_NAMES)


def make_trace(
    experts: list[list[list[int]]], forwards: list[int] | None = None, num_experts: int = E
) -> RoutingTrace:
    """One sequence; experts [T][L][K]; `forwards`: how many rows went through the model at a time."""
    rows = np.array(experts, dtype=np.uint8)
    sizes = forwards or [1] * len(rows)
    assert sum(sizes) == len(rows)
    return RoutingTrace(
        "story", num_experts, rows, np.array([0, len(rows)]), np.cumsum([0, *sizes]), ("set",)
    )


@st.composite
def traces(draw: st.DrawFn, chunks: bool = False, tokens: int = 25, experts: int = E) -> RoutingTrace:
    layers, k = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    routed = st.lists(st.integers(0, experts - 1), min_size=k, max_size=k, unique=True)
    rows = draw(st.lists(st.lists(routed, min_size=layers, max_size=layers), min_size=1, max_size=tokens))
    sizes, left = [], len(rows)
    while left:
        sizes.append(draw(st.integers(1, min(left, 9))) if chunks else 1)
        left -= sizes[-1]
    return make_trace(rows, sizes, experts)


def policy_for(name: str, trace: RoutingTrace, geometry: Geometry) -> CachePolicy:
    if name == "learned":
        return build_policy(name, geometry)
    return make_policy(name, geometry, trace=trace, paper_weights=some_weights(trace))


def some_weights(trace: RoutingTrace) -> PaperWeights:
    generator = np.random.default_rng(0)
    sizes = ((2 * trace.num_experts, 4), (4, 4), (4, trace.num_experts))
    return PaperWeights(
        tuple(generator.normal(size=(trace.layers, *size)).astype(np.float32) for size in sizes),
        tuple(np.zeros((trace.layers, size[1]), dtype=np.float32) for size in sizes),
    )


@pytest.fixture(autouse=True)
def small_batches() -> Iterator[None]:
    """LRB trains within a few events."""
    with mock.patch.object(lrb, "BATCH", 16):
        yield


@st.composite
def geometries(draw: st.DrawFn, trace: RoutingTrace) -> Geometry:
    per_layer = draw(st.booleans())
    most = trace.num_experts * (1 if per_layer else trace.layers)
    capacity = draw(st.integers(trace.top_k, max(trace.top_k, most)))
    return Geometry(trace.layers, trace.num_experts, trace.top_k, capacity, per_layer)


# Traces


def story_of_three() -> RoutingTrace:
    """Sequences of 3, 2 and 4 rows; row i routes to expert i. The third's first three rows ran together."""
    return RoutingTrace(
        "three", 9, np.arange(9, dtype=np.uint8)[:, None, None], np.array([0, 3, 5, 9]),
        np.array([0, 2, 3, 4, 5, 8, 9]), ("a", "b", "a"), np.arange(9, dtype=np.float32)[:, None, None],
        None, np.arange(100, 109),
    )  # fmt: skip


def test_selected_sequences_stand_one_behind_the_other_with_their_forwards() -> None:
    chosen = story_of_three().select([2, 0])
    assert chosen.experts.ravel().tolist() == [0, 1, 2, 5, 6, 7, 8]
    assert chosen.seq_offsets.tolist() == [0, 3, 7]
    assert chosen.forward_offsets.tolist() == [0, 2, 3, 6, 7]
    assert chosen.datasets == ("a", "a")
    assert chosen.weights is not None and chosen.weights.ravel().tolist() == [0, 1, 2, 5, 6, 7, 8]
    assert chosen.tokens is not None and chosen.tokens.tolist() == [100, 101, 102, 105, 106, 107, 108]
    assert chosen.scores is None


def test_a_data_set_selects_its_sequences_and_all_sequences_are_the_trace() -> None:
    trace = story_of_three()
    assert trace.of_datasets(["b"]).experts.ravel().tolist() == [3, 4]
    again = trace.select(range(3))
    assert again.experts.tolist() == trace.experts.tolist()
    assert again.forward_offsets.tolist() == trace.forward_offsets.tolist()


def test_no_sequences_are_an_empty_trace_that_replays_to_nothing() -> None:
    empty = story_of_three().select([])
    assert len(empty) == 0 and empty.layers == 1 and list(empty.spans()) == []
    assert empty.forward_offsets.tolist() == empty.seq_offsets.tolist() == [0]
    geometry = Geometry(1, 9, 1, 4)
    for name in ALL_NAMES:
        assert replay(empty, policy_for(name, empty, geometry), geometry) == ReplayCounts(0, 0, 0)
    assert ReplayCounts(0, 0, 0).hit_rate == 0


def test_spans_are_the_chunks_and_what_ran_one_by_one_between_them() -> None:
    assert list(story_of_three().spans()) == [(0, 2, True), (2, 5, False), (5, 8, True), (8, 9, False)]


def test_long_runs_of_single_tokens_are_cut() -> None:
    rows = [[[0]]] * (SPAN + 3)
    assert list(make_trace(rows).spans()) == [(0, SPAN, False), (SPAN, SPAN + 3, False)]


@settings(deadline=None)
@given(trace=traces(chunks=True))
def test_spans_cover_every_row_once_and_chunks_are_the_forwards_of_more_than_one(trace: RoutingTrace) -> None:
    spans = list(trace.spans())
    assert [row for begin, end, _ in spans for row in range(begin, end)] == list(range(len(trace)))
    borders = trace.forward_offsets.tolist()
    forwards = list(zip(borders, borders[1:], strict=False))
    assert [(b, e) for b, e, is_chunk in spans if is_chunk] == [(b, e) for b, e in forwards if e - b > 1]


def events_of(trace: RoutingTrace) -> list[tuple[int, int]]:
    """(row, layer) in the order in which a policy sees them, by a loop over forwards."""
    borders = trace.forward_offsets.tolist()
    return [
        (row, layer)
        for begin, end in zip(borders, borders[1:], strict=False)
        for layer in range(trace.layers)
        for row in range(begin, end)
    ]


@settings(deadline=None)
@given(trace=traces(chunks=True))
def test_step_numbers_count_the_events_that_came_before(trace: RoutingTrace) -> None:
    numbers = trace.step_numbers()
    assert [int(numbers[event]) for event in events_of(trace)] == list(range(len(trace) * trace.layers))


class Witness(CachePolicy):
    """Notes what it is shown; drops in order."""

    name = "witness"

    def __init__(self) -> None:
        self.seen: list[tuple[object, ...]] = []

    def step(self, layer, routed, weights=None, scores=None, token=-1):  # type: ignore[no-untyped-def]
        self.seen.append((layer, list(routed), weights and list(weights), scores, token))

    def victims(self, candidates, n):  # type: ignore[no-untyped-def]
        return sorted(candidates)[:n]


@settings(deadline=None)
@given(trace=traces(chunks=True))
def test_a_policy_sees_every_event_once_and_in_order(trace: RoutingTrace) -> None:
    witness = Witness()
    counts = replay(trace, witness, Geometry(trace.layers, E, trace.top_k, trace.top_k))
    assert witness.seen == [
        (layer, trace.experts[row, layer].tolist(), None, None, -1) for row, layer in events_of(trace)
    ]
    assert counts.events == trace.layers * (len(trace.forward_offsets) - 1)


def test_a_policy_sees_weights_scores_and_tokens_where_a_trace_has_them() -> None:
    trace = story_of_three()
    scores = np.arange(81, dtype=np.float32).reshape(9, 1, 9)
    with_scores = RoutingTrace(
        trace.name, 9, trace.experts, trace.seq_offsets, trace.forward_offsets, trace.datasets,
        trace.weights, scores, trace.tokens,
    )  # fmt: skip
    witness = Witness()
    replay(with_scores, witness, Geometry(1, 9, 1, 4))
    for row, (layer, routed, weights, seen_scores, token) in enumerate(witness.seen):
        assert (layer, routed, weights, token) == (0, [row], [float(row)], 100 + row)
        assert np.array_equal(np.asarray(seen_scores), scores[row, 0])


def test_a_trace_without_phases_was_decoded_token_by_token() -> None:
    assert forwards_of(None, np.array([0, 2, 4])).tolist() == [0, 1, 2, 3, 4]


def test_a_prompt_is_cut_into_chunks_and_never_across_sequences() -> None:
    phase = np.array([0, 0, 0, 1, 1, 0, 0, 1])
    assert forwards_of(phase, np.array([0, 5, 8])).tolist() == [0, 3, 4, 5, 7, 8]
    assert forwards_of(np.zeros(4), np.array([0, 2, 4])).tolist() == [0, 2, 4]


def test_a_long_prompt_is_cut_every_512_tokens() -> None:
    phase = np.array([0] * (2 * PREFILL_CHUNK + 1) + [1])
    ends = [0, PREFILL_CHUNK, 2 * PREFILL_CHUNK, 2 * PREFILL_CHUNK + 1, 2 * PREFILL_CHUNK + 2]
    assert forwards_of(phase, np.array([0, len(phase)])).tolist() == ends


# Residency


def serve(
    trace: RoutingTrace,
    residency: Residency,
    arrivals: int | None = None,
    watch: Callable[[ChunkPlan, frozenset[ExpertId], list[ExpertId]], None] | None = None,
) -> list[frozenset[ExpertId]]:
    """Serve a trace event by event -> who was resident after each. `arrivals`: seed of the order in which an
    event's reads finish. `watch` sees each chunk's plan, the residents before it, and what it needs."""
    order = random.Random(arrivals)
    after = []
    for begin, end, is_chunk in trace.spans():
        rows = trace.experts[begin:end]
        for layer in range(trace.layers) if is_chunk else ():
            for row in rows[:, layer].tolist():
                residency.policy.step(layer, row)
            before, needed = residency.residents, serving_order(rows[:, layer])
            plan = residency.begin_chunk(layer, needed)
            if watch:
                watch(plan, before, [(layer, expert) for expert in needed])
            residency.chunk_served(plan)
            after.append(residency.residents)
        for row in () if is_chunk else rows.tolist():
            for layer, routed in enumerate(row):
                missing, victims = residency.begin(layer, routed)
                assert not {(layer, expert) for expert in routed}.intersection(victims)
                if arrivals is not None:
                    order.shuffle(missing)
                for key in missing:
                    residency.arrived(key)
                residency.settle()
                after.append(residency.residents)
    return after


@every_policy
@settings(deadline=None, max_examples=50)
@given(data=st.data(), trace=traces(chunks=True))
def test_hits_are_the_same_in_whatever_order_reads_finish(
    name: str, data: st.DataObject, trace: RoutingTrace
) -> None:
    geometry = data.draw(geometries(trace))
    first = serve(trace, Residency(policy_for(name, trace, geometry), geometry))
    again = serve(trace, Residency(policy_for(name, trace, geometry), geometry), arrivals=1)
    assert again == first


@every_policy
@settings(deadline=None, max_examples=50)
@given(data=st.data(), trace=traces(chunks=True), spare=st.integers(0, 2))
def test_a_chunk_plan_keeps_to_the_slots_and_names_every_expert_once(
    name: str, data: st.DataObject, trace: RoutingTrace, spare: int
) -> None:
    geometry = data.draw(geometries(trace))
    residency = Residency(policy_for(name, trace, geometry), geometry, spare)

    def watch(plan: ChunkPlan, before: frozenset[ExpertId], needed: list[ExpertId]) -> None:
        assert sorted([*plan.hits, *plan.passing, *plan.staying]) == sorted(needed)
        assert set(plan.hits) == before.intersection(needed)
        assert plan.leaving.issubset(plan.hits)
        assert len(set(plan.victims)) == len(plan.victims)
        assert before.difference(needed).issuperset(set(plan.victims) - set(plan.hits))
        assert not plan.leaving.intersection(plan.victims) and not set(plan.hits).intersection(plan.victims)
        slots = residency.slots + spare
        after_hits = len(before) - len(plan.victims) - len(plan.leaving)
        assert after_hits + bool(plan.passing) <= slots, "there is a slot to read through"
        assert after_hits + len(plan.staying) <= residency.slots

    for residents in serve(trace, residency, watch=watch):
        assert len(residents) <= residency.slots
        for layer in range(trace.layers) if geometry.per_layer else ():
            assert sum(1 for key in residents if key[0] == layer) <= geometry.capacity


@every_policy
@settings(deadline=None, max_examples=50)
@given(data=st.data(), trace=traces(chunks=True), spare=st.integers(0, 2))
def test_replay_counts_what_residency_decides(
    name: str, data: st.DataObject, trace: RoutingTrace, spare: int
) -> None:
    geometry = data.draw(geometries(trace))
    counts = replay(trace, policy_for(name, trace, geometry), geometry, spare)
    hits = requests = 0
    before: frozenset[ExpertId] = frozenset()
    after = iter(serve(trace, Residency(policy_for(name, trace, geometry), geometry, spare)))
    for begin, end in zip(trace.forward_offsets[:-1], trace.forward_offsets[1:], strict=True):
        for layer in range(trace.layers):
            needed = {(layer, int(expert)) for expert in trace.experts[begin:end, layer].ravel()}
            hits += len(needed & before)
            requests += len(needed)
            before = next(after)
    assert (counts.hits, counts.misses) == (hits, requests - hits)


def test_what_the_last_tokens_of_a_chunk_use_is_served_last() -> None:
    assert serving_order(np.array([[1, 2], [3, 1], [4, 2]])) == [3, 1, 4, 2]


def test_a_capacity_below_top_k_is_refused() -> None:
    geometry = Geometry(layers=1, experts=8, top_k=4, capacity=3)
    with pytest.raises(ValueError, match="a capacity of 3 experts is below top-k 4"):
        Residency(make_policy("lru", geometry), geometry)


def test_a_geometry_of_another_model_is_refused() -> None:
    geometry = Geometry(layers=2, experts=8, top_k=1, capacity=3)
    with pytest.raises(ValueError, match=r"story has \(layers, experts, top-k\)"):
        replay(make_trace([[[0]]]), make_policy("lru", geometry), geometry)


def test_emptying_the_cache_leaves_nobody_and_the_policy_goes_on() -> None:
    for per_layer in (False, True):
        geometry = Geometry(layers=2, experts=8, top_k=1, capacity=4, per_layer=per_layer)
        for name in sorted({*ALL_NAMES} - {"belady"}):
            trace = make_trace([[[0], [1]], [[2], [3]]])
            residency = Residency(policy_for(name, trace, geometry), geometry)
            held = serve(trace, residency)[-1]
            assert set(residency.evict_all()) == held and not residency.residents
            assert serve(trace, residency)[-1] == held


# Belady


@settings(deadline=None)
@given(trace=traces(chunks=True))
def test_next_uses_are_what_a_loop_finds(trace: RoutingTrace) -> None:
    following, first = next_uses(trace)
    events = events_of(trace)
    routed = [trace.experts[event].tolist() for event in events]

    def use_after(layer: int, expert: int, step: int) -> int:
        later = range(step + 1, len(events))
        return next((i for i in later if events[i][1] == layer and expert in routed[i]), NEVER)

    for step, (_, layer) in enumerate(events):
        wanted = [use_after(layer, expert, step) for expert in routed[step]]
        assert following[step].tolist() == wanted
    for layer in range(trace.layers):
        assert first[layer].tolist() == [use_after(layer, expert, -1) for expert in range(E)]


@pytest.mark.parametrize("name", sorted({*ALL_NAMES} - {"belady"}))
@settings(deadline=None)
@given(data=st.data(), trace=traces())
def test_no_policy_has_more_hits_than_belady(name: str, data: st.DataObject, trace: RoutingTrace) -> None:
    geometry = data.draw(geometries(trace))
    best = replay(trace, Belady(trace), geometry)
    assert replay(trace, policy_for(name, trace, geometry), geometry).hits <= best.hits


def most_hits(trace: RoutingTrace, geometry: Geometry) -> int:
    """Every choice of victims tried, in a cache that must admit what an event lacks."""
    events = [
        (layer, frozenset((layer, expert) for expert in routed))
        for row in trace.experts.tolist()
        for layer, routed in enumerate(row)
    ]

    @cache
    def best(step: int, resident: frozenset[ExpertId]) -> int:
        if step == len(events):
            return 0
        layer, needed = events[step]
        pool = {key for key in resident if key[0] == layer} if geometry.per_layer else resident
        others = sorted(pool - needed)
        surplus = max(0, len(pool | needed) - geometry.capacity)
        return len(needed & resident) + max(
            best(step + 1, (resident | needed).difference(victims))
            for victims in combinations(others, surplus)
        )

    return best(0, frozenset())


@settings(deadline=None, max_examples=60)
@given(data=st.data(), trace=traces(tokens=5, experts=4))
def test_belady_has_the_most_hits_that_can_be_had(data: st.DataObject, trace: RoutingTrace) -> None:
    geometry = data.draw(geometries(trace))
    assert replay(trace, Belady(trace), geometry).hits == most_hits(trace, geometry)


def test_belady_evicts_what_is_needed_again_last() -> None:
    trace = make_trace([[[x]] for x in (1, 2, 3, 2, 1)])
    policy = Belady(trace)
    for row in trace.experts[:3, 0].tolist():
        policy.step(0, row)
    assert policy.victims({(0, 1), (0, 2)}, 1) == [(0, 1)]


def test_belady_knows_one_trace_and_says_when_it_is_over() -> None:
    trace = make_trace([[[1]]])
    policy = Belady(trace)
    policy.step(0, [1])
    with pytest.raises(ValueError, match="belady knows a trace of 1 events; this is one more"):
        policy.step(0, [1])
