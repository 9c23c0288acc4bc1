"""What a policy costs: replayed events a second, and the time of one observation and one decision.

    python -m scripts.bench_policies --trace gpt-oss-20b.npz --policies lru,lfu-aged,learned --capacity 8

Policies take turns, each round from an empty cache; medians and the spread over the rounds. The bound is what
a bare loop over the same events costs: Python lists, tuples of ids and a set of residents, with no policy.
"""

import argparse
import json
import statistics
import time
from collections.abc import Collection, Sequence
from pathlib import Path

from cache_policies.policy import CachePolicy, ExpertId, Geometry
from cache_policies.replay import replay
from cache_policies.routing_trace import RoutingTrace
from flashmoe.policies import build_policy
from flashmoe.trace import load_trace


class Timed(CachePolicy):
    """Lets another policy work and looks at the clock before and after."""

    name = "timed"

    def __init__(self, policy: CachePolicy) -> None:
        self._policy = policy
        self.step_ns: list[int] = []
        self.victims_ns: list[int] = []

    def step(
        self,
        layer: int,
        routed: Sequence[int],
        weights: Sequence[float] | None = None,
        scores: Sequence[float] | None = None,
        token: int = -1,
    ) -> None:
        begin = time.perf_counter_ns()
        self._policy.step(layer, routed, weights, scores, token)
        self.step_ns.append(time.perf_counter_ns() - begin)

    def inserted(self, expert: ExpertId) -> None:
        self._policy.inserted(expert)

    def victims(self, candidates: Collection[ExpertId], n: int) -> list[ExpertId]:
        begin = time.perf_counter_ns()
        chosen = self._policy.victims(candidates, n)
        self.victims_ns.append(time.perf_counter_ns() - begin)
        return chosen


class NoPolicy(CachePolicy):
    """Whatever comes first leaves: the cost of everything else."""

    name = "none"

    def step(self, layer, routed, weights=None, scores=None, token=-1) -> None:  # type: ignore[no-untyped-def]
        pass

    def victims(self, candidates: Collection[ExpertId], n: int) -> list[ExpertId]:
        several = iter(candidates)
        return [next(several) for _ in range(n)]


def build(name: str, trace: RoutingTrace, geometry: Geometry) -> CachePolicy:
    return NoPolicy() if name == NoPolicy.name else build_policy(name, geometry, 0, trace)


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--policies", default="lru,lfu-aged,learned")
    parser.add_argument("--capacity", type=int, required=True, help="slots a layer")
    parser.add_argument("--scope", choices=("layer", "global"), default="layer")
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    trace = load_trace(arguments.trace).rows(0, arguments.tokens)
    per_layer = arguments.scope == "layer"
    slots = arguments.capacity * (1 if per_layer else trace.layers)
    geometry = Geometry(trace.layers, trace.num_experts, trace.top_k, slots, per_layer)
    names = [NoPolicy.name, *arguments.policies.split(",")]
    speeds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(arguments.rounds):
        for name in names:
            policy = build(name, trace, geometry)
            begin = time.process_time()
            counts = replay(trace, policy, geometry)
            speeds[name].append(counts.events / (time.process_time() - begin))
    rows = []
    print(f"{trace.name}: {len(trace)} tokens, {trace.layers} x {trace.num_experts} experts,"
          f" top-{trace.top_k}; {arguments.capacity} slots a layer, scope {arguments.scope}")  # fmt: skip
    heads = ("events/s", "spread", "us/observation", "us/decision", "p99", "ms/token")
    print("{:12} {:>10} {:>17} {:>15} {:>12} {:>7} {:>9}".format("policy", *heads))
    for name in names:
        timed = Timed(build(name, trace, geometry))
        replay(trace, timed, geometry)
        ordered = sorted(speeds[name])
        row = {
            "policy": name,
            "events_per_s": statistics.median(ordered),
            "spread": [ordered[0], ordered[-1]],
            "us_per_observation": statistics.median(timed.step_ns) / 1e3,
            "us_per_decision": statistics.median(timed.victims_ns) / 1e3,
            "us_per_decision_p99": sorted(timed.victims_ns)[int(0.99 * len(timed.victims_ns))] / 1e3,
            "ms_per_token": (sum(timed.step_ns) + sum(timed.victims_ns)) / 1e6 / len(trace),
        }
        rows.append(row)
        print(f"{name:12} {row['events_per_s']:10.0f} {ordered[0]:8.0f}-{ordered[-1]:8.0f}"
              f" {row['us_per_observation']:15.1f} {row['us_per_decision']:12.1f}"
              f" {row['us_per_decision_p99']:7.1f} {row['ms_per_token']:9.2f}")  # fmt: skip
    facts = {"trace": trace.name, "capacity": arguments.capacity, "scope": arguments.scope, "rows": rows}
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
