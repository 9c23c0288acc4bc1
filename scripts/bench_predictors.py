"""What predictors are worth: how many misses they foresee, and the time that this saves.

    python -m scripts.bench_predictors --model PATH --ram-budget 4G --slots 300,500
    python -m scripts.bench_predictors --model PATH --ram-budget 1600M --live --guesses 2,auto --rounds 7

The first runs a text token by token and simulates caches of `--slots` experts beside the real one, so a
budget that holds the whole model is the quickest, and changes no figure. No guess is read. A layer's guesses
are the first N experts named that are not in the simulated cache, as the prefetcher would send them with all
the time it wants:

    routed      share of a layer's experts that are among the top-k ones named before it ran
    recall      share of all misses that are guessed; those of the first layer never are
    precision   share of the guesses that are then asked for
    chance      the same for experts drawn by lot; "bound" knows the misses

Predictors learn as they would in a run; the first `--warm` tokens are not counted.

With `--live` the model decodes a text with prefetch off, and with each predictor under each of `--guesses`.
In each round all of them run the same tokens, one after the other, who begins changes, and each starts from
empty slots that the first `--warm` tokens fill; predictors keep what they have learnt. `ratio` is the time of
a token by that of the same round without prefetch, below 1 is faster. The bound on it is 1 - stall / time
without prefetch. Say whether the drive or the page cache was read (`--reader direct`).

Both print a table and, as the last line, one JSON object.
"""

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from cache_policies.policy import CachePolicy, Geometry
from cache_policies.residency import Residency
from flashmoe import LLM
from flashmoe.bench_text import BUILT_IN_TEXT, TokenText, read_prompts
from flashmoe.config import PREDICTOR_NAMES, RunConfig
from flashmoe.expert_cache import ExpertCache
from flashmoe.expert_slots import CacheCounters
from flashmoe.policies import build_policy
from flashmoe.predictors import PREDICTORS
from flashmoe.prefetch import Predictor, Prefetcher

PREFIX = 64  # tokens of prompt before decoding
CHANCE, BOUND = "chance", "bound"
OFFLINE = "slots, hit rate, misses/token, predictor, guesses, routed, recall, precision, µs"
LIVE = ("predictor, ms/token, ratio, min–max, misses/token, MB, stall ms, guesses, in time, late, wasted,"
        " given up, MB in vain, prefetch")  # fmt: skip


class Simulation:
    """A cache in ids alone, and what guesses would have found of its misses."""

    def __init__(self, policy: CachePolicy, geometry: Geometry, at_most: Sequence[int]) -> None:
        self.geometry, self.at_most = geometry, at_most
        self.hits = self.misses = 0
        self.sent: dict[tuple[str, int], float] = defaultdict(float)  # by predictor and guesses a layer
        self.right: dict[tuple[str, int], float] = defaultdict(float)
        self._residency = Residency(policy, geometry)

    def event(
        self, layer: int, routed: Sequence[int], scores: Sequence[float] | None,
        named: Mapping[str, Sequence[int]], count: bool,
    ) -> None:  # fmt: skip
        """One layer of one token. `named`: each predictor's experts for it, the surest first, if any."""
        outside = {e for e in range(self.geometry.experts) if (layer, e) not in self._residency}
        missing, _ = self._residency.begin(layer, routed, None, scores)
        for key in missing:
            self._residency.arrived(key)
        self._residency.settle()
        if not count:
            return
        misses = {expert for _, expert in missing}
        self.misses += len(misses)
        self.hits += len(routed) - len(misses)
        for n in self.at_most if named else ():
            drawn, known = min(n, len(outside)), min(n, len(misses))
            self._add(CHANCE, n, drawn, drawn * len(misses) / max(1, len(outside)))
            self._add(BOUND, n, known, known)
            for name, experts in named.items():
                guesses = [expert for expert in experts if expert in outside][:n]
                self._add(name, n, len(guesses), len(misses.intersection(guesses)))

    def _add(self, name: str, at_most: int, sent: int, right: float) -> None:
        self.sent[name, at_most] += sent
        self.right[name, at_most] += right


