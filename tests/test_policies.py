"""Cache policies: one contract for all of them, and one story for each.

Events are atomic here as in the engine: a layer's routed set arrives whole and none of it may be evicted for
another member. `replay` below is the smallest cache that keeps to this.
"""

import functools
import math
import random
from collections import OrderedDict, deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_policies import lrb, paper_network, table_policy
from cache_policies.arc import ARC
from cache_policies.learned import Learned
from cache_policies.lecar import LeCaR
from cache_policies.lfu_aged import AgedLFU
from cache_policies.lrb import LRB
from cache_policies.native._learned import Trees
from cache_policies.paper_network import PaperNetwork, PaperWeights
from cache_policies.policy import CachePolicy, ExpertId, Geometry
from cache_policies.queue_policy import QueuePolicy
from cache_policies.registry import REPLAY_NAMES, make_policy
from cache_policies.routing_trace import RoutingTrace
from cache_policies.s3fifo import S3FIFO
from cache_policies.sieve import SIEVE
from flashmoe.policy_file import read_policy

Event = tuple[int, list[int]]  # layer, routed experts

# All but Belady, which serves one trace only: tests/test_replay.py.
ONLINE = [*(name for name in REPLAY_NAMES if name != "belady"), "learned"]
every_policy = pytest.mark.parametrize("name", ONLINE)


@pytest.fixture(autouse=True)
def small_batches() -> Iterator[None]:
    """LRB trains within a few events."""
    with mock.patch.object(lrb, "BATCH", 24):
        yield


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
    geometry = Geometry(layers=4, experts=512, top_k=4, capacity=capacity)
    if name == "learned":
        return Learned(geometry, shipped_trees())
    return make_policy(name, geometry, seed=seed, paper_weights=random_weights(layers=4, experts=512))


@functools.cache
def shipped_trees() -> Trees:
    return read_policy()


@functools.cache
def random_weights(layers: int, experts: int) -> PaperWeights:
    generator = np.random.default_rng(0)
    sizes = (2 * experts, 8, 8, experts)
    return PaperWeights(
        tuple(
            generator.normal(size=(layers, *pair)).astype(np.float32)
            for pair in zip(sizes, sizes[1:], strict=False)
        ),
        tuple(np.zeros((layers, size), dtype=np.float32) for size in sizes[1:]),
    )


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
        done = replay(make(name, seed, capacity), trace, capacity)
    assert len(done.hits) == len(trace)


@every_policy
@settings(deadline=None)
@given(trace=traces, capacity=capacities, seed=st.integers(0, 3))
def test_the_same_trace_gives_the_same_victims_in_whatever_order_reads_finish(
    name: str, trace: list[Event], capacity: int, seed: int
) -> None:
    first = replay(make(name, seed, capacity), trace, capacity)
    again = replay(make(name, seed, capacity), trace, capacity, arrivals=1)
    assert again == first


@every_policy
@settings(deadline=None, max_examples=50)
@given(trace=traces, capacity=capacities)
def test_the_experts_of_an_event_are_a_set(name: str, trace: list[Event], capacity: int) -> None:
    """Their places in the top-k, which small differences of router weights can swap, do not count."""
    swapped = [(layer, routed[::-1]) for layer, routed in trace]
    wanted = replay(make(name, 0, capacity), trace, capacity)
    assert replay(make(name, 0, capacity), swapped, capacity) == wanted


@pytest.mark.parametrize("name", ["lfu", "lfu-aged", "lfru", "fifo", "random", "least-stale"])
@settings(deadline=None)
@given(trace=traces, capacity=capacities)
def test_few_and_many_candidates_are_judged_alike(name: str, trace: list[Event], capacity: int) -> None:
    """Two ways to the victims, sorting the candidates and searching the tables, give the same ones."""
    with mock.patch.object(table_policy, "FEW", 0):
        searched = replay(make(name), trace, capacity)
    with mock.patch.object(table_policy, "FEW", 10**6):
        assert replay(make(name), trace, capacity) == searched


@pytest.mark.parametrize("name", ["lru", "lfu", "lfu-aged", "lfru", "paper"])
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


