"""The learned policy beside those of two papers, on data sets of a trace that were kept from their training.

    python -m scripts.compare_learned_baselines gpt-oss-20b.npz --fold 1 --sequences 16 --train

Hit rates from an empty cache, on a fold's held-out sequences, with the same slots in each layer:

    lru, belady   the two ends of the gap; behind each hit rate stands the share of it that a policy closes
    best simple   the best of lfu, lfu-aged and lfru at this capacity, chosen afterwards
    paper         the FlashMoE paper's network (cache_policies/paper_network.py), trained here on the fold's
                  training sequences: the first `--rows` tokens, at most `--epochs` times
    lrb           LRB (cache_policies/lrb.py), which learns on the run and is LRU until its first model
    lrb warm      the same, after it has watched the tokens that "paper" was trained on
    learned       ours: the shipped policy, that of `--policy FILE`, or with `--train` one trained here on the
                  fold's training sequences

The shipped policy has seen the traces it was made from, held-out sequences and all: only `--train`, or a file
trained without these data sets, makes "learned" comparable. `--sequences N` takes every N-th sequence of
either part; time grows with the tokens that are left. With few of them "paper" is starved: the command above
gives it 3,279, and 8.5 % of the gap at 8 slots; 13,332 gave it 17.9 % there, after eight times the training.
Folds keep names apart, not texts: gpqa_diamond, gpqa_main and gpqa_extended share questions.

Prints a table and, as the last line, one JSON object.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from cache_policies import paper_network
from cache_policies.lrb import LRB
from cache_policies.paper_network import PaperNetwork, PaperWeights
from cache_policies.policy import CachePolicy, Geometry
from cache_policies.replay import replay
from cache_policies.routing_trace import RoutingTrace
from flashmoe.policy_file import read_policy, shipped_policy
from flashmoe.processes import run_in_order
from flashmoe.trace import load_trace
from flashmoe.train_policy import Fold, TrainOptions, evaluate, folds_of, train_policy

COLUMNS = ("lru", "best simple", "paper", "lrb", "lrb warm", "learned", "belady")
CAPACITY_SHARES = (3 / 16, 1 / 4, 3 / 8, 1 / 2)  # of a layer's experts

NOTES = {
    "trained": "trained on all the tokens to train on",
    "shipped": "the shipped policy, which may have SEEN THIS TRACE, held-out part and all; --train is fair",
    "file": "the given file, comparable if made without the held-out data sets",
}


def thinned(trace: RoutingTrace, every: int) -> RoutingTrace:
    return trace.select(range(0, len(trace.datasets), every))


def train_paper(trace: RoutingTrace, options: argparse.Namespace) -> PaperWeights:
    """`paper_network.train`, layer by layer in processes of their own."""
    layers = [replace(trace, experts=trace.experts[:, [i]], weights=None, scores=None)
              for i in range(trace.layers)]  # fmt: skip
    cells = [(layer, options.seed, options.epochs, options.rows) for layer in layers]
    parts = run_in_order(_train_layer, cells, options.jobs)
    return PaperWeights(
        tuple(np.concatenate(same) for same in zip(*(part.matrices for part in parts), strict=True)),
        tuple(np.concatenate(same) for same in zip(*(part.biases for part in parts), strict=True)),
    )


def _train_layer(trace: RoutingTrace, seed: int, epochs: int, rows: int) -> PaperWeights:
    with threadpool_limits(1):  # matrices this small only lose by BLAS threads
        return paper_network.train(trace, seed=seed, epochs=epochs, rows=rows)


def hit_rate(
    test: RoutingTrace, capacity: int, watched: RoutingTrace | None, known: PaperWeights | int
) -> float:
    """`known`: the network's weights, or LRB's seed. `watched`: what LRB has seen before."""
    geometry = Geometry(test.layers, test.num_experts, test.top_k, capacity, per_layer=True)
    policy: CachePolicy = LRB(geometry, known) if isinstance(known, int) else PaperNetwork(known)
    for row in () if watched is None else watched.experts.tolist():
        for layer, routed in enumerate(row):
            policy.step(layer, routed)
    with threadpool_limits(1):
        return replay(test, policy, geometry).hit_rate


def learned_policy(train: RoutingTrace, options: argparse.Namespace) -> tuple[str, str]:
    """Where it is from, a key of NOTES or a path, and its text."""
    if options.train:
        return "trained", train_policy([train], TrainOptions(seed=options.seed, jobs=options.jobs))
    if options.policy is not None:
        return str(options.policy), options.policy.read_text("ascii")
    return "shipped", shipped_policy()


def compare(
    fold: Fold, text: str, weights: PaperWeights, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """A row a capacity."""
    test, watched = fold.test, fold.train.rows(0, min(options.rows, len(fold.train)))
    contenders = (None, weights), (None, options.seed), (watched, options.seed)
    cells = [(test, capacity, *each) for capacity in options.capacities for each in contenders]
    rates = iter(run_in_order(hit_rate, cells, options.jobs))
    rows = []
    for ours in evaluate(text, fold, [c / test.num_experts for c in options.capacities], options.jobs):
        papers = [next(rates) for _ in contenders]
        hits = (ours.lru, ours.best_simple, *papers, ours.learned, ours.belady)
        named = dict(zip(COLUMNS, hits, strict=True))
        rows.append({
            "capacity": ours.capacity,
            "best_simple_name": ours.best_simple_name,
            "hit_rates": named,
            "gap_closed": {name: gap_closed(rate, ours.lru, ours.belady) for name, rate in named.items()},
        })  # fmt: skip
    return rows


def gap_closed(rate: float, lru: float, belady: float) -> float:
    """Of the way from LRU to Belady; 0 where there is none."""
    return (rate - lru) / (belady - lru) if belady > lru else 0.0


def cells_of(row: dict[str, Any]) -> list[str]:
    hits, gaps = row["hit_rates"], row["gap_closed"]
    ends = (COLUMNS[0], COLUMNS[-1])
    cells = [f"{hits[name]:.2%}" + ("" if name in ends else f" {gaps[name]:6.1%}") for name in COLUMNS]
    cells[1] = f"{row['best_simple_name']} {cells[1]}"
    return [str(row["capacity"]), *cells]


def show(rows: Sequence[Sequence[str]]) -> None:
    """A table, its columns to the right."""
    table = [("capacity", *COLUMNS), *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, RoutingTrace, Fold]:
    """The options, the trace and its fold, thinned; wrong ones exit with 2."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("trace", type=Path)
    add("--fold", type=int, default=0, help="from 0; the table names its data sets")
    add("--sequences", type=int, default=16, metavar="N", help="every N-th sequence of either part")
    add("--capacities", type=lambda counts: sorted({int(n) for n in counts.split(",")}),
        help="slots a layer (default: 3/16, 1/4, 3/8 and 1/2 of the experts)")  # fmt: skip
    add("--epochs", type=int, default=200, help="of the paper's network, at most; 200 as published")
    add("--rows", type=int, default=4000, help="tokens that it is trained on, at most")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--policy", type=Path, help="the learned policy's file (default: the shipped one)")
    source.add_argument("--train", action="store_true", help="train the learned policy on the fold as well")
    add("--seed", type=int, default=0)
    add("--jobs", type=int, help="processes (default: one a core)")
    options = parser.parse_args(argv)
    trace = load_trace(options.trace)
    folds = folds_of(trace)
    if not 0 <= options.fold < len(folds):
        parser.error(f"--fold {options.fold}: {options.trace} has {len(folds)} folds, counted from 0")
    if min(options.sequences, options.rows, options.epochs) < 1:
        parser.error("--sequences, --rows and --epochs are at least 1")
    least, most = trace.top_k, trace.num_experts
    options.capacities = options.capacities or sorted(
        {max(least, round(share * most)) for share in CAPACITY_SHARES}
    )
    if not all(least <= capacity <= most for capacity in options.capacities):
        parser.error(f"--capacities go from {least}, the experts of a token, to {most}, all of a layer")
    chosen = folds[options.fold]
    parts = (thinned(part, options.sequences) for part in (chosen.train, chosen.test))
    return options, trace, Fold(chosen.name, *parts)


