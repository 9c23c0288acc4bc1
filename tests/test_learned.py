"""The learned policy: its features against a plain reckoning, its files against LightGBM, its shadow, and
what it is worth on a stored trace. The contract that it shares with all policies is in test_policies.py."""

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_policies.decision_samples import FARTHEST, join, next_use_distances, sample_decisions
from cache_policies.learned import FEATURE_NAMES, Learned
from cache_policies.lfu_aged import HALF_LIFE
from cache_policies.native._learned import Trees
from cache_policies.policy import Geometry
from cache_policies.registry import make_policy
from cache_policies.replay import replay
from cache_policies.routing_trace import RoutingTrace, forwards_of, join_traces
from flashmoe import cli
from flashmoe.errors import ConfigError, FlashMoEError, PolicyError
from flashmoe.npz import write_npz
from flashmoe.policies import build_policy, check_policy
from flashmoe.policy_file import parse_policy, read_policy, shipped_policy
from flashmoe.processes import run_side_by_side
from flashmoe.trace import load_trace
from flashmoe.train_policy import (
    Fold,
    TrainOptions,
    evaluate,
    folds_of,
    train_policy,
    without_datasets,
    write_policy,
)
from storage.storage_errors import StorageError

SLICE = Path(__file__).parent / "data" / "gpt-oss-20b-slice.npz"
AGE = FEATURE_NAMES.index("age")


def one_split(feature: int, threshold: float, left: float, right: float) -> Trees:
    return Trees([0], [feature], [threshold], [-1], [-2], [False], [left, right])


def constant(value: float = 0.0) -> Trees:
    return Trees([-1], [], [], [], [], [], [value])


def random_trace(
    seed: int, tokens: int = 60, layers: int = 3, experts: int = 12, top_k: int = 3, chunk: int = 0
) -> RoutingTrace:
    """Sticky routing with scores, tokens that repeat, and a first chunk of `chunk` tokens."""
    rng = np.random.default_rng(seed)
    walk = np.cumsum(rng.normal(size=(tokens, layers, experts)), axis=0)
    scores = np.exp(walk) / np.exp(walk).sum(axis=2, keepdims=True)
    ids = np.argsort(-scores, axis=2)[:, :, :top_k]
    weights = np.take_along_axis(scores, ids, axis=2)
    phase = np.ones(tokens, dtype=np.uint8)
    phase[:chunk] = 0
    offsets = np.array([0, tokens], dtype=np.int64)
    return RoutingTrace(
        "random", experts, ids.astype(np.uint8), offsets, forwards_of(phase, offsets), ("a",),
        (weights / weights.sum(axis=2, keepdims=True)).astype(np.float16),
        scores.astype(np.float16), rng.integers(0, 8, tokens).astype(np.int32),
    )  # fmt: skip


# Features


