"""Does the GPU choose the CPU's tokens? Greedy steps compared one by one, and the logits behind them.

    python -m scripts.check_gpu_tokens --model DIR [--texts 8] [--prompt-tokens 64] [--tokens 64]
    [--vram-budget 8G]

For each text the CPU continues a prompt greedily. The GPU is then given the same tokens, and each of its
steps must prefer the same next one: a step counts as a tie, and is left out, where the CPU's two best logits
are closer than what 16-bit rounding moves them (--tie, as a share of the logits' spread). Also the relative
error of the logits, per step. Prints a summary and, as its last line, one JSON object.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch
from torch import Tensor

from flashmoe.api import LLM
from flashmoe.bench_text import BUILT_IN_TEXT, TokenText


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--model", type=Path)
    add("--texts", type=int, default=8)
    add("--prompt-tokens", type=int, default=64)
    add("--tokens", type=int, default=64)
    add("--tie", type=float, default=1e-3)
    add("--ram-budget", default="auto")
    add("--vram-budget", default="auto")
    add("--cpu-experts", default="never")
    add("--exact-activations", action="store_true")
    options = parser.parse_args()
    context = options.prompt_tokens + options.tokens + 16
    shared = {"context": context, "policy": "lru", "prefetch": "off"}
    shared["exact_activations"] = options.exact_activations
    with LLM(options.model, ram_budget=options.ram_budget, device="cpu", **shared) as llm:
        text = TokenText(llm.tokenizer, [BUILT_IN_TEXT])
        prompts = [text.take(options.prompt_tokens) for _ in range(options.texts)]
        wanted = [greedy(llm, prompt, options.tokens) for prompt in prompts]
    with LLM(
        options.model, ram_budget=options.ram_budget, vram_budget=options.vram_budget, device="cuda",
        cpu_experts=options.cpu_experts, **shared,
    ) as llm:  # fmt: skip
        found = [forced(llm, p, tokens) for p, (tokens, _) in zip(prompts, wanted, strict=True)]
        again = forced(llm, prompts[0], wanted[0][0])
    moved = sum(not torch.equal(a, b) for a, b in zip(found[0], again, strict=True))
    steps, ties, same, errors, places = 0, 0, 0, [], []
    for text, ((tokens, logits), ours) in enumerate(zip(wanted, found, strict=True)):
        for step, (token, a, b) in enumerate(zip(tokens, logits, ours, strict=True)):
            errors.append(((a - b).norm() / a.norm()).item())
            places.append((errors[-1], text, step))
            best = a.topk(2).values
            if (best[0] - best[1]).item() < options.tie * (a.max() - a.min()).item():
                ties += 1
                continue
            steps += 1
            same += int(b.argmax()) == token
    summary = {
        "steps": steps, "ties": ties, "equal": same, "share": same / steps,
        "logits_error_median": statistics.median(errors), "logits_error_most": max(errors),
    }  # fmt: skip
    print(f"{same} of {steps} greedy steps equal ({same / steps:.2%}), {ties} ties left out;"
          f" relative error of the logits: median {summary['logits_error_median']:.2e},"
          f" most {summary['logits_error_most']:.2e}")  # fmt: skip
    print("largest errors (text, step):", *(f"{e:.2e} ({t}, {s})" for e, t, s in sorted(places)[:-6:-1]))
    print(f"{moved} steps of the first text differ when it runs again")
    print(json.dumps(summary))


def greedy(llm: LLM, prompt: list[int], count: int) -> tuple[list[int], list[Tensor]]:
    """`count` tokens after the prompt, and the logits that chose each."""
    llm.reset()
    logits = llm.engine.prefill(prompt).clone()
    tokens, kept = [], []
    for _ in range(count):
        tokens.append(int(logits.argmax()))
        kept.append(logits)
        logits = llm.engine.decode_one_token(tokens[-1]).clone()
    return tokens, kept


def forced(llm: LLM, prompt: list[int], tokens: list[int]) -> list[Tensor]:
    """The logits before each of the given tokens."""
    llm.reset()
    kept = [llm.engine.prefill(prompt).clone()]
    for token in tokens[:-1]:
        kept.append(llm.engine.decode_one_token(token).clone())
    return kept


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
