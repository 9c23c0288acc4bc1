"""Cache policies: one contract for all of them, and one story for each.

Events are atomic here as in the engine: a layer's routed set arrives whole and none of it may be evicted for
another member. `replay` below is the smallest cache that keeps to this.
"""

import random
from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_policies import table_policy
from cache_policies.policy import CachePolicy, ExpertId, Geometry
from cache_policies.registry import POLICY_NAMES, make_policy

Event = tuple[int, list[int]]  # layer, routed experts

every_policy = pytest.mark.parametrize("name", POLICY_NAMES)


@dataclass
class Replay:
    """What a cache of fixed capacity did with a trace."""

    resident: set[ExpertId] = field(default_factory=set)
    hits: list[int] = field(default_factory=list)  # one entry an event
    victims: list[ExpertId] = field(default_factory=list)


def replay(policy: CachePolicy, trace: Iterable[Event], capacity: int, arrivals: int | None = None) -> Replay:
    """Serve a trace; `arrivals` is the seed of the order in which an event's reads finish."""
    done, order = Replay(), random.Random(arrivals)
    for layer, routed in trace:
        policy.step(layer, routed)
        needed = {(layer, expert) for expert in routed}
        missing = sorted(needed - done.resident)
        lacking = len(done.resident) + len(missing) - capacity
        if lacking > 0:
            candidates = frozenset(done.resident - needed)
            victims = policy.victims(candidates, lacking)
            assert len(victims) == len(set(victims)) == lacking
            assert candidates.issuperset(victims), "a victim is resident, and not needed by this event"
            done.resident.difference_update(victims)
            done.victims.extend(victims)
        if arrivals is not None:
            order.shuffle(missing)
        for expert in missing:
            policy.inserted(expert)
        done.resident.update(missing)
        done.hits.append(len(needed) - len(missing))
        assert len(done.resident) <= capacity
    return done


def make(name: str, seed: int = 0, capacity: int = 24) -> CachePolicy:
    return make_policy(name, Geometry(layers=4, experts=512, top_k=4, capacity=capacity), seed=seed)


def fill(policy: CachePolicy, *experts: ExpertId) -> set[ExpertId]:
    for expert in experts:
        policy.inserted(expert)
    return set(experts)


TOP_K = 4
routed_sets = st.lists(st.integers(0, 15), min_size=1, max_size=TOP_K, unique=True)
traces = st.lists(st.tuples(st.integers(0, 2), routed_sets), max_size=60)
capacities = st.integers(TOP_K, 24)
sorting = st.sampled_from([0, 4, 10**6])  # how many candidates still count as few


# The contract


@every_policy
@settings(deadline=None)
@given(trace=traces, capacity=capacities, few=sorting, seed=st.integers(0, 3))
def test_any_policy_keeps_the_contract_on_any_trace(
    name: str, trace: list[Event], capacity: int, few: int, seed: int
) -> None:
    """Never over capacity, never evicts what the event needs; distinct resident victims: see replay."""
    with mock.patch.object(table_policy, "FEW", few):
        done = replay(make(name, seed=seed), trace, capacity)
    assert len(done.hits) == len(trace)


@every_policy
@settings(deadline=None)
@given(trace=traces, capacity=capacities, seed=st.integers(0, 3))
def test_the_same_trace_gives_the_same_victims_in_whatever_order_reads_finish(
    name: str, trace: list[Event], capacity: int, seed: int
) -> None:
    first = replay(make(name, seed=seed), trace, capacity)
    again = replay(make(name, seed=seed), trace, capacity, arrivals=1)
    assert again == first


@every_policy
@settings(deadline=None)
@given(trace=traces, capacity=capacities)
def test_few_and_many_candidates_are_judged_alike(name: str, trace: list[Event], capacity: int) -> None:
    """Two ways to the victims, sorting the candidates and searching the tables, give the same ones."""
    with mock.patch.object(table_policy, "FEW", 0):
        searched = replay(make(name), trace, capacity)
    with mock.patch.object(table_policy, "FEW", 10**6):
        assert replay(make(name), trace, capacity) == searched


