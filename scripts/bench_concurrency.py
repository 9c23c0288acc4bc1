#!/usr/bin/env python3
"""What several conversations at once cost and gain, on one model and budget.

    python scripts/bench_concurrency.py --model WIDE_INT4 --ram-budget 1540M --text prompts.jsonl

Throughput: the same greedy chats one after the other, then so many at once, in alternating rounds; medians of
the ratios, and whether every answer is the same. Pace: seven chats decode alone, then while prompts arrive
without end; the 95th percentile of the time between a chat's tokens, and its ratio. Turns: the time to the
first token of a long conversation's next message, and of the same conversation begun anew. Resume: that of a
long prompt, and of the same one on a model opened again, with and without a session cache.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from flashmoe import LLM
from flashmoe.generation import GenerationRequest, Piece


def main() -> None:
    options = parse_arguments()
    with LLM(
        options.model, ram_budget=options.ram_budget, context=options.context, policy=options.policy,
        max_batch=8, threads=options.threads, device=options.device, vram_budget=options.vram_budget,
    ) as llm:  # fmt: skip
        plan = llm.plan
        print(f"{plan.slots} of {plan.experts} experts have slots, {plan.passing_slots} more for prompts;"
              f" {plan.kv_tokens} tokens of KV cache; {llm.probed.read_mb_per_s:.0f} MB/s probed",
              file=sys.stderr)  # fmt: skip
        prompts = read_prompts(llm, options.text, options.prompt_tokens)
        report = {}
        if "throughput" in options.parts:
            report["throughput"] = throughput(llm, prompts, options)
        if "pace" in options.parts:
            report["pace"] = pace(llm, prompts, options)
        if "turns" in options.parts:
            report["turns"] = turns(llm, prompts, options)
    if "resume" in options.parts:
        report["resume"] = resume(prompts, options)
    if options.output:
        options.output.write_text(json.dumps(report, indent=1) + "\n", "utf-8")


# ---- how much more at once

@dataclass
class Chats:
    """A round: all chats, so many at a time."""

    at_once: int
    seconds: float = 0.0
    decode_s: float = 0.0  # in steps with a token of a chat that had one already
    tokens: int = 0
    misses: int = 0
    stall_s: float = 0.0
    read_s: float = 0.0  # with a read in flight
    bytes_read: int = 0
    answers: list[list[int]] = field(default_factory=list)


def throughput(llm: LLM, prompts: list[list[int]], options: argparse.Namespace) -> dict[str, object]:
    chosen = prompts[:8]
    rounds: dict[int, list[Chats]] = {n: [] for n in (1, *options.at_once)}
    for number in range(options.rounds + 1):
        for n, done in rounds.items():
            result = run_chats(llm, chosen, n, options.tokens)
            if number > 0:  # the first round warms up
                done.append(result)
                show_round(result)
    same = all(r.answers == rounds[1][0].answers for done in rounds.values() for r in done)
    print(f"every answer the same in every round: {'yes' if same else 'NO'}")
    summary: dict[str, object] = {"same answers": same}
    for n in options.at_once:
        ratios = [one.seconds / many.seconds for one, many in zip(rounds[1], rounds[n], strict=True)]
        print(f"{n} at once: {spread(ratios)}x of one after the other")
        summary[f"{n} at once"] = ratios
    return summary


def run_chats(llm: LLM, prompts: list[list[int]], at_once: int, tokens: int) -> Chats:
    llm.kv_pool.forget()
    before = llm.expert_cache.counters.snapshot()
    result, begin = Chats(at_once), time.perf_counter()
    for first in range(0, len(prompts), at_once):
        clocks = [Clock() for _ in prompts[first : first + at_once]]
        requests = [c.submit(llm, p, tokens) for c, p in zip(clocks, prompts[first:], strict=False)]
        run_all(llm, requests)
        result.decode_s += max(c.times[-1] for c in clocks) - min(c.times[0] for c in clocks)
        result.answers += [r.tokens[r.prompt_tokens :] for r in requests]
    result.seconds = time.perf_counter() - begin
    spent = llm.expert_cache.counters - before
    result.misses, result.bytes_read = spent.misses, spent.bytes_read
    result.stall_s, result.read_s = spent.stall_s, spent.read_s
    result.tokens = sum(map(len, result.answers))
    return result


def show_round(r: Chats) -> None:
    print(f"  {r.at_once} at once: {r.tokens / r.seconds:.2f} tok/s in all"
          f" ({(r.tokens - len(r.answers)) / r.decode_s:.2f} without prompts),"
          f" {r.bytes_read / r.tokens / 1e6:.0f} MB a token; of the time {r.read_s / r.seconds:.0%} reading"
          f" at {r.bytes_read / max(r.read_s, 1e-9) / 1e6:.0f} MB/s, {r.stall_s / r.seconds:.0%} waiting",
          flush=True)  # fmt: skip


# ---- how even

def pace(llm: LLM, prompts: list[list[int]], options: argparse.Namespace) -> dict[str, object]:
    chats, arriving = prompts[:7], prompts[7:]
    ratios, alone_s, beside_s, first_s = [], [], [], []
    for number in range(options.rounds + 1):
        alone = gaps(llm, chats, [], options.tokens)[0]
        beside, waits = gaps(llm, chats, arriving, options.tokens)
        if number == 0:
            continue
        p95 = [float(np.percentile(g, 95)) for g in (alone, beside)]
        ratios.append(p95[1] / p95[0])
        alone_s.append(p95[0])
        beside_s.append(p95[1])
        first_s += waits
        print(f"  p95 between tokens {p95[0] * 1e3:.0f} ms alone, {p95[1] * 1e3:.0f} ms beside {len(waits)}"
              f" prompts; median {np.median(alone) * 1e3:.0f} and {np.median(beside) * 1e3:.0f} ms",
              flush=True)  # fmt: skip
    print(f"p95 with prompts arriving: {spread(ratios)}x of without; their first token after"
          f" {spread(first_s)} s")  # fmt: skip
    return {"ratios": ratios, "alone_s": alone_s, "beside_s": beside_s, "first_token_s": first_s}


def gaps(
    llm: LLM, chats: list[list[int]], arriving: list[list[int]], tokens: int
) -> tuple[list[float], list[float]]:
    """Times between the tokens of `chats`, and to the first token of prompts that arrive, one at a time, as
    long as all chats decode."""
    llm.kv_pool.forget()
    clocks = [Clock() for _ in chats]
    requests = [clock.submit(llm, prompt, tokens) for clock, prompt in zip(clocks, chats, strict=True)]
    while not all(request.generated for request in requests):
        llm.scheduler.step()
    begun = time.perf_counter()
    waits: list[float] = []
    newcomer, number = None, 0
    while not any(request.is_finished for request in requests):
        if arriving and (newcomer is None or newcomer[1].is_finished):
            if newcomer is not None:
                waits.append(newcomer[0].times[0] - newcomer[0].begin)
            clock = Clock()
            newcomer = clock, clock.submit(llm, arriving[number % len(arriving)], 1)
            number += 1
        llm.scheduler.step()
    ended = time.perf_counter()
    if newcomer is not None:
        newcomer[1].cancel()
    run_all(llm, requests)
    times = [[t for t in clock.times if begun < t < ended] for clock in clocks]
    return [b - a for each in times for a, b in zip(each, each[1:], strict=False)], waits


# ---- the next turn

def turns(llm: LLM, prompts: list[list[int]], options: argparse.Namespace) -> dict[str, object]:
    """First turns of several lengths, then a second message of 32 tokens: to its first token."""
    long = [token for prompt in prompts for token in prompt]
    message = prompts[0][:32]
    rows = []
    for length in (128, 512, 1024):
        if length + 64 > llm.plan.context:
            continue
        seconds: dict[str, list[float]] = {"again": [], "anew": []}
        for number in range(options.rounds + 1):
            first = long[number : number + length]
            llm.kv_pool.forget()
            run_all(llm, [Clock().submit(llm, first, 1)])
            for kind in seconds:
                if kind == "anew":
                    llm.kv_pool.forget()
                clock = Clock()
                run_all(llm, [clock.submit(llm, first + message, 1)])
                if number > 0:
                    seconds[kind].append(clock.times[0] - clock.begin)
        rows.append({"first turn": length, **seconds})
        print(f"  {length} tokens, then 32 more: first token after {spread(seconds['again'])} s,"
              f" {spread(seconds['anew'])} s without what is kept", flush=True)  # fmt: skip
    return {"rows": rows}


# ---- in another process, as far as the model can tell

def resume(prompts: list[list[int]], options: argparse.Namespace) -> dict[str, list[float]]:
    prompt = [token for each in prompts for token in each][:512]
    seconds: dict[str, list[float]] = {"first": [], "again": [], "without": []}
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
            for kind, cache in (("first", folder), ("again", folder), ("without", None)):
                with LLM(
                    options.model, ram_budget=options.ram_budget, context=options.context,
                    policy=options.policy, threads=options.threads, session_cache=cache, device="cpu",
                ) as llm:  # fmt: skip
                    clock = Clock()
                    run_all(llm, [clock.submit(llm, prompt, 1)])
                    seconds[kind].append(clock.times[0] - clock.begin)
    first, again, without = (spread(seconds[kind]) for kind in ("first", "again", "without"))
    print(f"512 tokens, first token after {first} s; the model opened again {again} s,"
          f" without a session cache {without} s")  # fmt: skip
    return seconds


# ---- common

class Clock:
    """When a request's tokens came."""

    def __init__(self) -> None:
        self.begin, self.times = time.perf_counter(), list[float]()

    def submit(self, llm: LLM, prompt: list[int], tokens: int) -> GenerationRequest:
        params = llm.sampling_params({"temperature": 0, "max_tokens": tokens})
        return llm.scheduler.submit(prompt, params, self._note)

    def _note(self, piece: Piece) -> None:
        if piece.token_id is not None:
            self.times.append(time.perf_counter())