class PlainFeatures:
    """The features from the raw events, reckoned anew each time."""

    def __init__(self, layers: int, experts: int, top_k: int) -> None:
        self.layers, self.experts, self.top_k = layers, experts, top_k
        self.events: list[list[tuple[list[int], list[float], list[float], int]]] = [[] for _ in range(layers)]
        self.alike: list[list[float]] = []  # of each token, to each before it, at its end

    def step(
        self, layer: int, routed: list[int], weights: list[float], scores: list[float], token: int
    ) -> None:
        self.events[layer].append((routed, weights, scores, token))

    def features(self, layer: int, expert: int, slots: float) -> list[float]:
        mine = self.events[layer]
        now, period = len(mine), self.experts / self.top_k
        uses = [i for i, event in enumerate(mine, 1) if expert in event[0]]
        age = now - uses[-1] if uses else now
        gaps = [b - a for a, b in zip(uses, uses[1:], strict=False)][::-1] + [math.nan, math.nan]
        row = [
            math.log2(1 + 4 * age / period), age / (1 + len(uses)), gaps[0] / period, gaps[1] / period,
            len(uses) / now * period, math.log2(1 + len(uses)),
        ]  # fmt: skip
        for half_life in (2, 6, 16, 32, 128, 640):
            count = sum(0.5 ** ((now - i) / half_life) for i in uses)
            row.append(count / sum(0.5 ** (i / half_life) for i in range(now)) * period)
        weight = {i: mine[i - 1][1][mine[i - 1][0].index(expert)] * self.top_k for i in uses}
        row += [sum(w * 0.5 ** ((now - i) / h) for i, w in weight.items()) for h in (6, 32)]
        row.append(weight[uses[-1]] if uses else math.nan)
        fast = slow = mine[0][2][expert]
        for event in mine[1:]:
            fast += 0.2 * (event[2][expert] - fast)
            slow += 0.03 * (event[2][expert] - slow)
        row += [math.log2(s * self.experts + 1e-4) for s in (mine[-1][2][expert], fast, slow)]
        shares = []
        for before in mine[-1][0]:
            follows = [b[0] for a, b in zip(mine, mine[1:], strict=False) if before in a[0]]
            shares.append(sum(expert in routed for routed in follows) / (len(follows) + 2))
        row += [sum(shares) / self.top_k * period, max(shares) * period]
        row += self._matches(layer, expert)
        row += [layer / self.layers, slots / self.experts, slots / self.top_k, 1 / period]
        return [*row, math.log2(min(now, 64) + 1)]

    def _common(self, layer: int, a: int, b: int) -> int:
        return len({*self.events[layer][a][0]} & {*self.events[layer][b][0]})

    def _context(self, token: int) -> list[float]:
        """What the tokens before contribute to a token's likeness with each before it."""
        context = []
        for place in range(token):
            before = 0.2 * self._alike(token - 1)[place - 1] if 0 < place < token else 0.0
            id = self.events[0][token][3]
            before += 4.0 if id >= 0 and self.events[0][place][3] == id else 0.0
            context.append(0.0 if before < 1e-3 else before)
        return context

    def _alike(self, token: int) -> list[float]:
        while len(self.alike) <= token:
            n = len(self.alike)
            common = [sum(self._common(x, p, n) for x in range(self.layers)) for p in range(n)]
            self.alike.append([a + b for a, b in zip(self._context(n), common, strict=True)])
        return self.alike[token]

    def _matches(self, layer: int, expert: int) -> list[float]:
        present = len(self.events[0]) - 1
        recent = [
            sum(0.85 ** (layer - x) * self._common(x, p, present) for x in range(layer + 1))
            for p in range(present)
        ]
        alike = [a + b for a, b in zip(recent, self._context(present), strict=True)]
        best = max(alike, default=0.0)
        if best <= 0:
            return [math.nan] * 5 + [0.0, 0.0]
        ranked = sorted((-a, p) for p, a in enumerate(alike) if a >= max(1e-3, best - 5 / 0.4))[:24]
        votes, distance, within = 0.0, 0.0, dict.fromkeys((1, 2, 4, 16), 0.0)
        for negative, place in ranked:
            vote = math.exp(0.4 * (-negative - best))
            ahead = next(
                (d for d in range(1, 17)
                 if place + d <= present and expert in self.events[layer][place + d][0]),
                17,
            )  # fmt: skip
            votes += vote
            distance += vote * ahead
            for d in within:
                within[d] += vote if ahead <= d else 0.0
        return [*(w / votes for w in within.values()), distance / votes, best / self.top_k, votes]


@pytest.mark.parametrize(("seed", "experts"), [(0, 12), (1, 12), (2, 12), (3, 12), (0, 70)])
def test_features_are_what_the_events_say(seed: int, experts: int) -> None:
    """70 experts: a set of them is more than one word."""
    trace = random_trace(seed, experts=experts)
    assert trace.weights is not None and trace.scores is not None and trace.tokens is not None
    policy = Learned(Geometry(3, experts, 3, 18), constant())
    plain = PlainFeatures(3, experts, 3)
    for row in range(len(trace)):
        for layer in range(3):
            event = (
                trace.experts[row, layer].tolist(), trace.weights[row, layer].tolist(),
                trace.scores[row, layer].tolist(), int(trace.tokens[row]),
            )  # fmt: skip
            policy.step(layer, event[0], event[1], np.array(event[2]), event[3])
            plain.step(layer, *event)
            if row % 7 == seed:
                for expert in range(experts):
                    np.testing.assert_allclose(
                        policy.core.features(layer, expert), plain.features(layer, expert, slots=6.0),
                        rtol=2e-3, atol=2e-4, err_msg=f"token {row}, layer {layer}, expert {expert}",
                    )  # fmt: skip


