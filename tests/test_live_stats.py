"""The live figures: right before, between and behind steps, of the experts that the cache has."""

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
from test_vram_cache import make_tiers

from flashmoe import LLM
from flashmoe.server.live_stats import LiveStats, bitmaps
from flashmoe.vram_budget import VramPlan

PROMPT = "the expert that was used longest ago leaves first"


@pytest.fixture
def llm(tiny_model: Path) -> Iterator[LLM]:
    with LLM(tiny_model, ram_budget="8G", context=512) as llm:
        yield llm


def residents(rows: list[str], experts: int) -> set[tuple[int, int]]:
    bits = [int(row, 16) for row in rows]
    return {(layer, e) for layer, row in enumerate(bits) for e in range(experts) if row >> e & 1}


def test_a_bitmap_names_expert_zero_by_its_lowest_bit() -> None:
    assert bitmaps([(0, 0), (0, 8), (2, 3)], layers=3, experts=9) == ["101", "000", "008"]


def test_figures_are_there_before_the_first_step(llm: LLM) -> None:
    live = LiveStats(llm, "tiny")
    figures = live.snapshot()
    assert figures["model"] == "tiny"
    assert figures["cache"]["layers"] == [0, 1, 2]
    assert residents(figures["cache"]["resident"], 8) == llm.expert_cache.resident
    assert figures["tokens"]["per_s"] == 0.0 and figures["cache"]["recent"] == []
    assert figures["memory"]["rss_bytes"] > 0
    assert dict(figures["memory"]["parts"])["expert slots"] == llm.plan.slots_bytes
    json.dumps(figures, allow_nan=False)


def test_once_nothing_runs_the_figures_are_those_of_the_cache(llm: LLM) -> None:
    """Looks are rare while steps come fast: the last one must not be left out."""
    live = LiveStats(llm)
    llm.generate(PROMPT, max_tokens=9)
    cache = live.snapshot()["cache"]
    assert residents(cache["resident"], 8) == llm.expert_cache.resident
    assert cache["hits"] == llm.expert_cache.counters.hits
    assert cache["misses"] == llm.expert_cache.counters.misses == len(llm.expert_cache.resident)
    assert sum(step["hits"] for step in cache["recent"]) == cache["hits"]


def test_each_step_is_kept_and_only_the_last_120(llm: LLM) -> None:
    live = LiveStats(llm)
    llm.generate(PROMPT, max_tokens=130)
    figures = live.snapshot()
    recent = figures["cache"]["recent"]
    assert len(recent) == 120
    assert sum(step["tokens"] for step in recent) == 120
    assert all(step["step_s"] > 0 and step["hits"] + step["misses"] == 3 * 2 for step in recent)
    assert figures["tokens"]["per_s"] > 0
    assert figures["cache"]["hit_rate"] > 0.9  # all eight experts of each layer fit


def test_what_was_served_is_counted(llm: LLM) -> None:
    live = LiveStats(llm)
    first = llm.generate(PROMPT, max_tokens=5)
    llm.generate(PROMPT, max_tokens=5)  # the keys and values of its prompt are still there
    figures = live.snapshot()
    assert figures["requests"] == {
        "running": 0, "waiting": 0, "queue_limit": llm.scheduler.most_waiting,
        "finished": 2, "cancelled": 0, "failed": 0,
    }  # fmt: skip
    prompt = first.stats.prompt_tokens
    assert figures["tokens"]["prompt"] == 2 * prompt
    assert figures["tokens"]["cached"] == prompt - 1  # the last token's logits are needed
    assert figures["tokens"]["generated"] == 10
    assert 0 < figures["kv"]["tokens_used"] <= figures["kv"]["tokens_total"]


def test_while_somebody_watches_looks_are_frequent(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """And while nobody does, rare: a look takes some milliseconds of the computing thread."""
    live = LiveStats(llm)
    looks: list[int] = []
    look = live._look
    monkeypatch.setattr(live, "_look", lambda: (looks.append(1), look()))
    monkeypatch.setattr("flashmoe.server.live_stats.LOOK_EVERY_S", 0.0)
    monkeypatch.setattr("flashmoe.server.live_stats.UNWATCHED_S", 1e9)
    llm.generate(PROMPT, max_tokens=20)
    assert len(looks) == 1  # at the end
    monkeypatch.setattr("flashmoe.server.live_stats.WATCHED_S", 1e9)
    live.snapshot()
    llm.generate(PROMPT, max_tokens=20)
    assert len(looks) == 1 + 20


def test_the_figures_of_a_gpu_are_those_of_vram(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cache is the upper one of two tiers."""
    tiers = make_tiers(vram=8, ram=8)
    monkeypatch.setattr(llm, "expert_cache", tiers.cache)
    monkeypatch.setattr(llm, "plan", replace(llm.plan, vram=cast(VramPlan, object())))
    live = LiveStats(llm)
    tiers.decode(0, [1, 2])
    tiers.decode(0, [2, 3])
    live.note_step()
    cache = live.snapshot()["cache"]
    assert cache["tier"] == "VRAM"
    assert residents(cache["resident"], 8) == tiers.cache.resident == {(0, 1), (0, 2), (0, 3)}
    assert (cache["hits"], cache["misses"]) == (1, 3)
    assert cache["slots"] == tiers.cache.slots


def test_whoever_listened_to_steps_before_still_does(llm: LLM) -> None:
    heard: list[int] = []
    llm.scheduler.after_step = lambda: heard.append(1)
    LiveStats(llm)
    llm.generate(PROMPT, max_tokens=3)
    assert len(heard) == 3


def test_any_thread_may_ask_while_steps_come(llm: LLM) -> None:
    live = LiveStats(llm)
    wrong: list[BaseException] = []
    over = threading.Event()

    def ask() -> None:
        try:
            while not over.is_set():
                figures = live.snapshot()
                assert len(figures["cache"]["resident"]) == 3
        except BaseException as error:
            wrong.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    llm.generate(PROMPT, max_tokens=100)
    over.set()
    asking.join()
    assert not wrong
