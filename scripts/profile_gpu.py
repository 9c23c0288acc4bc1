"""Where a decoded token's time goes on a GPU: kernels, copies, both at once, neither.

    python -m scripts.profile_gpu --model DIR [--vram-budget 3G] [--ram-budget 16G] [--trace FILE]

Decodes a text token by token; the last `--tokens` of them run under torch's profiler (CUPTI), which makes
each somewhat slower. Prints busy time a token of kernels and of copies in either direction, how much of the
copying ran beside kernels, and the kernels that took longest. `--trace` keeps the time line for a trace
viewer.
"""

import argparse
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from flashmoe.api import LLM
from flashmoe.bench_text import BUILT_IN_TEXT, TokenText

Interval = tuple[float, float]
WARM_UP, LISTED = 96, 12


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--model", type=Path)
    add("--ram-budget", default="auto")
    add("--vram-budget", default="auto")
    add("--policy", default="learned")
    add("--prefetch", default="off")
    add("--cpu-experts", default="never", choices=("auto", "never", "always"))
    add("--tokens", type=int, default=32)
    add("--trace", type=Path)
    options = parser.parse_args()
    with LLM(
        options.model, ram_budget=options.ram_budget, vram_budget=options.vram_budget, device="cuda",
        policy=options.policy, prefetch=options.prefetch, cpu_experts=options.cpu_experts, context=512,
    ) as llm:  # fmt: skip
        text = TokenText(llm.tokenizer, [BUILT_IN_TEXT]).take(WARM_UP + options.tokens + 32)
        llm.engine.prefill(text[:32])
        for token in text[32 : 32 + WARM_UP]:
            llm.engine.decode_one_token(token)
        before = llm.expert_cache.counters.snapshot()
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiled:
            for token in text[32 + WARM_UP : 32 + WARM_UP + options.tokens]:
                llm.engine.decode_one_token(token)
            torch.cuda.synchronize()
        spent = llm.expert_cache.counters - before
    if options.trace is not None:
        profiled.export_chrome_trace(str(options.trace))
    kernels, copies_in, copies_out, times = [], [], [], Counter[str]()
    for event in profiled.events():
        if event.device_type != torch.autograd.DeviceType.CUDA:
            continue
        span = (event.time_range.start, event.time_range.end)
        name = event.name
        if name.startswith("Memcpy HtoD"):
            copies_in.append(span)
        elif name.startswith("Memcpy DtoH"):
            copies_out.append(span)
        elif not name.startswith(("Memset", "Memcpy")):
            kernels.append(span)
            times[name.split("(")[0][:60]] += span[1] - span[0]
    every = merged([*kernels, *copies_in, *copies_out])
    n = options.tokens
    total = every[-1][1] - every[0][0]
    print(f"{n} tokens: {total / n:.0f} us each under the profiler; hits {spent.hits / n:.1f}, misses"
          f" {spent.misses / n:.1f} a token")  # fmt: skip
    rows = {
        "kernels": length(merged(kernels)),
        "copies to the GPU": length(merged(copies_in)),
        "  of it beside kernels": length(common(merged(copies_in), merged(kernels))),
        "copies from the GPU": length(merged(copies_out)),
        "neither": total - length(every),
    }
    for name, us in rows.items():
        print(f"{name:<26}{us / n:8.0f} us a token{us / total:8.1%}")
    for name, us in times.most_common(LISTED):
        print(f"  {name:<60}{us / n:8.1f} us a token")


def merged(spans: Iterable[Interval]) -> list[Interval]:
    """Without overlaps, in order."""
    joined: list[Interval] = []
    for begin, end in sorted(spans):
        if joined and begin <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((begin, end))
    return joined


def common(a: list[Interval], b: list[Interval]) -> list[Interval]:
    """Where both are busy; each without overlaps, in order."""
    found, i, j = [], 0, 0
    while i < len(a) and j < len(b):
        begin, end = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if begin < end:
            found.append((begin, end))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return found


def length(spans: Iterable[Interval]) -> float:
    return sum(end - begin for begin, end in spans)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