def test_what_is_not_known_is_not_a_number() -> None:
    policy = Learned(Geometry(1, 4, 1, 2), constant())
    policy.step(0, [2])
    row = dict(zip(FEATURE_NAMES, policy.core.features(0, 1), strict=True))
    assert [name for name, value in row.items() if math.isnan(value)] == [
        "gap", "gap_before", "last_weight", "score", "score_fast", "score_slow", "match_1", "match_2",
        "match_4", "match_16", "match_distance",
    ]  # fmt: skip


def test_a_prompt_seen_in_a_chunk_counts_as_if_seen_token_by_token() -> None:
    """Counts, gaps and transitions: all but the likeness of tokens, which needs them one by one."""
    trace = random_trace(5, tokens=20)
    by_token, by_layer = (Learned(Geometry(3, 12, 3, 18), constant()) for _ in range(2))
    for row in range(20):
        for layer in range(3):
            by_token.step(layer, trace.experts[row, layer].tolist())
    for layer in range(3):
        for row in range(20):
            by_layer.step(layer, trace.experts[row, layer].tolist())
    likeness = {i for i, name in enumerate(FEATURE_NAMES) if name.startswith("match")}
    for layer in range(3):
        for expert in range(12):
            rows = by_token.core.features(layer, expert), by_layer.core.features(layer, expert)
            for i, values in enumerate(zip(*rows, strict=True)):
                assert i in likeness or values[0] == values[1] or all(map(math.isnan, values))


@given(st.lists(st.floats(0, 1, width=32), min_size=4, max_size=4))
def test_scores_are_seen_in_the_width_that_a_trace_has(scores: list[float]) -> None:
    """So a run and the replay of its trace see the same."""
    rows = []
    for seen in (np.array(scores, dtype=np.float32), np.array(scores, dtype=np.float16)):
        policy = Learned(Geometry(1, 4, 1, 2), constant())
        policy.step(0, [0], [float(seen[0])], seen)
        rows.append([policy.core.features(0, expert) for expert in range(4)])
    np.testing.assert_array_equal(*rows)


def test_ids_that_the_geometry_does_not_know_are_errors() -> None:
    policy = Learned(Geometry(2, 4, 1, 2), constant())
    for call in (lambda: policy.step(2, [0]), lambda: policy.step(0, [4]), lambda: policy.inserted((0, -1)),
                 lambda: policy.victims([(0, 9)], 1)):  # fmt: skip
        with pytest.raises(IndexError, match="no (layer|expert)"):
            call()


def test_scores_of_another_width_are_an_error() -> None:
    """They were read past their end."""
    policy = Learned(Geometry(1, 4, 1, 2), constant())
    with pytest.raises(ValueError, match=r"scores of shape \(3,\), but a layer has 4 experts"):
        policy.step(0, [0], [1.0], [0.5, 0.25, 0.25])


@pytest.mark.parametrize("tokens", [1, 5])
def test_a_pass_that_was_cut_short_leaves_no_layer_behind_for_good(tokens: int) -> None:
    """Ctrl-C between two layers left the later ones an event behind: from then on they were compared with no
    past token, and the shadows stood still. `tokens` beyond 1: a chunk."""
    policy = Learned(Geometry(3, 4, 1, 1, per_layer=True), constant())
    for layer in range(2):
        for _ in range(tokens):
            policy.step(layer, [0], token=7)
    for i in range(10):  # layer 2 misses every time
        for layer, expert in ((0, 0), (1, 0), (2, i % 2)):
            policy.step(layer, [expert], token=7)
    assert policy.stats.learned_misses == policy.stats.simple_misses == 2 + 10
    row = dict(zip(FEATURE_NAMES, policy.core.features(2, 0), strict=True))
    assert row["match_likeness"] > 2, "layer 2 has matches, and its own part in them"


# Choosing