@pytest.mark.parametrize("name", sorted({*ONLINE} - {"random", "paper", "learned"}))
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


@every_policy
@settings(deadline=None)
@given(chunk=st.lists(routed_sets, min_size=1, max_size=12), others=st.integers(0, 3), data=st.data())
def test_a_chunks_experts_may_leave_before_they_were_ever_resident(
    name: str, chunk: list[list[int]], others: int, data: st.DataObject
) -> None:
    """In prefill the policy sees all tokens first and then chooses among residents and newcomers together,
    more than there are slots; later it is asked again."""
    policy = make(name, capacity=4)
    replay(policy, [(0, [20, 21]), (1, [other for other in range(others)])], capacity=8)
    for routed in chunk:
        policy.step(0, routed)
    newcomers = {(0, expert) for routed in chunk for expert in routed}
    for key in newcomers:
        policy.inserted(key)
    together = newcomers | {(0, 20), (0, 21)}
    gone = policy.victims(together, data.draw(st.integers(0, len(together))))
    assert together.issuperset(gone) and len(set(gone)) == len(gone)
    left = together.difference(gone)
    assert set(policy.victims(left, len(left))) == left


@pytest.mark.parametrize("name", ["arc", "lecar", "s3fifo", "sieve"])
def test_a_queue_policy_does_not_take_what_left_before_it_came_for_a_resident(name: str) -> None:
    policy = make(name)
    for expert in (1, 2):
        policy.step(0, [expert])
    assert policy.victims({(0, 1), (0, 2)}, 2) == [(0, 1), (0, 2)]
    policy.step(0, [3])
    assert isinstance(policy, QueuePolicy) and not policy._has((0, 1)) and not policy._has((0, 2))


def test_names_are_distinct_and_each_policy_has_its_own() -> None:
    assert len(set(REPLAY_NAMES)) == len(REPLAY_NAMES)
    assert [make(name).name for name in ONLINE] == ONLINE


def test_layers_with_slots_of_their_own_have_a_queue_policy_each() -> None:
    """Layer 1's misses must not push layer 0's history out, nor count as its requests."""
    geometry = Geometry(layers=2, experts=8, top_k=1, capacity=2, per_layer=True)
    for name in ("arc", "lecar", "s3fifo", "sieve"):
        policy, alone = make_policy(name, geometry), make_policy(name, geometry)
        victims: list[list[ExpertId]] = [[], []]
        for which, layers in ((policy, (0, 1)), (alone, (0,))):
            resident: set[ExpertId] = set()
            for expert in (1, 2, 1, 3, 4, 1, 2, 5, 1):
                for layer in layers:
                    which.step(layer, [expert if layer == 0 else 7 - expert])
                if (0, expert) not in resident:
                    if len(resident) == 2:
                        leaving = which.victims(frozenset(resident), 1)
                        victims[which is alone] += leaving
                        resident.difference_update(leaving)
                    resident.add((0, expert))
                    which.inserted((0, expert))
        assert victims[0] == victims[1] != []


def test_what_needs_a_trace_or_weights_says_so() -> None:
    geometry = Geometry(layers=2, experts=8, top_k=2, capacity=4)
    with pytest.raises(ValueError, match="policy 'belady' needs a trace"):
        make_policy("belady", geometry)
    with pytest.raises(ValueError, match="policy 'paper' needs trained weights"):
        make_policy("paper", geometry)


def test_an_unknown_policy_is_refused_with_the_known_names() -> None:
    with pytest.raises(ValueError, match=r"unknown policy 'mru'; known are lru, lfu, lfu-aged, "):
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
@given(trace=traces, capacity=capacities)
def test_lru_does_what_an_ordered_dict_does(trace: list[Event], capacity: int) -> None:
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


def test_lru_takes_an_expert_that_comes_back_unasked_for_as_recent_as_its_return() -> None:
    policy = make("lru")
    replay(policy, [(0, [1]), (0, [2]), (0, [3])], capacity=2)  # 1 leaves
    residents = fill(policy, (0, 1)) | {(0, 2), (0, 3)}
    assert policy.victims(residents, 3) == [(0, 2), (0, 3), (0, 1)]


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


