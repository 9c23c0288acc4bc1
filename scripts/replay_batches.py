#!/usr/bin/env python3
"""How many expert reads a token costs when several sequences decode together, by policy and by Belady.

    flashmoe trace --text prompts.jsonl --output mine.npz
    python scripts/replay_batches.py --trace mine.npz --capacity 352,560 --policies lru,lfu,learned

Sequences of a trace step together: one event a layer, of all their tokens, as flashmoe/scheduler.py has it.
`union` is how many experts of a layer one step needs; misses are per token, over the second half of the
steps. Belady knows the future, so what it needs nobody can save: where its misses per token do not fall with
the number of sequences, a drive-bound server gains nothing from more of them.
"""

import argparse
from bisect import bisect_right
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from cache_policies.policy import CachePolicy, ExpertId, Geometry
from cache_policies.residency import Residency
from cache_policies.routing_trace import RoutingTrace
from flashmoe.policies import build_policy
from flashmoe.trace import load_trace

Step = list[int]  # rows of the trace, one a sequence


def main() -> None:
    options = parse_arguments()
    trace = load_trace(options.trace)
    policies = [*options.policies.split(","), "belady"]
    print("capacity, sequences, union, " + ", ".join(f"{policy} misses/token" for policy in policies))
    for capacity in map(int, options.capacity.split(",")):
        for sequences in map(int, options.sequences.split(",")):
            draws = [lockstep(trace, sequences, options.steps, seed) for seed in range(options.draws)]
            unions = [len(u) for steps in draws for rows in steps for u in unions_of(trace, rows)]
            found = [
                np.mean([misses(trace, steps, policy, capacity) for steps in draws]) for policy in policies
            ]
            print(f"{capacity}, {sequences}, {np.mean(unions):.1f}, "
                  + ", ".join(f"{value:.1f}" for value in found), flush=True)  # fmt: skip


def lockstep(trace: RoutingTrace, sequences: int, steps: int, seed: int) -> list[Step]:
    """The last `steps` tokens of some sequences, drawn by lot, side by side."""
    bounds = zip(trace.seq_offsets[:-1], trace.seq_offsets[1:], strict=True)
    ends = [int(end) for begin, end in bounds if end - begin >= steps]
    if len(ends) < sequences:
        raise SystemExit(f"{len(ends)} sequences have {steps} tokens; {sequences} are wanted: fewer --steps?")
    chosen = np.random.default_rng(seed).choice(ends, sequences, replace=False)
    return [[int(end) - steps + i for end in chosen] for i in range(steps)]


def unions_of(trace: RoutingTrace, rows: Step) -> list[list[int]]:
    """The experts that a step needs, layer by layer, each once."""
    return [list(dict.fromkeys(trace.experts[rows, layer].ravel().tolist())) for layer in range(trace.layers)]


def misses(trace: RoutingTrace, steps: Sequence[Step], name: str, capacity: int) -> float:
    """Per token, over the second half."""
    events = [(layer, rows, needed) for rows in steps for layer, needed in enumerate(unions_of(trace, rows))]
    geometry = Geometry(trace.layers, trace.num_experts, trace.top_k, capacity)
    policy = Future(events) if name == "belady" else build_policy(name, geometry)
    residency, missed, half = Residency(policy, geometry), 0, len(events) // 2
    for number, (layer, rows, needed) in enumerate(events):
        if isinstance(policy, Future):
            policy.now = number
        for row in rows:
            policy.step(
                layer,
                trace.experts[row, layer].tolist(),
                None if trace.weights is None else trace.weights[row, layer].astype(np.float64).tolist(),
                None if trace.scores is None else trace.scores[row, layer].astype(np.float32),
                -1 if trace.tokens is None else int(trace.tokens[row]),
            )
        missing, _ = residency.begin_together(layer, needed)
        for key in missing:
            residency.arrived(key)
        residency.settle()
        missed += len(missing) if number >= half else 0
    return missed / (len(steps) - len(steps) // 2) / len(steps[0])


class Future(CachePolicy):
    """Belady over events of several tokens."""

    name = "belady"

    def __init__(self, events: Sequence[tuple[int, Step, list[int]]]) -> None:
        self.now = 0
        self._uses: dict[ExpertId, list[int]] = {}
        for number, (layer, _, needed) in enumerate(events):
            for expert in needed:
                self._uses.setdefault((layer, expert), []).append(number)

    def step(self, *event: object) -> None:
        """It knows."""

    def victims(self, candidates: Collection[ExpertId], n: int) -> list[ExpertId]:
        return sorted(candidates, key=lambda key: (-self._next_use(key), key))[:n]

    def _next_use(self, key: ExpertId) -> int:
        uses = self._uses.get(key, [])
        place = bisect_right(uses, self.now)
        return uses[place] if place < len(uses) else 1 << 60


def parse_arguments() -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--capacity", default="352,560", help="experts that fit, all layers together")
    parser.add_argument("--sequences", default="1,2,8")
    parser.add_argument("--policies", default="lru,lfu,learned")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--draws", type=int, default=3, help="of which sequences")
    return parser.parse_args()


if __name__ == "__main__":
    main()