def test_the_expert_foretold_to_be_needed_last_leaves() -> None:
    """The tree says: not used for long means not needed for long."""
    policy = Learned(Geometry(1, 8, 1, 3), one_split(AGE, 0.6, left=1.0, right=5.0))
    for expert in (1, 2, 3):
        policy.step(0, [expert])
        policy.inserted((0, expert))
    assert policy.victims({(0, 1), (0, 2), (0, 3)}, 2) == [(0, 1), (0, 2)]


def test_with_shared_slots_an_expert_of_a_layer_about_to_run_is_needed_sooner() -> None:
    """All are foretold to be used in the next event of their layer; layer 2 is next, layer 1 last."""
    policy = Learned(Geometry(4, 20, 1, 60), constant(0.0))
    residents = [(layer, expert) for layer in range(4) for expert in range(15)]
    for key in residents:
        policy.inserted(key)
    policy.step(0, [19])
    policy.step(1, [19])
    assert [layer for layer, _ in policy.victims(residents, 60)] == [1] * 15 + [0] * 15 + [3] * 15 + [2] * 15


def replayed(trees: Trees, trace: RoutingTrace, geometry: Geometry) -> tuple[Learned, int]:
    policy = Learned(geometry, trees)
    return policy, replay(trace, policy, geometry).misses


@pytest.mark.parametrize("per_layer", [True, False])
def test_the_shadow_misses_as_often_as_the_policy_it_stands_for(per_layer: bool) -> None:
    trace = load_trace(SLICE).rows(0, 400)
    geometry = Geometry(24, 32, 4, 8 if per_layer else 8 * 24, per_layer)
    policy, misses = replayed(read_policy(), trace, geometry)
    assert policy.stats.learned_misses == misses, "never stepped back, so its own shadow is itself"
    simple = replay(trace, make_policy("lfu-aged", geometry), geometry).misses
    assert policy.stats.simple_misses == pytest.approx(simple, rel=2e-3)  # ties of float32 and float64
    assert HALF_LIFE == 32, "the native half-life is this one's"


def test_a_model_that_loses_steps_back_and_says_so() -> None:
    """This one keeps what was not used for longest."""
    trace = load_trace(SLICE).rows(0, 500)
    geometry = Geometry(24, 32, 4, 10, per_layer=True)
    policy, misses = replayed(one_split(AGE, 1.5, left=5.0, right=1.0), trace, geometry)
    stats = policy.stats
    assert stats.stepped_back and stats.step_backs == 1
    assert stats.tokens_stepped_back == 500 - 64
    assert stats.learned_misses > 1.2 * stats.simple_misses
    assert policy.summary.endswith("; stepped back to lfu-aged for 436 tokens, and is still")
    assert misses < stats.simple_misses + 0.25 * (stats.learned_misses - stats.simple_misses)


# Files


def trained(features: int = len(FEATURE_NAMES), rows: int = 3000) -> tuple["object", np.ndarray, str]:
    import lightgbm

    rng = np.random.default_rng(1)
    x = rng.normal(size=(rows, features)).astype(np.float32)
    x[rng.random(x.shape) < 0.2] = np.nan
    x[:, 3] = rng.normal(size=rows)  # one without NaN
    y = np.nan_to_num(x[:, 0]) * 2 + np.nan_to_num(x[:, 5]) ** 2 + (x[:, 3] > 0)
    names = list(FEATURE_NAMES) if features == len(FEATURE_NAMES) else [f"f{i}" for i in range(features)]
    data = lightgbm.Dataset(x, y, feature_name=names)
    booster = lightgbm.train(
        {"objective": "regression", "num_leaves": 31, "verbose": -1, "num_threads": 1}, data, 20
    )
    return booster, x, booster.model_to_string()


def test_trees_foretell_what_lightgbm_does() -> None:
    booster, x, text = trained()
    trees = parse_policy(text, "x")
    x[:50, 3] = np.nan  # unknown where the training knew all
    ours = [trees.predict(row.tolist()) for row in x[:500]]
    np.testing.assert_allclose(ours, booster.predict(x[:500]), rtol=1e-5, atol=1e-5)  # type: ignore[attr-defined]