def run_all(llm: LLM, requests: Sequence[GenerationRequest]) -> None:
    while not all(request.is_finished for request in requests):
        llm.scheduler.step()


def read_prompts(llm: LLM, path: Path, most_tokens: int) -> list[list[int]]:
    """First messages of a .jsonl file, from all over it, in the model's chat template."""
    found = []
    for line in path.read_text("utf-8").splitlines():
        row = json.loads(line)
        text = row.get("prompt") or row["turns"][0]
        ids = llm.tokenizer.encode(llm.tokenizer.apply_chat_template([{"role": "user", "content": text}]))
        if len(ids) <= most_tokens:
            found.append(ids)
    step = max(1, len(found) // 24)
    return found[::step][:24]


def spread(values: Sequence[float], show: Callable[[float], str] = "{:.2f}".format) -> str:
    return f"{show(statistics.median(values))} ({show(min(values))} to {show(max(values))})"


def parse_arguments() -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--model", required=True)
    parser.add_argument("--ram-budget", required=True)
    parser.add_argument("--text", type=Path, required=True, help='.jsonl: "turns" or "prompt" a line')
    parser.add_argument("--policy", default="learned")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--vram-budget", default="auto")
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--prompt-tokens", type=int, default=200, help="longest prompt taken")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--at-once", type=int, nargs="*", default=[2, 8])
    parts = ("throughput", "pace", "turns", "resume")
    parser.add_argument("--parts", nargs="*", default=parts, choices=parts)
    parser.add_argument("--scratch", type=Path, help="folder for the session cache")
    parser.add_argument("--output", type=Path, help="all figures as JSON")
    return parser.parse_args()


if __name__ == "__main__":
    main()