def test_aged_lfu_halves_a_use_after_a_half_life_of_its_own_layers_events() -> None:
    policy = AgedLFU(half_life=2)
    for layer, expert in ((1, 0), (0, 1), (0, 1), (0, 2), (0, 3), (0, 3)):
        policy.step(layer, [expert])
    residents = fill(policy, (0, 1), (0, 2), (0, 3), (1, 0))
    # 1: 1/4 + 1/4 * sqrt(2) = 0.60.  2: 1/2.  3: 1 + 1/sqrt(2) = 1.71.  Layer 1 has not run since: 1.
    assert policy.victims(residents, 4) == [(0, 2), (0, 1), (1, 0), (0, 3)]


def test_least_stale_evicts_what_this_pass_has_not_touched_the_lowest_layer_first() -> None:
    policy = make("least-stale")
    first_pass = [(0, [1]), (1, [1]), (2, [1])]
    second_pass = [(0, [2]), (1, [1])]
    replay(policy, first_pass + second_pass, capacity=10)
    residents = {(0, 1), (1, 1), (2, 1), (0, 2)}
    # Stale: (0, 1), whose turn came and went, and (2, 1). Touched in this pass: (0, 2), (1, 1).
    assert policy.victims(residents, 4) == [(0, 1), (2, 1), (0, 2), (1, 1)]


def test_least_stale_takes_a_chunks_tokens_in_one_layer_for_one_pass() -> None:
    policy = make("least-stale")
    replay(policy, [(1, [9]), (0, [3]), (0, [1]), (1, [5])], capacity=10)
    assert policy.victims({(0, 1), (0, 3), (1, 5), (1, 9)}, 4) == [(1, 9), (0, 3), (0, 1), (1, 5)]


# The queue policies against their papers' own pseudo code: one request after the other, nothing shared.