POLICY_DAMAGE = {
    "no tree at all": (lambda t: "", "is not a LightGBM text file"),
    "another program's": (lambda t: "\x7fELF", "is not a LightGBM text file"),
    "other features": (lambda t: t.replace("match_16", "match_15"), "other features than the 32"),
    "another objective": (lambda t: t.replace("=regression", "=binary"), "objective 'binary'"),
    "trees cut off": (lambda t: t[: t.index("\nTree=0")], "holds no tree"),
    "a tree cut off": (lambda t: t[: t.index("left_child=")], "a tree.s leaf_value is missing"),
    "a feature too many": (lambda t: set_field(t, "split_feature", "32"), "asks for feature 32"),
    "a negative feature": (lambda t: set_field(t, "split_feature", "-1"), "asks for feature -1"),
    "a child out of range": (lambda t: set_field(t, "left_child", "99999"), "has no child 99999"),
    "a circle": (lambda t: set_field(t, "left_child", "0"), "not below it"),
    "half a child": (lambda t: set_field(t, "right_child", "0.5"), "is not the number"),
    "a leaf that is no number": (lambda t: set_field(t, "leaf_value", "nan"), "is not finite"),
    "a threshold that is a word": (lambda t: set_field(t, "threshold", "x"), "is missing or no number"),
    "a leaf beyond float32": (lambda t: set_field(t, "leaf_value", "1e300"), "leaf is too large"),
    "categorical splits": (lambda t: set_field(t, "decision_type", "1"), "splits of type 1"),
    "fewer thresholds than nodes": (lambda t: drop_number(t, "threshold"), "29 threshold for 30 nodes"),
}  # fmt: skip


def set_field(text: str, key: str, first: str) -> str:
    """The first number of the first tree's `key`."""
    at = text.index(f"\n{key}=") + len(key) + 2
    return text[:at] + first + text[text.index(" ", at) :]


def drop_number(text: str, key: str) -> str:
    at = text.index(f"\n{key}=") + len(key) + 2
    return text[:at] + text[text.index(" ", at) + 1 :]


@pytest.mark.parametrize("damage", POLICY_DAMAGE)
def test_a_damaged_or_foreign_policy_file_is_one_clear_line(damage: str, tmp_path: Path) -> None:
    change, message = POLICY_DAMAGE[damage]
    path = tmp_path / "mine.txt"
    path.write_text(change(shipped_policy()), "latin-1")
    with pytest.raises(PolicyError, match=message) as raised:
        read_policy(path)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


def test_a_policy_file_that_is_not_there_or_far_too_large_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=r"none\.txt cannot be read: No such file"):
        read_policy(tmp_path / "none.txt")
    large = tmp_path / "large.txt"
    with large.open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(PolicyError, match="a policy has at most"):
        read_policy(large)


@settings(max_examples=60)
@given(st.data())
def test_no_change_of_a_policy_file_crashes(data: st.DataObject) -> None:
    """It is refused, or gives trees that can be asked."""
    text = list(shipped_policy())
    for _ in range(data.draw(st.integers(1, 8))):
        text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.sampled_from("0123456789-. =\nTx"))
    try:
        trees = parse_policy("".join(text), "x")
    except PolicyError as error:
        assert "\n" not in str(error)
    else:
        assert isinstance(trees.predict([0.0] * len(FEATURE_NAMES)), float)


def test_policies_are_built_by_name_or_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text(shipped_policy())
    geometry = Geometry(2, 8, 2, 6)
    assert isinstance(build_policy(f"learned:{path}", geometry), Learned)
    assert build_policy("lru", geometry).name == "lru"
    for written, message in (("mru", "unknown policy 'mru'"), ("lru:x", "only learned takes a file"),
                             ("learned:", "only learned takes a file")):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            check_policy(written)
    for file, message in ((path.with_name("none"), "No such file"), ("~no-such-user/x", "home directory")):
        with pytest.raises(PolicyError, match=message):
            check_policy(f"learned:{file}")


def test_a_trace_of_absurdly_many_experts_is_refused_before_memory_is_taken() -> None:
    """A few bytes can declare 65,536 experts a layer, and the tables grow with their square."""
    with pytest.raises(PolicyError, match="MiB for 4 layers of 65536 experts; the limit is 1024 MiB"):
        build_policy("learned", Geometry(4, 1 << 16, 2, 8))
    with pytest.raises(PolicyError, match="3 layers of 65536 experts"):
        train_policy([replace(random_trace(0, tokens=600), num_experts=1 << 16)], QUICK)
    assert build_policy("learned", Geometry(61, 512, 8, 100)).name == "learned"


