"""The lower of two tiers, in ids: who falls, who rises, who leaves for good."""

import random

import pytest

from cache_policies.lower_tier import LowerTier
from cache_policies.policy import ExpertId, Geometry
from cache_policies.registry import POLICY_NAMES, make_policy
from cache_policies.residency import Residency

LAYERS, EXPERTS, TOP_K = 2, 16, 2


def make_lower(capacity: int, above: int, policy: str = "lru") -> LowerTier:
    geometry = Geometry(LAYERS, EXPERTS, TOP_K, capacity)
    return LowerTier(make_policy(policy, geometry), geometry, 0, above)


def event(
    lower: LowerTier, lacking: list[ExpertId], leaving: list[ExpertId] | None = None, rising: bool = True
) -> tuple[list[ExpertId], list[ExpertId], list[ExpertId]]:
    """One event of what the upper tier lacks -> (read, victims, falling)."""
    lower.policy.step(lacking[0][0], [expert for _, expert in lacking])
    descent = lower.begin_below(lacking, lacking if rising else [], leaving or [])
    for key in descent.missing:
        lower.arrived(key)
    lower.settle()
    return descent.missing, descent.victims, descent.falling


def test_what_rises_is_not_counted_here_and_what_falls_is() -> None:
    lower = make_lower(4, 2)
    assert event(lower, [(0, 1), (0, 2)]) == ([(0, 1), (0, 2)], [], [])
    assert lower.residents == frozenset()
    event(lower, [(0, 3), (0, 4)], leaving=[(0, 1), (0, 2)])
    assert lower.residents == {(0, 1), (0, 2)}
    read, _, _ = event(lower, [(0, 1), (0, 2)], leaving=[(0, 3), (0, 4)])
    assert read == [] and lower.residents == {(0, 3), (0, 4)}


def test_what_is_only_used_stays_here() -> None:
    lower = make_lower(4, 2)
    event(lower, [(0, 1)], rising=False)
    assert event(lower, [(0, 1)], rising=False)[0] == [] and lower.residents == {(0, 1)}


def test_the_policy_chooses_between_residents_and_what_falls() -> None:
    lower = make_lower(16, 1, "lfu")  # one slot of the 16 is kept for what is on its way
    for expert in range(15):
        for _ in range(3):
            event(lower, [(0, expert)], rising=False)
    lower.policy.step(1, [7])
    lower.policy.inserted((1, 7))
    _, victims, falling = event(lower, [(1, 8)], leaving=[(1, 7)])
    assert (victims, falling) == ([], [])
    lower.policy.step(1, [8])
    for _ in range(4):
        lower.policy.step(1, [8])
    _, victims, falling = event(lower, [(1, 9)], leaving=[(1, 8)])
    assert (victims, falling) == ([(0, 0)], [(1, 8)])


@pytest.mark.parametrize("policy", POLICY_NAMES)
@pytest.mark.parametrize("capacity", [2, 7, 20])
def test_two_tiers_share_all_experts_and_nobody_is_in_both(policy: str, capacity: int) -> None:
    geometry = Geometry(LAYERS, EXPERTS, TOP_K, 12)
    upper, lower = Residency(make_policy(policy, geometry), geometry, 1), make_lower(capacity, 12, "lru")
    draw, reads = random.Random(1), 0
    for _ in range(300):
        layer = draw.randrange(LAYERS)
        routed = draw.sample(range(EXPERTS), 2)
        missing = upper.look_up(layer, routed)
        lower.policy.step(layer, routed)
        leaving = upper.make_room(layer, len(missing))
        if missing:
            descent = lower.begin_below(missing, missing, leaving)
            assert not {*descent.victims} & {*missing, *descent.falling}
            assert {*descent.falling} <= {*leaving}
            for key in missing:
                upper.arrived(key)
            for key in descent.missing:
                lower.arrived(key)
            reads += len(descent.missing)
            lower.settle()
        upper.settle()
        assert not upper.residents & lower.residents and len(lower.residents) <= capacity
        assert {(layer, expert) for expert in routed} <= upper.residents
    assert (reads <= LAYERS * EXPERTS) == (capacity == 20)  # 12 and 20 are all there are


def test_after_an_event_cut_short_only_what_is_present_is_resident() -> None:
    lower = make_lower(5, 2)
    event(lower, [(0, 1), (0, 2)], rising=False)
    lower.begin_below([(0, 1), (0, 3)], [(0, 1)], [(1, 5)])
    assert lower.recover({(0, 1), (0, 2)}) == []
    assert lower.residents == {(0, 1), (0, 2)} and not lower.held