@pytest.mark.parametrize("name", ["lru", "lfu", "lfru"])
@settings(deadline=None)
@given(trace=traces, capacity=capacities)
def test_what_a_policy_knows_of_an_expert_survives_its_eviction(
    name: str, trace: list[Event], capacity: int
) -> None:
    """After the trace, a small cache's policy ranks its residents like one that never evicted anything."""
    evicting, keeping = make(name), make(name)
    resident = frozenset(replay(evicting, trace, capacity).resident)
    replay(keeping, trace, capacity=10**6)
    assert evicting.victims(resident, len(resident)) == keeping.victims(resident, len(resident))


@every_policy
def test_asking_for_more_victims_than_may_leave_is_an_error(name: str) -> None:
    policy = make(name)
    residents = fill(policy, (0, 0), (0, 1))
    with pytest.raises(ValueError, match="3 victims asked for, but only 2 experts may leave"):
        policy.victims(residents, 3)
    assert policy.victims(residents, 0) == []
    assert len(policy.victims(residents, 2)) == 2


@pytest.mark.parametrize("name", [name for name in POLICY_NAMES if name != "random"])
def test_equals_leave_in_order_of_layer_and_expert(name: str) -> None:
    policy = make(name)
    residents = fill(policy, (1, 0), (0, 3), (0, 1), (1, 2))
    assert policy.victims(residents, 4) == [(0, 1), (0, 3), (1, 0), (1, 2)]


@every_policy
def test_residents_that_may_not_go_are_passed_over(name: str) -> None:
    policy = make(name)
    fill(policy, *((0, expert) for expert in range(500)))
    candidates = {(0, expert) for expert in range(450, 500)}  # all 500 are equals
    assert candidates.issuperset(policy.victims(candidates, 3))


@every_policy
def test_candidates_never_reported_as_inserted_can_leave_all_the_same(name: str) -> None:
    policy = make(name)
    policy.step(3, [20])
    candidates = {(layer, expert) for layer in range(3) for expert in range(20)}
    assert candidates == set(policy.victims(candidates, 60))


def test_an_unknown_policy_is_refused_with_the_known_names() -> None:
    with pytest.raises(ValueError, match=r"unknown policy 'mru'; known are lru, lfu, lfru, fifo, random"):
        make("mru")


# LRU against a model that shares nothing with it


class OrderedDictLRU(CachePolicy):
    """Textbook LRU: the oldest key of an ordered dict leaves."""

    name = "ordered dict"

    def __init__(self) -> None:
        self.order: OrderedDict[ExpertId, None] = OrderedDict()

    def step(
        self,
        layer: int,
        routed: Sequence[int],
        weights: Sequence[float] | None = None,
        scores: Sequence[float] | None = None,
        token: int = -1,
    ) -> None:
        for expert in sorted(routed):
            self.order[layer, expert] = None
            self.order.move_to_end((layer, expert))

    def victims(self, candidates: Collection[ExpertId], n: int) -> list[ExpertId]:
        return [expert for expert in self.order if expert in candidates][:n]


@settings(deadline=None)
@given(trace=traces, capacity=capacities, few=sorting)
def test_lru_does_what_an_ordered_dict_does(trace: list[Event], capacity: int, few: int) -> None:
    with mock.patch.object(table_policy, "FEW", few):
        assert replay(make("lru"), trace, capacity) == replay(OrderedDictLRU(), trace, capacity)


# One story each. Unless told otherwise all experts are of layer 0 and the cache holds two.


def test_lru_evicts_the_expert_unused_longest() -> None:
    done = replay(make("lru"), [(0, [1]), (0, [2]), (0, [1]), (0, [3])], capacity=2)
    assert done.victims == [(0, 2)]


