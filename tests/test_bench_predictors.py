"""The comparison of predictors: its counting, by hand, and both of its ways over a tiny model."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from cache_policies.policy import Geometry
from cache_policies.registry import make_policy
from flashmoe.loader import plan_model
from scripts.bench_predictors import BOUND, CHANCE, Simulation, main


def test_guesses_are_held_against_the_misses_of_a_cache() -> None:
    geometry = Geometry(2, 8, 2, 3)
    simulation = Simulation(make_policy("lru", geometry), geometry, [1, 2])
    simulation.event(0, [0, 1], None, {}, count=False)
    simulation.event(1, [4, 5], None, {}, count=True)  # two misses of the first layer to count, unguessed
    assert (simulation.hits, simulation.misses, dict(simulation.sent)) == (0, 2, {})
    # 4 and 5 are resident: no guesses. 6 is right, 7 is wrong.
    simulation.event(1, [5, 6], None, {"some": [4, 5, 7, 6], "sure": [6]}, count=True)
    assert (simulation.hits, simulation.misses) == (1, 3)
    assert {key: (simulation.sent[key], simulation.right[key]) for key in simulation.sent} == {
        ("some", 1): (1, 0), ("some", 2): (2, 1), ("sure", 1): (1, 1), ("sure", 2): (1, 1),
        (CHANCE, 1): (1, 1 / 6), (CHANCE, 2): (2, 2 / 6), (BOUND, 1): (1, 1), (BOUND, 2): (1, 1),
    }  # fmt: skip


def report(tiny_model: Path, capsys: pytest.CaptureFixture[str], *options: str):  # type: ignore[no-untyped-def]
    main(["--model", str(tiny_model), "--ram-budget", "8G", "--tokens", "6", "--warm", "3", *options])
    *table, last = capsys.readouterr().out.splitlines()
    return table, json.loads(last)


def test_offline_every_predictor_stands_between_nothing_and_the_bound(
    tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table, facts = report(tiny_model, capsys, "--slots", "6,9", "--guesses", "2", "--sequence", "5")
    rows = facts["rows"]
    assert len(table) == 2 + len(rows) == 2 + 2 * 6
    for slots in (6, 9):
        of_cache = {row["predictor"]: row for row in rows if row["slots"] == slots}
        assert list(of_cache) == ["next-router", "transitions", "maps", "learned", CHANCE, BOUND]
        assert of_cache[BOUND]["precision"] == 1
        assert all(0 <= row["recall"] <= of_cache[BOUND]["recall"] < 1 for row in of_cache.values())
    assert rows[0]["routed"] > 0.5 and rows[0]["predict_us"] > 0


def test_live_each_predictor_is_held_against_none(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("flashmoe.api.plan_model", lambda *given: replace(plan_model(*given), slots=16))
    options = ("--live", "--rounds", "2", "--guesses", "2,auto", "--predictors", "next-router,maps")
    table, facts = report(tiny_model, capsys, *options)
    rows = facts["rows"]
    assert [(row["prefetch"], row["predictor"]) for row in rows[1:]] == [
        ("2", "next-router"), ("2", "maps"), ("auto", "next-router"), ("auto", "maps")
    ]  # fmt: skip
    done = ["off", *["at most 2 a layer"] * 2, *["auto, still measuring"] * 2]
    assert [row["verdict"] for row in rows] == done
    assert rows[0]["ratio"] == 1 and len(table) == 2 + len(rows)
    assert {row["per_token"]["hits"] + row["per_token"]["misses"] for row in rows} == {6}
    assert all(len(row["rounds"]) == 2 for row in rows)


def test_offline_has_nothing_to_decide_by_itself(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--guesses", "auto"])
    assert "--guesses are numbers where nothing is --live" in capsys.readouterr().err
