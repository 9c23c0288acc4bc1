"""Compare cache policies on recorded traces: hits of each, beside LRU and Belady. Imports no torch.

Replays are independent of each other and of the machine: they run in processes of their own and give the same
rows for any number of them.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from cache_policies.belady import Belady
from cache_policies.lru import LRU
from cache_policies.policy import Geometry
from cache_policies.replay import replay
from cache_policies.routing_trace import RoutingTrace
from flashmoe.errors import TraceError
from flashmoe.policies import LIVE_NAMES, build_policy
from flashmoe.processes import run_side_by_side
from flashmoe.trace import load_trace

SCOPES = ("layer", "global")
COLUMNS = ("trace", "scope", "capacity", "policy", "hit rate", "misses", "gap closed")
# Each gap is measured from the floor to the ceiling.
FLOOR, CEILING = LRU.name, Belady.name
USES_SCORES = ("learned",)
# Compared when nobody says what: not LRB, which takes some ten times as long as the others.
DEFAULT_NAMES = (*LIVE_NAMES, CEILING)

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Capacity:
    """How many experts of a layer are resident: a share of them, or a count."""

    amount: float
    is_share: bool

    def __str__(self) -> str:
        return f"{self.amount * 100:g}%" if self.is_share else f"{self.amount:g}"

    def of(self, num_experts: int) -> int:
        return round(num_experts * self.amount) if self.is_share else int(self.amount)


@dataclass(frozen=True, slots=True)
class CompareRow:
    """One replay. `capacity`: experts a layer, on average where the scope is global. `gap_closed`: of the
    way from LRU's hit rate to Belady's, None where there is none."""

    trace: str
    policy: str
    scope: str
    capacity: int
    events: int
    hits: int
    misses: int
    num_experts: int
    gap_closed: float | None = None

    @property
    def hit_rate(self) -> float:
        return self.hits / max(1, self.hits + self.misses)

    def as_dict(self) -> dict[str, Any]:
        return {
            "trace": self.trace,
            "policy": self.policy,
            "scope": self.scope,
            "capacity": self.capacity,
            "events": self.events,
            "hits": self.hits,
            "misses": self.misses,
            "hit_rate": self.hit_rate,
            "gap_closed": self.gap_closed,
        }

    def cells(self) -> tuple[str, ...]:
        """For people, under COLUMNS."""
        gap = "–" if self.gap_closed is None else f"{self.gap_closed:.1%}"
        share = f"{self.capacity} of {self.num_experts}"
        return self.trace, self.scope, share, self.policy, f"{self.hit_rate:.2%}", str(self.misses), gap


@dataclass(frozen=True, slots=True)
class Comparison:
    """`rows`: all replays, those of LRU and Belady too. `notes`: what was left out, and why."""

    rows: tuple[CompareRow, ...]
    notes: tuple[str, ...]

    def of(self, policies: Sequence[str]) -> list[CompareRow]:
        """The rows that were asked for, in the order of `policies` within a trace, scope and capacity."""
        order = {policy: number for number, policy in enumerate(policies)}
        groups = {key: number for number, key in enumerate(dict.fromkeys(map(_group, self.rows)))}
        asked = [row for row in self.rows if row.policy in order]
        return sorted(asked, key=lambda row: (groups[_group(row)], order[row.policy]))


def compare(
    paths: Sequence[Path],
    policies: Sequence[str],
    capacities: Sequence[Capacity],
    scopes: Sequence[str] = ("layer",),
    holdout: Sequence[str] = (),
    seed: int = 0,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Replay every trace under every policy, scope and capacity, and under LRU and Belady for comparison.

    `holdout`: only the sequences of these data sets. `jobs`: processes, None: one a core. A capacity that a
    trace cannot have is left out, with a note. Raises TraceError when nothing is left, or for a name in
    `holdout` that no trace knows.
    """
    replays, notes = _plan(paths, policies, capacities, scopes, tuple(holdout), seed)
    rows = _run(replays, jobs or os.cpu_count() or 1, progress)
    return Comparison(tuple(_with_gaps(rows)), tuple(notes))


@dataclass(frozen=True, slots=True)
class _Replay:
    """What a process needs to know for one row."""

    path: Path
    trace: str
    holdout: tuple[str, ...]
    policy: str
    scope: str
    capacity: int
    seed: int
    with_scores: bool