def test_lru_takes_a_prefetched_expert_for_as_recent_as_its_arrival() -> None:
    policy = make("lru")
    for expert in (1, 2):
        policy.step(0, [expert])
    residents = fill(policy, (0, 1), (0, 2), (1, 0))  # nothing asked for (1, 0) yet
    assert policy.victims(residents, 3) == [(0, 1), (0, 2), (1, 0)]


def test_lru_goes_by_use_however_late_the_read_finished() -> None:
    """A prompt is observed token by token before its experts arrive; those of its last tokens must stay."""
    policy = make("lru")
    for expert in (2, 1):
        policy.step(0, [expert])
    residents = fill(policy, (0, 1), (0, 2))
    assert policy.victims(residents, 1) == [(0, 2)]


def test_lfu_evicts_the_expert_used_least_and_of_equals_the_one_unused_longest() -> None:
    policy = make("lfu")
    for expert in (1, 1, 2, 3, 2, 1, 4):
        policy.step(0, [expert])
    residents = fill(policy, (0, 1), (0, 2), (0, 3), (0, 4))
    assert policy.victims(residents, 4) == [(0, 3), (0, 4), (0, 2), (0, 1)]


def test_lfu_remembers_the_count_of_an_expert_that_was_away() -> None:
    trace = [(0, [1]), (0, [1]), (0, [2]), (0, [2]), (0, [2]), (0, [3]), (0, [1]), (0, [4])]
    # 3 pushes 1 out (2 uses against 3); 1 comes back over 3, and with 3 uses in all it is level with 2.
    assert replay(make("lfu"), trace, capacity=2).victims == [(0, 1), (0, 3), (0, 2)]


def test_lfru_evicts_the_largest_age_over_one_plus_count() -> None:
    policy = make("lfru")
    for expert in (1, 1, 1, 2, 3):
        policy.step(0, [expert])
    residents = fill(policy, (0, 1), (0, 2), (0, 3))
    # 1: age 3, count 3 -> 3/4.   2: age 2, count 1 -> 1.   3: age 1, count 1 -> 1/2.
    assert policy.victims(residents, 3) == [(0, 2), (0, 1), (0, 3)]


def test_lfru_counts_age_in_events_of_the_experts_own_layer() -> None:
    policy = make("lfru")
    policy.step(1, [7])
    for expert in (5, 6):
        policy.step(0, [expert])
    residents = fill(policy, (0, 5), (1, 7))  # (1, 7) is older by the clock, but layer 1 has not run since
    assert policy.victims(residents, 1) == [(0, 5)]


def test_lfru_counts_the_age_of_a_prefetched_expert_from_its_arrival() -> None:
    policy = make("lfru")
    for expert in (1, 9, 9, 9):
        policy.step(0, [expert])
    residents = fill(policy, (0, 1), (0, 2))
    # 1: age 4, count 1 -> 2.   2: age 1, count 0 -> 1.
    assert policy.victims(residents, 1) == [(0, 1)]


def test_fifo_evicts_the_first_that_came_however_often_it_is_used() -> None:
    done = replay(make("fifo"), [(0, [1]), (0, [2]), (0, [1]), (0, [1]), (0, [3])], capacity=2)
    assert done.victims == [(0, 1)]


def test_fifo_counts_from_the_latest_arrival() -> None:
    done = replay(make("fifo"), [(0, [1]), (0, [2]), (0, [3]), (0, [1]), (0, [4])], capacity=2)
    assert done.victims == [(0, 1), (0, 2), (0, 3)]


def test_random_gives_every_candidate_the_same_chance_and_depends_on_its_seed() -> None:
    def victims(seed: int) -> list[ExpertId]:
        policy = make("random", seed=seed)
        residents = fill(policy, *((0, expert) for expert in range(4)))
        return [victim for _ in range(400) for victim in policy.victims(residents, 1)]

    counts = [victims(seed=0).count((0, expert)) for expert in range(4)]
    assert min(counts) > 70  # 100 expected; 3.5 standard deviations
    assert victims(seed=0) == victims(seed=0) != victims(seed=1)
