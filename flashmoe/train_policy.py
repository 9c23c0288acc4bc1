"""Train the learned policy on recorded traces, and report what it is worth on data sets it has not seen.

LightGBM regresses log2 of the own-layer events until an expert's next use, at the moments when a victim must
be chosen. In the first round LFU with ageing chooses, in the next ones the model trained so far. What was
tried instead is in docs/log.md.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache_policies.belady import Belady
from cache_policies.decision_samples import DecisionSamples, join, sample_decisions
from cache_policies.learned import FEATURE_NAMES, Learned
from cache_policies.lru import LRU
from cache_policies.native._learned import Trees
from cache_policies.policy import CachePolicy, Geometry
from cache_policies.registry import make_policy
from cache_policies.replay import replay
from cache_policies.routing_trace import RoutingTrace
from flashmoe.errors import PolicyError
from flashmoe.policies import check_learned_size
from flashmoe.policy_file import MOST_NODES, parse_policy
from flashmoe.processes import run_in_order
from storage.safetensors_writer import write_whole

# Slots of a layer as shares of its experts, that every training and report goes through.
CAPACITY_SHARES = (0.1875, 0.25, 0.3125, 0.375, 0.5)
SIMPLE_POLICIES = ("lfu", "lfu-aged", "lfru")
COLUMNS = ("capacity", "lru", "best simple", "learned", "belady", "gap closed", "misses against lru")
LEAST_TOKENS = 500

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class TrainOptions:
    """`rounds` beyond the first are on the policy's own decisions. `rows` of training data for each trace and
    round, about. 40 trees of 31 leaves: 80 close 0.2 points more of the gap and take twice the time."""

    trees: int = 40
    leaves: int = 31
    learning_rate: float = 0.1
    rounds: int = 1
    rows: int = 200_000
    seed: int = 0
    jobs: int | None = None


@dataclass(frozen=True, slots=True)
class HeldOutRow:
    """Hit rates on held-out sequences with `capacity` slots a layer."""

    fold: str
    capacity: int
    lru: float
    best_simple: float
    best_simple_name: str
    learned: float
    belady: float

    @property
    def gap_closed(self) -> float:
        """Of the way from LRU to Belady; 0 where there is none."""
        return (self.learned - self.lru) / (self.belady - self.lru) if self.belady > self.lru else 0.0

    def cells(self) -> tuple[str, ...]:
        """For people, under COLUMNS."""
        fewer = (1 - self.learned) / (1 - self.lru) - 1 if self.lru < 1 else 0.0
        return (
            str(self.capacity), f"{self.lru:.2%}", f"{self.best_simple:.2%} {self.best_simple_name}",
            f"{self.learned:.2%}", f"{self.belady:.2%}", f"{self.gap_closed:.1%}", f"{fewer:+.1%}",
        )  # fmt: skip

    def as_dict(self) -> dict[str, Any]:
        return {
            "fold": self.fold, "capacity": self.capacity, "lru": self.lru, "best_simple": self.best_simple,
            "best_simple_name": self.best_simple_name, "learned": self.learned, "belady": self.belady,
            "gap_closed": self.gap_closed,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Fold:
    """Sequences to train on and sequences to report on, of one trace."""

    name: str
    train: RoutingTrace
    test: RoutingTrace


def folds_of(trace: RoutingTrace, count: int = 3) -> list[Fold]:
    """Held-out splits by data set: of the names in order, each fold tests every `count`-th block, the last
    filled up from the front. With one data set the last fifth of its sequences is held out, and with one
    sequence nothing can be."""
    names = sorted(set(trace.datasets))
    if len(names) == 1:
        cut = max(1, round(len(trace.datasets) * 0.8))
        if cut == len(trace.datasets):
            return []
        later = range(cut, len(trace.datasets))
        return [Fold("last fifth", trace.select(range(cut)), trace.select(later))]
    count = min(count, len(names))
    size = -(-len(names) // count)
    folds = []
    for number in range(-(-len(names) // size)):  # of four names two blocks of two are all
        tested = sorted({names[(number * size + i) % len(names)] for i in range(size)})
        rest = [name for name in names if name not in tested]
        folds.append(Fold("+".join(tested), trace.of_datasets(rest), trace.of_datasets(tested)))
    return folds


def without_datasets(traces: Sequence[RoutingTrace], names: Sequence[str]) -> list[RoutingTrace]:
    """What is left of the traces without these data sets. PolicyError for a name that none of them has."""
    known = {dataset for trace in traces for dataset in trace.datasets}
    unknown = [name for name in names if name not in known]
    if unknown:
        listed = ", ".join(sorted(known))
        raise PolicyError(f"no trace has the data set {', '.join(unknown)}; known are {listed}")
    kept = [trace.of_datasets(known.difference(names)) for trace in traces]
    return [trace for trace in kept if len(trace)]


def train_policy(
    traces: Sequence[RoutingTrace], options: TrainOptions | None = None, progress: Progress | None = None
) -> str:
    """A policy file's text. Raises PolicyError when the traces are too short to learn from."""
    options = options or TrainOptions()
    if options.trees * (options.leaves - 1) > MOST_NODES:
        raise PolicyError(
            f"{options.trees} trees of {options.leaves} leaves exceed the {MOST_NODES} nodes of a policy;"
            " 40 trees of 31 do well"
        )
    tokens = sum(map(len, traces))
    if tokens < LEAST_TOKENS:
        raise PolicyError(
            f"the traces hold {tokens} tokens; training needs {LEAST_TOKENS} and likes some ten thousand"
        )
    for trace in traces:
        check_learned_size(trace.layers, trace.num_experts, trace.top_k)
    parts: list[DecisionSamples] = []
    text = None
    for number in range(options.rounds + 1):
        parts.append(_collect(traces, text, options, number, progress))
        if not len(parts[0]):
            raise PolicyError("no policy had anything to choose in these traces; record longer ones")
        text = _fit(join(parts), options)
    assert text is not None
    return text