def main(argv: Sequence[str] | None = None) -> None:
    options, trace, fold = parse(argv)
    if options.policy is not None:
        read_policy(options.policy)  # a bad file should not wait for the networks
    print(f"{trace.name}: {trace.layers} x {trace.num_experts} experts, top-{trace.top_k}; one sequence in"
          f" {options.sequences}; held out {fold.name}, {len(fold.test)} tokens in {len(fold.test.datasets)}"
          f" sequences; {len(fold.train)} tokens to train on", flush=True)  # fmt: skip
    took_s, start = {}, time.perf_counter()
    weights = train_paper(fold.train, options)
    took_s["paper"] = time.perf_counter() - start
    print(f"paper: trained on {min(options.rows, len(fold.train))} tokens, at most {options.epochs} epochs,"
          f" seed {options.seed}: {took_s['paper']:.0f} s", flush=True)  # fmt: skip
    start = time.perf_counter()
    learned, text = learned_policy(fold.train, options)
    took_s["learned"] = time.perf_counter() - start
    print(f"learned: {NOTES['file' if options.policy else learned]}: {took_s['learned']:.0f} s", flush=True)
    start = time.perf_counter()
    rows = compare(fold, text, weights, options)
    took_s["replays"] = time.perf_counter() - start
    print(f"replays: {took_s['replays']:.0f} s")
    print("Hit rate, and the share of the gap from lru to belady that it closes:")
    show([cells_of(row) for row in rows])
    facts = {
        "trace": trace.name, "fold": options.fold, "held_out": fold.name, "sequences": options.sequences,
        "train_tokens": len(fold.train), "test_tokens": len(fold.test), "epochs": options.epochs,
        "rows": options.rows, "seed": options.seed, "learned": learned,
        "took_s": {what: round(seconds, 1) for what, seconds in took_s.items()},
    }  # fmt: skip
    print(json.dumps({**facts, "capacities": rows}))


if __name__ == "__main__":
    main()
