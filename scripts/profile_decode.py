"""Where the time of a decoded token goes: native kernels, waiting for reads, Python.

    python scripts/profile_decode.py --model PATH --ram-budget 8G [--tokens 64] [--repetitions 5]

The native library counts the seconds inside its calls, the expert cache those spent waiting for the drive;
what remains of the clock is Python: the cache's lookups, the loop; sampling is left out. A last pass runs
under cProfile, whose own cost is in no figure: it names the functions. Prints a table and, as its last line,
one JSON object.
"""

import argparse
import cProfile
import io
import json
import pstats
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from flashmoe import LLM  # noqa: E402
from flashmoe.bench_text import BUILT_IN_TEXT, TokenText  # noqa: E402

PREFIX = 64  # tokens of prompt before decoding is timed


@dataclass(frozen=True, slots=True)
class Shares:
    """One pass: milliseconds a token, and hits of all experts."""

    total_ms: float
    native_ms: float
    stall_ms: float
    python_ms: float
    hit_rate: float

    @property
    def python_share(self) -> float:
        return self.python_ms / self.total_ms


def decode(llm: LLM, tokens: list[int]) -> Shares:
    """Teacher-forced: the tokens of a text, one by one, behind a prompt."""
    engine, counters, kernels = llm.engine, llm.expert_cache.counters, llm.engine.decoder.kernels
    engine.reset()
    engine.prefill(tokens[:PREFIX])
    rest = tokens[PREFIX:]
    before, native_s, begin = counters.snapshot(), kernels.busy_s, time.perf_counter()
    for token in rest:
        engine.decode_one_token(token)
    total_s, spent = time.perf_counter() - begin, counters - before
    native_s = kernels.busy_s - native_s
    total, native, stall = (1e3 * s / len(rest) for s in (total_s, native_s, spent.stall_s))
    return Shares(total, native, stall, total - native - stall, spent.hits / (spent.hits + spent.misses))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model")
    parser.add_argument("--ram-budget", default="auto")
    parser.add_argument("--tokens", type=int, default=64, help="decoded in each pass")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    context = PREFIX + options.tokens
    fixed = dict(context=context, threads=options.threads, max_batch=1)
    with LLM(options.model, ram_budget=options.ram_budget, **fixed) as llm:
        text = TokenText(llm.tokenizer, [BUILT_IN_TEXT])
        decode(llm, text.take(context))  # fills the slots
        passes = [decode(llm, text.take(context)) for _ in range(options.repetitions)]
        profile = cProfile.Profile()
        profile.runcall(decode, llm, text.take(context))
    print(f"{'of a token':<28}{'median ms':>10}{'min':>8}{'max':>8}{'share':>8}")
    total = statistics.median(p.total_ms for p in passes)
    for name, title in (
        ("native_ms", "native kernels"),
        ("stall_ms", "waiting for reads"),
        ("python_ms", "Python and torch"),
        ("total_ms", "all"),
    ):
        values = [getattr(p, name) for p in passes]
        median = statistics.median(values)
        print(f"{title:<28}{median:10.2f}{min(values):8.2f}{max(values):8.2f}{median / total:8.1%}")
    listing = io.StringIO()
    pstats.Stats(profile, stream=listing).sort_stats("tottime").print_stats(14)
    print("\n".join(line for line in listing.getvalue().splitlines() if line.strip()))
    share = statistics.median(p.python_share for p in passes)
    print(json.dumps({"python_share": share, "passes": [asdict(p) for p in passes]}))


if __name__ == "__main__":
    main()
