#!/usr/bin/env python3
"""Is the RAM budget kept? Generate 200 tokens inside a memory cgroup of exactly the budget.

    scripts/check_budget.py --model PATH --ram-budget 640M [--reader direct] [--tokens 200]

Prints one JSON object: whether the kernel killed the run, the group's peak (page cache included) and the
process's peak RSS beside the budget, and the bytes that /proc/self/io says were read for experts beside
misses x expert bytes. Exit status 0 if the run survived within its budget and the bytes agree within 1 %, 1
if not, 77 where no memory cgroup can be made.
"""

import argparse
import json
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from scripts.run_in_cgroup import CANNOT, CgroupUnavailable, run_in_cgroup  # noqa: E402

PROMPT = "Write a short story about a lighthouse keeper who finds an old map in a bottle."


def generate(args: argparse.Namespace) -> dict[str, object]:
    """Inside the group: 200 greedy tokens, whatever the model would end with."""
    from flashmoe import LLM
    from storage import host

    chosen = {"reader": args.reader, "policy": args.policy, "prefetch": args.prefetch}
    with LLM(args.model, ram_budget=args.ram_budget, **chosen) as llm:
        prompt = llm.tokenizer.encode(PROMPT)
        cache = llm.expert_cache.counters
        before = host.drive_read_bytes()
        logits = llm.engine.prefill(prompt)
        for _ in range(args.tokens):
            logits = llm.engine.decode_one_token(int(logits.argmax()))
        after = host.drive_read_bytes()
        return {
            "budget_bytes": llm.plan.budget_bytes,
            "planned_bytes": llm.plan.planned_bytes,
            "peak_rss_bytes": host.peak_rss_bytes(),
            "reader": llm.probed.reader,
            "slots": llm.plan.slots,
            "hit_rate": cache.hits / (cache.hits + cache.misses),
            "misses": cache.misses,
            "expert_bytes": llm.plan.expert_bytes,
            "bytes_guessed_in_vain": cache.prefetch_bytes_wasted,
            "io_bytes": None if before is None or after is None else after - before,
        }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--ram-budget", required=True)
    parser.add_argument("--reader", default="direct")
    parser.add_argument("--policy", default="lru")
    parser.add_argument("--prefetch", default="off")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        Path(args.inside).write_text(json.dumps(generate(args)))
        return 0
    from flashmoe.sizes import parse_size

    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder, "answer.json")
        limit = parse_size(args.ram_budget, free_bytes=None)
        command = [sys.executable, __file__, *sys.argv[1:], "--inside", str(answer)]
        try:
            run = run_in_cgroup(command, limit, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"})
        except CgroupUnavailable as error:
            print(f"skipped: {error}", file=sys.stderr)
            return CANNOT
        inside = json.loads(answer.read_text()) if answer.exists() else {}
    expected = inside.get("misses", 0) * inside.get("expert_bytes", 0)
    expected += inside.get("bytes_guessed_in_vain", 0)
    io_ratio = inside["io_bytes"] / expected if inside.get("io_bytes") and expected else None
    print(json.dumps({**inside, "io_over_expected": io_ratio, "cgroup": asdict(run)}))
    kept = run.returncode == 0 and run.oom_kills == 0 and inside["peak_rss_bytes"] <= inside["budget_bytes"]
    agree = io_ratio is None or args.reader != "direct" or abs(io_ratio - 1) <= 0.01
    return 0 if kept and agree else 1


if __name__ == "__main__":
    sys.exit(main())