class Watch(Prefetcher):
    """Stands where the prefetcher does, asks every predictor, and sends nothing."""

    def __init__(
        self, predictors: dict[str, Predictor], layers: Sequence[int], simulations: list[Simulation]
    ) -> None:
        self.predictors, self.simulations = predictors, simulations
        self.counting = False
        self.routed_right: dict[str, list[float]] = {name: [] for name in predictors}
        self.predict_s: dict[str, list[float]] = {name: [] for name in predictors}
        self._ordinals = {layer: ordinal for ordinal, layer in enumerate(layers)}
        self._named: dict[int, dict[str, list[int]]] = {}  # by layer, of this token

    def forward_begins(self, token_ids: Sequence[int]) -> None:
        self._named = {}
        for predictor in self.predictors.values():
            predictor.forward_begins(token_ids)

    def forward_ends(self) -> None:
        pass

    def routed(
        self, cache: ExpertCache, layer: int, x: Tensor, routed: Sequence[int], scores: Sequence[float]
    ) -> None:
        named = self._named.get(layer, {})
        for simulation in self.simulations:
            simulation.event(self._ordinals[layer], routed, scores, named, self.counting)
        if self.counting:
            for name, experts in named.items():
                self.routed_right[name].append(len(set(experts).intersection(routed)) / len(routed))
        for name, predictor in self.predictors.items():
            begin = time.perf_counter()
            guesses = predictor.predict(layer, x, routed, scores)
            self.predict_s[name].append(time.perf_counter() - begin)
            for guess in guesses:
                self._named.setdefault(guess.layer, {}).setdefault(name, []).append(guess.expert)