# Training


def test_distances_are_counted_in_events_of_the_experts_layer() -> None:
    experts = np.array([[[0], [1]], [[1], [0]], [[0], [1]], [[2], [2]]], dtype=np.uint8)
    offsets = np.array([0, 4], dtype=np.int64)
    trace = RoutingTrace("t", 3, experts, offsets, forwards_of(None, offsets), ("a",))
    asked = [(0, 0, 1), (0, 0, 0), (0, 1, 1), (1, 1, 1), (1, 2, 2), (0, 0, 3)]  # layer, expert, event
    layer, expert, event = np.array(asked).T
    assert next_use_distances(trace, layer, expert, event).tolist()[:5] == [2, 1, 1, 2, 2]
    assert next_use_distances(trace, layer, expert, event)[5] > FARTHEST


def test_samples_are_the_candidates_of_a_decision_with_the_truth() -> None:
    trace = random_trace(3, tokens=40, chunk=8)
    geometry = Geometry(3, 12, 3, 5, per_layer=True)
    observer = Learned(geometry, constant())
    samples = sample_decisions(trace, make_policy("lru", geometry), observer, geometry, 1.0, seed=0)
    assert len(samples) > 50
    assert samples.features.shape[1] == len(FEATURE_NAMES)
    assert samples.distance.min() >= 0 and samples.distance.max() <= math.log2(FARTHEST)
    observer = Learned(geometry, constant())
    hidden = sample_decisions(
        trace, make_policy("lru", geometry), observer, geometry, 1.0, seed=0, with_scores=False
    )
    score = FEATURE_NAMES.index("score")
    assert np.isnan(hidden.features[:, score]).all() and not np.isnan(samples.features[:, score]).any()
    both = join([samples, hidden])
    assert len(np.unique(both.decision)) == len(np.unique(samples.decision)) * 2


QUICK = TrainOptions(rounds=1, rows=30_000, jobs=1)


def test_a_policy_trained_on_one_part_of_a_trace_beats_the_simple_ones_on_the_other() -> None:
    """The stored slice is a piece of a real gpt-oss-20b trace (tests/data/README.md)."""
    trace = load_trace(SLICE)
    fold = Fold("second half", trace.rows(0, 700), trace.rows(700, len(trace)))
    text = train_policy([fold.train], QUICK)
    (row,) = evaluate(text, fold, shares=(0.25,), jobs=1)
    assert row.capacity == 8
    assert row.lru < row.best_simple < row.learned < row.belady
    assert row.gap_closed > 0.35, "trained on 700 tokens; the best simple policy closes 0.15"
    assert train_policy([fold.train], QUICK) == text, "training is reproducible"


def test_the_shipped_policy_beats_the_simple_ones_with_slots_of_a_layer_and_shared() -> None:
    trace = load_trace(SLICE)
    for geometry in (Geometry(24, 32, 4, 8, per_layer=True), Geometry(24, 32, 4, 8 * 24)):
        rates = {
            name: replay(trace, build_policy(name, geometry), geometry).hit_rate
            for name in ("lru", "lfu", "lfru", "lfu-aged", "learned")
        }
        assert max(rates, key=rates.__getitem__) == "learned"


def test_traces_too_short_to_learn_from_are_refused() -> None:
    with pytest.raises(PolicyError, match="hold 60 tokens; training needs 500"):
        train_policy([random_trace(0)], QUICK)


def test_a_policy_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(StorageError, match=r"cannot write .*a\.txt: Is a directory"):
        write_policy(tmp_path / "a.txt", "tree\n")
    assert list(tmp_path.iterdir()) == [tmp_path / "a.txt"], "nothing is left over"
    write_policy(tmp_path / "b.txt", "tree\n")
    assert (tmp_path / "b.txt").read_text() == "tree\n"


def test_a_training_whose_process_is_killed_is_one_line() -> None:
    with pytest.raises(FlashMoEError, match="a process was killed, for want of memory perhaps; try --jobs 1"):
        run_side_by_side(os._exit, [(1,), (1,)], 2, lambda number, result: None)