def some_requests(seed: int) -> list[int]:
    """A few experts more often than others, other ones each time: hits, ghosts and scans of all kinds."""
    draw = random.Random(seed)
    return [int(draw.paretovariate(0.6) + 3 * (i // 60)) % 15 for i in range(draw.choice((20, 240)))]


requests = st.builds(some_requests, st.integers(0, 2**32))
sizes = st.sampled_from([1, 2, 3, 4, 5, 6, 7, 10])


def victims_one_by_one(policy: CachePolicy, requested: list[int], capacity: int) -> list[int]:
    return [expert for _, expert in replay(policy, [(0, [x]) for x in requested], capacity).victims]


def arc_of_the_paper(requested: list[int], c: int) -> list[int]:
    """Figure 4; lists with the least recently used first."""
    t1: list[int] = []
    t2: list[int] = []
    b1: list[int] = []
    b2: list[int] = []
    p, victims = 0.0, []

    def replace(in_b2: bool) -> None:
        if t1 and ((in_b2 and len(t1) == p) or len(t1) > p):
            b1.append(t1.pop(0))
            victims.append(b1[-1])
        else:
            b2.append(t2.pop(0))
            victims.append(b2[-1])

    for x in requested:
        if x in t1 or x in t2:  # case I
            (t1 if x in t1 else t2).remove(x)
            t2.append(x)
        elif x in b1:  # case II
            p = min(c, p + (1 if len(b1) >= len(b2) else len(b2) / len(b1)))
            replace(in_b2=False)
            b1.remove(x)
            t2.append(x)
        elif x in b2:  # case III
            p = max(0, p - (1 if len(b2) >= len(b1) else len(b1) / len(b2)))
            replace(in_b2=True)
            b2.remove(x)
            t2.append(x)
        else:  # case IV
            if len(t1) + len(b1) == c:
                if len(t1) < c:
                    b1.pop(0)
                    replace(in_b2=False)
                else:
                    victims.append(t1.pop(0))
            elif len(t1) + len(t2) + len(b1) + len(b2) >= c:
                if len(t1) + len(t2) + len(b1) + len(b2) == 2 * c:
                    b2.pop(0)
                replace(in_b2=False)
            t1.append(x)
    return victims


@settings(deadline=None)
@given(requested=requests, capacity=sizes)
def test_arc_does_what_its_paper_says(requested: list[int], capacity: int) -> None:
    assert victims_one_by_one(ARC(capacity), requested, capacity) == arc_of_the_paper(requested, capacity)


def test_arc_keeps_what_was_used_twice_through_a_scan_of_newcomers() -> None:
    done = replay(ARC(4), [(0, [x]) for x in (1, 2, 1, 2, 11, 12, 13, 14, 15, 16)], capacity=4)
    assert done.resident == {(0, 1), (0, 2), (0, 15), (0, 16)}


def test_arc_gives_newcomers_more_room_when_it_misses_one_it_has_just_sent_away() -> None:
    """1 and 2 are in T2; 4 pushes 3 out of T1, which p = 0 gives no room. 3's return moves p to 1: T1 may
    keep 4, and T2's oldest leaves, for 5 too. Then T1 is above p again."""
    done = replay(ARC(3), [(0, [x]) for x in (1, 1, 2, 2, 3, 4, 3, 5, 6)], capacity=3)
    assert done.victims == [(0, 3), (0, 1), (0, 2), (0, 4)]


def sieve_of_the_paper(requested: list[int], c: int) -> list[int]:
    """Algorithm 1, on nodes [x, visited, towards the head]; the queue's head is its new end."""
    cached: dict[int, list[object]] = {}
    order: list[int] = []  # tail first; only to find neighbours
    hand: int | None = None
    victims = []
    for x in requested:
        if x in cached:
            cached[x][0] = True
            continue
        if len(order) == c:
            o = order[0] if hand is None else hand
            while cached[o][0]:
                cached[o][0] = False
                at = order.index(o)
                o = order[at + 1] if at + 1 < len(order) else order[0]
            at = order.index(o)
            hand = order[at + 1] if at + 1 < len(order) else None
            order.remove(o)
            del cached[o]
            victims.append(o)
        order.append(x)
        cached[x] = [False]
    return victims


@settings(deadline=None)
@given(requested=requests, capacity=sizes)
def test_sieve_does_what_its_paper_says(requested: list[int], capacity: int) -> None:
    assert victims_one_by_one(SIEVE(), requested, capacity) == sieve_of_the_paper(requested, capacity)


def test_sieve_spares_what_was_used_and_goes_on_from_where_it_stopped() -> None:
    """The hand unmarks 1 and takes 2; next it takes 3, the one behind, although 1 is not marked any more."""
    done = replay(SIEVE(), [(0, [x]) for x in (1, 2, 3, 1, 4, 5)], capacity=3)
    assert done.victims == [(0, 2), (0, 3)]


def s3fifo_of_the_paper(requested: list[int], c: int) -> list[int]:
    """Algorithm 1; deques with the tail, the oldest, on the left. One eviction makes room for one request."""
    small: deque[int] = deque()
    main: deque[int] = deque()
    ghost: deque[int] = deque()
    freq: dict[int, int] = {}
    small_size = 0.1 * c
    main_size = c - max(1, int(small_size))
    victims = []

    def evict_main() -> bool:
        while main:
            t = main.popleft()
            if freq[t] == 0:
                del freq[t]
                victims.append(t)
                return True
            freq[t] -= 1
            main.append(t)
        return False

    def evict_small() -> bool:
        while small:
            t = small.popleft()
            if freq[t] > 1:
                full = len(main) >= main_size
                evicted = full and evict_main()
                main.append(t)
                freq[t] = 0
                if evicted:
                    return True
            else:
                del freq[t]
                ghost.append(t)
                if len(ghost) > main_size:
                    ghost.popleft()
                victims.append(t)
                return True
        return False

    for x in requested:
        if x in freq:
            freq[x] = min(3, freq[x] + 1)
            continue
        if len(freq) == c:
            assert (evict_small() or evict_main()) if len(small) >= small_size else evict_main()
        if x in ghost:
            ghost.remove(x)
            main.append(x)
        else:
            small.append(x)
        freq[x] = 0
    return victims


@settings(deadline=None)
@given(requested=requests, capacity=sizes)
def test_s3_fifo_does_what_its_paper_says(requested: list[int], capacity: int) -> None:
    wanted = s3fifo_of_the_paper(requested, capacity)
    assert victims_one_by_one(S3FIFO(capacity), requested, capacity) == wanted


def test_s3_fifo_lets_newcomers_pass_and_keeps_what_was_used_again() -> None:
    trace = [(0, [x]) for x in (1, 1, 1, 2, 3, 4, 3)]
    # 1 was used twice since it came and moves to the main queue; 2, the next in line, leaves and becomes a
    # ghost; 3 was used only once since it came, too little.
    assert replay(S3FIFO(3), [*trace, (0, [5])], capacity=3).victims == [(0, 2), (0, 3)]
    done = replay(S3FIFO(3), [*trace, (0, [2]), (0, [6]), (0, [7])], capacity=3)
    # The ghost 2 comes back straight into the main queue, and 6 leaves before it.
    assert done.victims == [(0, 2), (0, 3), (0, 4), (0, 6)]


def lecar_of_the_paper(requested: list[int], n: int, seed: int) -> list[int]:
    """Algorithm 1 and UpdateWeight; plain dicts, and lists with the oldest first."""
    draw = random.Random(seed)
    w_lru = w_lfu = 0.5
    uses: dict[int, int] = {}
    last: dict[int, int] = {}
    history: dict[str, list[int]] = {"lru": [], "lfu": []}
    left: dict[int, tuple[int, int]] = {}  # -> time, uses
    victims, cache = [], set()
    for now, x in enumerate(requested):
        if x not in cache:
            uses[x] = left[x][1] if x in left else 0
            for name, entries in history.items():
                if x in entries:
                    entries.remove(x)
                    gain = math.exp(0.45 * (0.005 ** (1 / n)) ** (now - left.pop(x)[0]))
                    w_lru, w_lfu = (w_lru, w_lfu * gain) if name == "lru" else (w_lru * gain, w_lfu)
                    w_lru, w_lfu = w_lru / (w_lru + w_lfu), w_lfu / (w_lru + w_lfu)
            if len(cache) == n:
                by = "lru" if draw.random() < w_lru else "lfu"
                order = (lambda y: last[y]) if by == "lru" else (lambda y: (uses[y], last[y]))
                victim = min(cache, key=order)
                if len(history[by]) == n:
                    left.pop(history[by].pop(0))
                history[by].append(victim)
                left[victim] = now, uses[victim]
                cache.remove(victim)
                victims.append(victim)
            cache.add(x)
        uses[x] += 1
        last[x] = now
    return victims


@settings(deadline=None)
@given(requested=requests, capacity=sizes, seed=st.integers(0, 5))
def test_lecar_does_what_its_paper_says(requested: list[int], capacity: int, seed: int) -> None:
    wanted = lecar_of_the_paper(requested, capacity, seed)
    assert victims_one_by_one(LeCaR(capacity, seed), requested, capacity) == wanted


def test_lecar_follows_frequency_once_recency_has_sent_the_wrong_ones_away() -> None:
    """1 and 2 are used again and again, between scans of newcomers: LRU evicts them, and regrets it."""
    rounds = [(0, [x]) for start in range(10, 130, 6) for x in (1, 2, *range(start, start + 6), 1, 2)]
    policy = LeCaR(4)
    hits = sum(replay(policy, rounds, capacity=4).hits)
    assert policy._weight_lru < 0.4
    assert hits > sum(replay(make("lru"), rounds, capacity=4).hits) == 38  # both, at the end of each round


# The learned baselines


def periodic(tokens: int) -> list[int]:
    """A steady beat of 8 that recency cannot see: 0 and 1 come often, 2 to 5 once each."""
    return [(0, 2, 1, 0, 3, 1, 4, 5)[i % 8] for i in range(tokens)]


def test_lrb_trains_on_the_run_itself_and_then_beats_lru_on_a_beat() -> None:
    trace: list[Event] = [(0, [x]) for x in periodic(1600)]
    geometry = Geometry(layers=1, experts=6, top_k=1, capacity=3)
    with mock.patch.object(lrb, "BATCH", 400):
        learned = replay(LRB(geometry), trace, capacity=3).hits[-800:]
    assert sum(learned) > sum(replay(make("lru"), trace, capacity=3).hits[-800:]) + 80


def test_lrb_labels_a_sample_with_its_next_use_or_with_twice_the_window() -> None:
    policy = LRB(Geometry(layers=1, experts=2, top_k=2, capacity=2))
    assert policy._window == 16
    with mock.patch.object(lrb, "BATCH", 10**6):
        for expert in (0, 0, 0):  # samples at 1, 2 and 3; the first two are used 1 event later
            policy.step(0, [expert])
        with mock.patch.object(policy, "_sample"):
            for _ in range(16):  # the third one waits its window out, at event 19
                policy.step(0, [1])
    assert policy._labels[: policy._labelled].tolist() == [math.log(2), math.log(2), math.log(33)]


def test_lrb_sees_age_gaps_and_decayed_counts_in_events_of_the_layer() -> None:
    policy = LRB(Geometry(layers=2, experts=4, top_k=1, capacity=4))
    for layer, expert in ((0, 3), (0, 3), (1, 3), (0, 0), (0, 3), (1, 1), (0, 1)):
        policy.step(layer, [expert])
    age, *rest = policy._look(np.array([0]), np.array([3]))[0].tolist()
    assert age == 1  # used in events 1, 2 and 4 of layer 0's 5
    assert rest[:2] == [2, 1] and all(math.isnan(gap) for gap in rest[2 : lrb.GAPS])
    assert rest[lrb.GAPS] == pytest.approx((1 + 0.5 * (1 + 0.5**0.5)) * 0.5**0.5)  # half-life 2


def one_layer(experts: list[list[int]], num_experts: int) -> RoutingTrace:
    rows = np.array(experts, dtype=np.uint8)[:, None, :]
    ends = np.array([0, len(rows)])
    return RoutingTrace("story", num_experts, rows, ends, np.arange(len(rows) + 1), ("set",))


pairs = st.lists(st.integers(0, 4), min_size=2, max_size=2, unique=True)


@settings(deadline=None)
@given(routed=st.lists(pairs, min_size=1, max_size=12))
def test_the_papers_network_learns_from_what_the_policy_sees_and_what_belady_knows(
    routed: list[list[int]],
) -> None:
    """Against a loop: 1 / r, f / max f, and the distance to the next use, 1 from 0.75 E on."""
    x, y = paper_network.examples(np.array(routed), experts=5)
    policy = PaperNetwork(random_weights(layers=1, experts=5))
    for t, experts in enumerate(routed):
        policy.step(0, experts)
        assert x[t].tolist() == paper_network.inputs(policy._age[0], policy._uses[0]).tolist()
        for expert in range(5):
            uses = [i for i in range(t + 1) if expert in routed[i]]
            recency = 1 / (t - uses[-1] + 1) if uses else 0
            most = max(sum(e in row for row in routed[: t + 1]) for e in range(5))
            assert x[t, [expert, 5 + expert]].tolist() == pytest.approx([recency, len(uses) / most])
            ahead = [i - t for i in range(t + 1, len(routed)) if expert in routed[i]]
            assert y[t, expert] == pytest.approx(min(ahead[0] if ahead else 99, 3.75) / 3.75)


def test_the_papers_network_beats_lru_on_a_beat_it_was_trained_on_and_is_the_same_every_time() -> None:
    trace = one_layer([[x] for x in periodic(1200)], 6)
    weights = paper_network.train(trace, epochs=30)
    assert [matrix.shape for matrix in weights.matrices] == [(1, 12, 64), (1, 64, 64), (1, 64, 6)]
    again = paper_network.train(trace, epochs=30)
    assert all(np.array_equal(a, b) for a, b in zip(weights.matrices, again.matrices, strict=True))

    events: list[Event] = [(0, [x]) for x in periodic(800)]
    learned = replay(PaperNetwork(weights), events, capacity=3).hits
    assert sum(learned) > sum(replay(make("lru"), events, capacity=3).hits) + 80


def test_the_papers_network_has_nothing_to_learn_from_an_empty_trace() -> None:
    with pytest.raises(ValueError, match="story has no tokens to train on"):
        paper_network.train(one_layer([[0]], 2).select([]))