def evaluate(
    text: str, fold: Fold, shares: Sequence[float] = CAPACITY_SHARES, jobs: int | None = None
) -> list[HeldOutRow]:
    """Replay the fold's test sequences under the trained policy and those that it is compared with."""
    trace = fold.test
    capacities = _capacities(trace, shares)
    names = (LRU.name, *SIMPLE_POLICIES, Learned.name, Belady.name)
    cells = [(trace, name, capacity, text) for capacity in capacities for name in names]
    rates = iter(run_in_order(_hit_rate, cells, jobs))
    rows = []
    for capacity in capacities:
        lru, *simple, learned, belady = (next(rates) for _ in names)
        best = max(range(len(simple)), key=simple.__getitem__)
        rows.append(
            HeldOutRow(fold.name, capacity, lru, simple[best], SIMPLE_POLICIES[best], learned, belady)
        )
    return rows


def mean_hit_rate(text: str, trace: RoutingTrace, jobs: int | None = None) -> float:
    """Of a policy file's text alone, over CAPACITY_SHARES of a layer's experts."""
    cells = [(trace, Learned.name, capacity, text) for capacity in _capacities(trace, CAPACITY_SHARES)]
    rates: list[float] = run_in_order(_hit_rate, cells, jobs)
    return sum(rates) / len(rates)


def _capacities(trace: RoutingTrace, shares: Sequence[float]) -> list[int]:
    return sorted({max(trace.top_k, round(share * trace.num_experts)) for share in shares})


def _hit_rate(trace: RoutingTrace, name: str, capacity: int, text: str) -> float:
    geometry = Geometry(trace.layers, trace.num_experts, trace.top_k, capacity, per_layer=True)
    policy: CachePolicy
    if name == Learned.name:
        policy = Learned(geometry, parse_policy(text, "the policy just trained"))
    else:
        policy = make_policy(name, geometry, trace=trace)
    return replay(trace, policy, geometry).hit_rate


def _collect(
    traces: Sequence[RoutingTrace],
    text: str | None,
    options: TrainOptions,
    number: int,
    progress: Progress | None,
) -> DecisionSamples:
    """One round's samples: each trace's sequences are dealt out to the capacities, so that every token is
    replayed once."""
    cells = []
    for index, trace in enumerate(traces):
        for place, share in enumerate(CAPACITY_SHARES):
            dealt = range((place + number) % len(CAPACITY_SHARES), len(trace.datasets), len(CAPACITY_SHARES))
            chosen = trace.select(dealt) if len(trace.datasets) >= len(CAPACITY_SHARES) else trace
            if len(chosen):
                capacity = max(trace.top_k + 1, round(share * trace.num_experts))
                rows = options.rows / len(CAPACITY_SHARES)
                seed = options.seed + 1000 * number + 10 * index + place
                cells.append((chosen, capacity, text, rows, seed))
    parts = run_in_order(_samples, cells, options.jobs, progress, f"sampling, round {number + 1}")
    return join(parts)


def _samples(trace: RoutingTrace, capacity: int, text: str | None, rows: float, seed: int) -> DecisionSamples:
    geometry = Geometry(trace.layers, trace.num_experts, trace.top_k, capacity, per_layer=True)
    nothing = Trees([~0], [], [], [], [], [], [0.0])
    observer = Learned(geometry, nothing if text is None else parse_policy(text, "the policy so far"))
    policy = make_policy("lfu-aged", geometry) if text is None else observer
    # About this many decisions: one event in two lacks something, and lets one of `capacity` go.
    share = min(1.0, rows / (0.5 * len(trace) * trace.layers * capacity))
    # For three of the five capacities the samples are as of traces that lack the router's scores.
    with_scores = bool(seed % 2)
    return sample_decisions(trace, policy, observer, geometry, share, seed, with_scores)


def _fit(samples: DecisionSamples, options: TrainOptions) -> str:
    import lightgbm

    parameters: dict[str, Any] = {
        "objective": "regression",
        "num_leaves": options.leaves,
        "learning_rate": options.learning_rate,
        "min_data_in_leaf": 100,
        "feature_fraction": 0.8,
        "bagging_fraction": 0.8,
        "bagging_freq": 1,
        "seed": options.seed,
        "deterministic": True,
        "force_row_wise": True,
        "num_threads": options.jobs or os.cpu_count() or 1,
        "verbose": -1,
    }
    data = lightgbm.Dataset(samples.features, samples.distance, feature_name=list(FEATURE_NAMES))
    text: str = lightgbm.train(parameters, data, options.trees).model_to_string()
    # Everything behind the trees (importances, parameters with their paths) is no part of a policy.
    return text.split("end of trees")[0] + "end of trees\n"


def write_policy(path: Path, text: str) -> None:
    """All of it or nothing. Raises StorageError."""
    write_whole(path, text.encode("ascii"))