def test_folds_hold_whole_data_sets_out() -> None:
    parts = [replace(random_trace(i, 10), datasets=(name,)) for i, name in enumerate("abcdefgh")]
    whole = join_traces(parts, "x")
    folds = folds_of(whole)
    assert [fold.name for fold in folds] == ["a+b+c", "d+e+f", "a+g+h"]
    for fold in folds:
        assert not {*fold.train.datasets} & {*fold.test.datasets}
        assert len(fold.train) + len(fold.test) == len(whole)
    four = join_traces(parts[:4], "x")
    assert [fold.name for fold in folds_of(four)] == ["a+b", "c+d"], "each data set once; it was a+b again"
    one = join_traces([random_trace(i, 10) for i in range(10)], "x")
    assert [(len(f.train), len(f.test)) for f in folds_of(one)] == [(80, 20)]
    assert folds_of(random_trace(0)) == []


def training_on(tokens: int, path: Path) -> list[str]:
    """A trace of three data sets of so many tokens each, and a command that trains on it."""
    trace = join_traces(
        [replace(random_trace(i, tokens), datasets=(name,)) for i, name in enumerate("abc")], "x"
    )
    assert trace.weights is not None and trace.scores is not None and trace.tokens is not None
    arrays = {
        "experts": trace.experts, "seq_offsets": trace.seq_offsets, "dataset": np.array(trace.datasets),
        "num_experts": np.array(12), "weights": trace.weights, "scores": trace.scores, "token": trace.tokens,
    }  # fmt: skip
    write_npz(path, arrays)
    return ["train-policy", "--trace", str(path), "--trees", "3", "--jobs", "1", "--quiet"]


def test_train_policy_reports_on_what_it_holds_out_and_writes_a_policy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = training_on(300, tmp_path / "x.npz")
    out = str(tmp_path / "mine.txt")
    assert cli.main([*command, "--output", out, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["trace"], row["fold"], row["capacity"]) for row in rows] == [
        ("x", fold, capacity) for fold in "abc" for capacity in (3, 4, 6)
    ]
    assert all(row["lru"] <= row["belady"] and row["learned"] <= row["belady"] for row in rows)
    read_policy(Path(out))
    assert cli.main([*command, "--output", str(tmp_path / "none" / "mine.txt")]) == 1
    assert "no folder" in capsys.readouterr().err
    with pytest.raises(SystemExit) as left:  # it was a traceback of numpy's
        cli.main([*command, "--output", out, "--seed", "-1"])
    assert left.value.code == 2


def test_a_trace_too_short_for_a_report_is_trained_on_all_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two of three data sets of 170 tokens are less than a training needs; all three are enough."""
    command = training_on(170, tmp_path / "x.npz")
    assert cli.main([*command, "--output", str(tmp_path / "mine.txt"), "--json"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out) == {"rows": []}
    assert "x: too little is left to report on b, held out" in shown.err
    read_policy(tmp_path / "mine.txt")


def test_data_sets_can_be_kept_out_of_the_training() -> None:
    first, second = random_trace(1, 10), replace(random_trace(2, 20), datasets=("b",))
    assert [len(trace) for trace in without_datasets([first, second], ["b"])] == [10]
    assert [len(trace) for trace in without_datasets([first, second], [])] == [10, 20]
    with pytest.raises(PolicyError, match="no trace has the data set c; known are a, b"):
        without_datasets([first, second], ["a", "c"])


def test_joined_traces_come_apart_again() -> None:
    first, second = random_trace(1, 20, chunk=5), random_trace(2, 30)
    whole = join_traces([first, second], "both")
    assert whole.forward_offsets.tolist()[:4] == [0, 5, 6, 7] and len(whole) == 50
    for part, again in ((first, whole.select([0])), (second, whole.rows(20, 50))):
        np.testing.assert_array_equal(part.experts, again.experts)
        np.testing.assert_array_equal(part.forward_offsets, again.forward_offsets)
        np.testing.assert_array_equal(part.seq_offsets, again.seq_offsets)
    with pytest.raises(ValueError, match="2 different models"):
        join_traces([first, random_trace(1, experts=16)], "x")


