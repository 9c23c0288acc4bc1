"""When to come back: from a clock that the test holds."""

import pytest

from flashmoe.queue_pace import LONGEST_S, RECENT, SHORTEST_S, UNKNOWN_S, QueuePace


class Clock:
    """Stands still unless it is moved."""

    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def pace(clock: Clock) -> QueuePace:
    return QueuePace(clock)


def run(pace: QueuePace, clock: Clock, number: int, seconds: float) -> None:
    pace.begins(number)
    clock.now_s += seconds
    pace.ends(number)


def test_nothing_is_known_at_first(pace: QueuePace) -> None:
    assert pace.wait_s(ahead=64, running=0) == UNKNOWN_S


def test_each_that_runs_takes_as_long_as_recent_ones_took(pace: QueuePace, clock: Clock) -> None:
    for number, seconds in enumerate([4.0, 8.0]):
        run(pace, clock, number, seconds)
    assert pace.wait_s(ahead=3, running=1) == 4 * 6.0
    assert pace.wait_s(ahead=3, running=8) == 3.0


def test_those_that_run_longer_than_all_before_count(pace: QueuePace, clock: Clock) -> None:
    """Also before any has ended."""
    pace.begins(1)
    clock.now_s += 10
    pace.begins(2)
    clock.now_s += 10
    assert pace.wait_s(ahead=1, running=2) == 15.0
    run(pace, clock, 3, 0.5)
    assert pace.wait_s(ahead=1, running=2) == 15.5


def test_what_was_long_ago_is_forgotten(pace: QueuePace, clock: Clock) -> None:
    run(pace, clock, 0, 1000.0)
    for number in range(1, RECENT + 1):
        run(pace, clock, number, 2.0)
    assert pace.wait_s(ahead=4, running=2) == 5.0


def test_it_is_neither_at_once_nor_never(pace: QueuePace, clock: Clock) -> None:
    run(pace, clock, 0, 0.001)
    assert pace.wait_s(ahead=1, running=8) == SHORTEST_S
    run(pace, clock, 1, 1e6)
    assert pace.wait_s(ahead=64, running=1) == LONGEST_S


def test_one_that_gave_way_keeps_its_first_time_and_one_that_never_ran_has_none(
    pace: QueuePace, clock: Clock
) -> None:
    pace.begins(7)
    clock.now_s += 5
    pace.begins(7)  # again
    clock.now_s += 5
    pace.ends(7)
    pace.ends(7)
    pace.ends(8)
    assert pace.wait_s(ahead=0, running=1) == 10.0