def offline(llm: LLM, text: TokenText, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row a number of slots, predictor and number of guesses."""
    config, decoder = llm.config, llm.engine.decoder
    layers = [layer for layer, has_experts in enumerate(config.moe_layers) if has_experts]
    at_most = [int(guesses) for guesses in options.guesses]
    simulations = []
    for slots in options.slots or [llm.plan.experts // 5, llm.plan.experts // 3]:
        slots = max(slots, config.num_experts_per_tok)
        geometry = Geometry(len(layers), config.num_experts, config.num_experts_per_tok, slots)
        simulations.append(Simulation(build_policy(options.policy, geometry), geometry, at_most))
    # By hand: a model that is all in memory gets no prefetcher from LLM.
    predictors = {name: PREDICTORS[name](decoder, llm._weights) for name in options.predictors}
    watch = decoder.prefetcher = Watch(predictors, layers, simulations)
    done = 0
    while done < options.warm + options.tokens:
        ids = text.take(PREFIX + min(options.sequence, options.warm + options.tokens - done))
        llm.reset()
        llm.engine.prefill(ids[:PREFIX])
        for token in ids[PREFIX:]:
            watch.counting = done >= options.warm
            llm.engine.decode_one_token(token)
            done += 1
    rows = []
    for simulation in simulations:
        asked_for = simulation.hits + simulation.misses
        for n in at_most:
            for name in (*options.predictors, CHANCE, BOUND):
                sent, right = simulation.sent[name, n], simulation.right[name, n]
                named = watch.routed_right.get(name)
                rows.append({
                    "slots": simulation.geometry.capacity,
                    "hit_rate": simulation.hits / asked_for,
                    "misses_per_token": simulation.misses / options.tokens,
                    "predictor": name,
                    "guesses": n,
                    "routed": statistics.mean(named) if named else None,
                    "recall": right / simulation.misses if simulation.misses else None,
                    "precision": right / sent if sent else None,
                    "predict_us": 1e6 * statistics.median(watch.predict_s[name]) if named else None,
                })  # fmt: skip
    return rows


class Contender(NamedTuple):
    prefetch: str
    predictor: str = PREDICTOR_NAMES[0]


OFF = Contender("off")


def live(llm: LLM, text: TokenText, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row a contender. Raises AssertionError if one changes what the model would say."""
    contenders = [OFF, *(Contender(n, name) for n in options.guesses for name in options.predictors)]
    kept: dict[Contender, Prefetcher | None] = {}
    took: dict[Contender, list[float]] = defaultdict(list)  # seconds a token, of each round
    spent: dict[Contender, list[CacheCounters]] = defaultdict(list)
    decoder = llm.engine.decoder
    for number in range(options.rounds):
        ids, answers = text.take(PREFIX + options.warm + options.tokens), set()
        begin = number % len(contenders)
        for contender in contenders[begin:] + contenders[:begin]:
            llm.use_policy(options.policy, *contender)
            decoder.prefetcher = kept.setdefault(contender, decoder.prefetcher)
            llm.reset()
            llm.engine.prefill(ids[:PREFIX])
            for token in ids[PREFIX : PREFIX + options.warm]:
                llm.engine.decode_one_token(token)
            before, start = llm.expert_cache.counters.snapshot(), time.perf_counter()
            chosen = [llm.engine.decode_one_token(token) for token in ids[PREFIX + options.warm :]]
            took[contender].append((time.perf_counter() - start) / options.tokens)
            spent[contender].append(llm.expert_cache.counters - before)
            answers.add(tuple(int(logits.argmax()) for logits in chosen))
        assert len(answers) == 1, f"round {number}: prefetch changed what the model says"
    rows = []
    for each in contenders:
        ratios = [with_it / without for with_it, without in zip(took[each], took[OFF], strict=True)]
        steps, prefetcher = options.rounds * options.tokens, kept[each]
        rows.append({
            **each._asdict(),
            "ms_per_token": 1e3 * statistics.median(took[each]),
            "ratio": statistics.median(ratios),
            "least_ratio": min(ratios),
            "most_ratio": max(ratios),
            "verdict": "off" if prefetcher is None else prefetcher.verdict,
            "per_token": {f.name: sum(getattr(c, f.name) for c in spent[each]) / steps
                          for f in fields(CacheCounters)},
            "rounds": [{"s_per_token": s, **asdict(c)} for s, c in zip(took[each], spent[each], strict=True)],
        })  # fmt: skip
    return rows


def show(header: str, rows: Sequence[Sequence[str]]) -> None:
    """A table, its columns to the right."""
    table = [header.split(", "), *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


def offline_cells(row: dict[str, Any]) -> list[str]:
    shares = ("" if row[key] is None else f"{row[key]:.1%}" for key in ("routed", "recall", "precision"))
    us = "" if row["predict_us"] is None else f"{row['predict_us']:.0f}"
    cache = str(row["slots"]), f"{row['hit_rate']:.1%}", f"{row['misses_per_token']:.1f}"
    return [*cache, row["predictor"], str(row["guesses"]), *shares, us]


def live_cells(row: dict[str, Any]) -> list[str]:
    c = row["per_token"]
    guessed = (c[f"prefetch_{what}"] for what in ("issued", "hits", "late", "wasted", "cancelled"))
    megabytes, in_vain = c["bytes_read"] / 1e6, c["prefetch_bytes_wasted"] / 1e6
    counts = (c["misses"], megabytes, 1e3 * c["stall_s"], *guessed, in_vain)
    spread = f"{row['least_ratio']:.3f}–{row['most_ratio']:.3f}"
    times = f"{row['ms_per_token']:.1f}", f"{row['ratio']:.3f}", spread
    who = "" if row["prefetch"] == "off" else row["predictor"]
    return [who, *times, *(f"{count:.1f}" for count in counts), row["verdict"]]


def main(argv: Sequence[str] | None = None) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--model")
    add("--text", type=Path, help=".txt or .jsonl (default: our own)")
    add("--ram-budget", default="auto")
    add("--policy", default="learned")
    add("--predictors", type=lambda names: names.split(","), default=list(PREDICTOR_NAMES))
    add("--guesses", type=lambda names: names.split(","), help="default: 1,2,4; with --live: 2,auto")
    add("--slots", type=lambda counts: [int(n) for n in counts.split(",")], help="default: a fifth, a third")
    add("--tokens", type=int, default=256, help="that count; with --live in each round")
    add("--warm", type=int, default=128, help="tokens before those")
    add("--sequence", type=int, default=256, help="tokens decoded before the text's next part; not --live")
    add("--live", action="store_true")
    add("--rounds", type=int, default=5)
    add("--reader", default="auto")
    add("--threads", type=int)
    options = parser.parse_args(argv)
    options.guesses = options.guesses or (["2", "auto"] if options.live else ["1", "2", "4"])
    for guesses, name in ((g, n) for g in options.guesses for n in options.predictors):
        RunConfig(prefetch=guesses, predictor=name)  # a bad one should not wait for the model to load
    if not options.live and not all(guesses.isdigit() for guesses in options.guesses):
        parser.error("--guesses are numbers where nothing is --live")
    context = PREFIX + (options.warm + options.tokens if options.live else options.sequence)
    with LLM(
        options.model, ram_budget=options.ram_budget, policy=options.policy, context=context,
        reader=options.reader, threads=options.threads, max_batch=1,
    ) as llm:  # fmt: skip
        text = TokenText(llm.tokenizer, read_prompts(options.text) if options.text else [BUILT_IN_TEXT])
        print(f"{llm.plan.slots} of {llm.plan.experts} experts in memory, {llm.probed.reader} reads at"
              f" {llm.probed.read_mb_per_s:.0f} MB/s, policy {options.policy}")  # fmt: skip
        rows = live(llm, text, options) if options.live else offline(llm, text, options)
        header, cells = (LIVE, live_cells) if options.live else (OFFLINE, offline_cells)
        show(header, [cells(row) for row in rows])
        facts = {"live": options.live, "policy": options.policy, "tokens": options.tokens,
                 "warm": options.warm, "slots": llm.plan.slots, "experts": llm.plan.experts,
                 "reader": llm.probed.reader, "drive_mb_per_s": llm.probed.read_mb_per_s}  # fmt: skip
    print(json.dumps({**facts, "rows": rows}))


if __name__ == "__main__":
    main()