def _plan(
    paths: Sequence[Path],
    policies: Sequence[str],
    capacities: Sequence[Capacity],
    scopes: Sequence[str],
    holdout: tuple[str, ...],
    seed: int,
) -> tuple[list[_Replay], list[str]]:
    names = _names(paths)
    all_policies = (*dict.fromkeys((FLOOR, *policies, CEILING)),)
    replays: list[_Replay] = []
    notes: list[str] = []
    known: set[str] = set()
    for path, name in zip(paths, names, strict=True):
        trace = load_trace(path, with_scores=False)
        known.update(trace.datasets)
        if holdout and not set(holdout) & set(trace.datasets):
            notes.append(f"{name}: none of its sequences are of {', '.join(holdout)}: left out")
            continue
        counts = _counts(name, trace, capacities, notes)
        replays += [
            _Replay(path, name, holdout, policy, scope, count, seed, _wants_scores(policy))
            for scope in scopes
            for count in counts
            for policy in all_policies
        ]
    unknown = [name for name in holdout if name not in known]
    if unknown:
        raise TraceError(
            f"no trace has the data set {', '.join(unknown)}; known are {', '.join(sorted(known))}"
        )
    if not replays:
        raise TraceError(f"no capacity is left to replay: {'; '.join(notes)}")
    return replays, notes


def _wants_scores(policy: str) -> bool:
    """Whether it looks at the router's scores of all experts: for the others they need no memory."""
    return policy.partition(":")[0] in USES_SCORES


def _counts(name: str, trace: RoutingTrace, capacities: Sequence[Capacity], notes: list[str]) -> list[int]:
    counts: dict[int, None] = {}
    for capacity in capacities:
        count = capacity.of(trace.num_experts)
        if count < trace.top_k:
            notes.append(
                f"{name}: capacity {capacity} is {count} of {trace.num_experts} experts, below top-k"
                f" {trace.top_k}: left out"
            )
        elif count > trace.num_experts:
            notes.append(
                f"{name}: capacity {capacity} is more than its {trace.num_experts} experts: left out"
            )
        else:
            counts[count] = None
    return list(counts)


def _names(paths: Sequence[Path]) -> list[str]:
    """As the files are called; in full where that is not enough to tell them apart."""
    stems = [path.stem for path in paths]
    return [path.stem if stems.count(path.stem) == 1 else str(path) for path in paths]


def _run(replays: Sequence[_Replay], jobs: int, progress: Progress | None) -> list[CompareRow]:
    """One row each, in their order, whoever finishes first."""
    rows: dict[int, CompareRow] = {}

    def done(number: int, row: CompareRow) -> None:
        rows[number] = row
        if progress is not None:
            progress("replaying", len(rows), len(replays))

    # A process keeps one trace: those of one file, with or without scores, stand together.
    order = sorted(
        range(len(replays)), key=lambda number: (replays[number].path, replays[number].with_scores)
    )
    if min(jobs, len(replays)) > 1:
        cells = [(replays[number],) for number in order]
        run_side_by_side(_row, cells, min(jobs, len(cells)), lambda place, row: done(order[place], row))
    else:
        for number in order:
            done(number, _row(replays[number]))
        _trace.cache_clear()
    return [rows[number] for number in range(len(replays))]


def _row(one: _Replay) -> CompareRow:
    trace = _trace(one.path, one.holdout, one.with_scores)
    per_layer = one.scope == "layer"
    slots = one.capacity if per_layer else one.capacity * trace.layers
    geometry = Geometry(trace.layers, trace.num_experts, trace.top_k, slots, per_layer)
    counts = replay(trace, build_policy(one.policy, geometry, one.seed, trace), geometry)
    return CompareRow(
        one.trace, one.policy, one.scope, one.capacity, counts.events, counts.hits, counts.misses,
        trace.num_experts,
    )  # fmt: skip


@lru_cache(maxsize=1)
def _trace(path: Path, holdout: tuple[str, ...], with_scores: bool) -> RoutingTrace:
    """Kept from one replay to the next: they come trace by trace."""
    trace = load_trace(path, with_scores)
    return trace.of_datasets(holdout) if holdout else trace


def _with_gaps(rows: Sequence[CompareRow]) -> list[CompareRow]:
    rates = {(_group(row), row.policy): row.hit_rate for row in rows}
    closed = []
    for row in rows:
        floor, ceiling = rates[_group(row), FLOOR], rates[_group(row), CEILING]
        gap = (row.hit_rate - floor) / (ceiling - floor) if ceiling > floor else None
        closed.append(replace(row, gap_closed=gap))
    return closed


def _group(row: CompareRow) -> tuple[str, str, int]:
    return row.trace, row.scope, row.capacity
