"""How well models predict a text: what a packed model lost, measured with our own engine.

    python -m scripts.perplexity --text text.jsonl --model ./Model --model ./Model-int4 [--windows 60]

Each line of the text is an object with `text` and, if it has one, `domain`. Every text is cut into windows of
512 tokens; those measured are spread evenly over the domains and over each domain's texts. A window starts
without context, so its first token is given and 511 are predicted. With several models each is compared with
the first: KL divergence of its next-token distribution, in nats a token, and how often both find the same
token likeliest. All models are in memory at once. Prints a table and, as its last line, one JSON object.
"""

import argparse
import json
import math
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from flashmoe.config import RunConfig
from flashmoe.engine import Engine
from flashmoe.loader import load_engine, open_model, plan_model
from flashmoe.tokenizer import Tokenizer

WINDOW = 512


@dataclass
class Sums:
    """Over predicted tokens."""

    tokens: int = 0
    nats: float = 0.0
    kl: float = 0.0
    same: int = 0

    def add(self, other: "Sums") -> None:
        self.tokens += other.tokens
        self.nats += other.nats
        self.kl += other.kl
        self.same += other.same

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats / self.tokens)


@dataclass
class Result:
    """One model's sums by domain."""

    model: str
    domains: dict[str, Sums] = field(default_factory=lambda: defaultdict(Sums))
    seconds: float = 0.0

    @property
    def total(self) -> Sums:
        total = Sums()
        for sums in self.domains.values():
            total.add(sums)
        return total


def main() -> None:
    arguments = _parse()
    engines: list[Engine] = []
    for folder in arguments.model:
        model = open_model(folder)
        run = RunConfig(
            arguments.ram_budget,
            context=WINDOW,
            threads=arguments.threads,
            exact_activations=arguments.exact_activations,
        )
        engines.append(load_engine(model, plan_model(model, run), run).engine)
    windows = list(take_windows(arguments.text, open_model(arguments.model[0]).tokenizer, arguments.windows))
    results = [Result(folder.resolve().name) for folder in arguments.model]
    for number, (domain, ids) in enumerate(windows):
        measure_window(engines, results, domain, ids)
        if sys.stderr.isatty():
            print(f"\r{number + 1} of {len(windows)} windows", end="", file=sys.stderr)
    print(_table(results))
    print(
        json.dumps(
            {"windows": len(windows), "window": WINDOW, "models": [_as_dict(r, results) for r in results]}
        )
    )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Perplexity of models on a text, and KL to the first.")
    parser.add_argument("--model", type=Path, action="append", required=True, metavar="FOLDER")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE.jsonl")
    parser.add_argument("--windows", type=int, default=60, metavar="N", help="of 512 tokens (default: 60)")
    parser.add_argument("--ram-budget", default="auto", metavar="SIZE", help="of each model")
    parser.add_argument("--threads", type=int, metavar="N")
    parser.add_argument(
        "--exact-activations", action="store_true", help="fp32 activations for packed weights too"
    )
    return parser.parse_args()


def take_windows(path: Path, tokenizer: Tokenizer, count: int) -> Iterator[tuple[str, list[int]]]:
    """(domain, ids) of `count` whole windows, or all there are."""
    texts: dict[str, list[str]] = defaultdict(list)
    for line in path.read_text("utf-8").split("\n"):
        if line.strip():
            entry = json.loads(line)
            texts[entry.get("domain", "text")].append(entry["text"])
    each = -(-count // len(texts))
    chosen = [[(domain, ids) for ids in _spread(texts[domain], tokenizer, each)] for domain in texts]
    in_turn = [windows[i] for i in range(each) for windows in chosen if i < len(windows)]
    yield from in_turn[:count]


def _spread(texts: Sequence[str], tokenizer: Tokenizer, count: int) -> Iterable[list[int]]:
    """The first window of texts all over the list, then the second, until there are enough."""
    step = max(1, len(texts) // count)
    picked = [*texts[::step], *(text for i, text in enumerate(texts) if i % step)]
    ids: list[list[int]] = []
    taken = 0
    for depth in range(1 << 20):
        found = False
        for number, text in enumerate(picked):
            if number == len(ids):
                ids.append(tokenizer.encode(text))
            window = ids[number][depth * WINDOW : (depth + 1) * WINDOW]
            if len(window) == WINDOW:
                found = True
                taken += 1
                yield window
            if taken == count:
                return
        if not found:
            return


def measure_window(engines: Sequence[Engine], results: Sequence[Result], domain: str, ids: list[int]) -> None:
    """Add one window's figures to each result."""
    first: Tensor | None = None
    for engine, result in zip(engines, results, strict=True):
        begin = time.perf_counter()
        engine.reset()
        logits = engine.decoder.forward(ids, all_logits=True)[:-1]
        result.seconds += time.perf_counter() - begin
        log_p = torch.log_softmax(logits, dim=-1)  # [511, V]
        target = torch.tensor(ids[1:])
        sums = Sums(len(target), -float(log_p.gather(1, target[:, None]).double().sum()))
        if first is None:
            first = log_p
        sums.kl = float((first.exp() * (first - log_p)).sum(dim=-1).double().sum())
        sums.same = int((first.argmax(dim=-1) == log_p.argmax(dim=-1)).sum())
        result.domains[domain].add(sums)


def _table(results: Sequence[Result]) -> str:
    domains = list(results[0].domains)
    rows = [["model", *domains, "all", "to first", "KL", "same top-1", "tok/s"]]
    base = results[0].total.perplexity
    for result in results:
        total = result.total
        rows.append([
            result.model,
            *(f"{result.domains[domain].perplexity:.3f}" for domain in domains),
            f"{total.perplexity:.4f}",
            f"{total.perplexity / base - 1:+.2%}",
            f"{total.kl / total.tokens:.5f}",
            f"{total.same / total.tokens:.2%}",
            f"{total.tokens / result.seconds:.0f}",
        ])  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _as_dict(result: Result, results: Sequence[Result]) -> dict[str, object]:
    total, base = result.total, results[0].total
    return {
        "model": result.model,
        "perplexity": total.perplexity,
        "to_first": total.perplexity / base.perplexity - 1,
        "kl": total.kl / total.tokens,
        "same_top_1": total.same / total.tokens,
        "tokens": total.tokens,
        "domains": {domain: sums.perplexity for domain, sums in result.domains.items()},
    }


if __name__ == "__main__":
    main()
