"""Measure the demo model with transformers: an answer, perplexity, and KL to what it was made from.

    python scripts/check_demo_model.py --text text.jsonl [--original ORIGINAL_DELTA] [--dense]

--original compares it with smolmoe built from the uncompressed difference, --dense with the dense model that
it was distilled from. KL(reference || smolmoe) of the next-token distributions is in nats, averaged over
positions. The text is JSON lines of {"domain", "text"}; of each domain the first documents that are long
enough give one window each. All models run in float32 on the stored bf16 weights. Prints a table and, last,
one JSON line.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, MixtralForCausalLM

from flashmoe.demo_model import build_demo_model
from flashmoe.demo_model.build import write_model
from flashmoe.demo_model.delta import Delta
from flashmoe.demo_model.gguf_base import BaseModel, find_base

QUESTION = "What is the capital of France?"
SHARED_WITH_LLAMA = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "rope_parameters",
    "max_position_embeddings",
    "tie_word_embeddings",
)
CHARACTERS_PER_WINDOW_TOKEN = 12  # more than any text has: enough of a document to fill a window


@dataclass
class Sums:
    """What one reference's windows of one domain add up to."""

    positions: int = 0
    kl: float = 0.0
    nll: float = 0.0  # of smolmoe
    reference_nll: float = 0.0
    predicted: int = 0
    kl_of_windows: list[float] = field(default_factory=list)

    def add(self, model: torch.Tensor, reference: torch.Tensor, ids: torch.Tensor) -> None:
        """Add a window: log-probabilities [T, V] of both models, and its token ids [T]."""
        kl = (reference.exp() * (reference - model)).sum(-1)  # [T]
        self.positions += len(ids)
        self.kl += kl.sum().item()
        self.kl_of_windows.append(kl.mean().item())
        next_ids = ids[1:, None]
        self.nll -= model[:-1].gather(1, next_ids).sum().item()
        self.reference_nll -= reference[:-1].gather(1, next_ids).sum().item()
        self.predicted += len(next_ids)

    def figures(self) -> dict[str, float]:
        means = torch.tensor(self.kl_of_windows, dtype=torch.float64)
        return {
            "tokens": self.positions,
            "kl": self.kl / self.positions,
            "kl_standard_error": (means.std() / len(means) ** 0.5).item() if len(means) > 1 else float("nan"),
            "perplexity": torch.tensor(self.nll / self.predicted).exp().item(),
            "reference_perplexity": torch.tensor(self.reference_nll / self.predicted).exp().item(),
        }


def windows(path: Path, tokenizer: Any, tokens: int, per_domain: int) -> dict[str, list[torch.Tensor]]:
    """The first `per_domain` documents of each domain with at least `tokens` tokens, cut to that length."""
    chosen: dict[str, list[torch.Tensor]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        document = json.loads(line)
        of_domain = chosen.setdefault(document["domain"], [])
        if len(of_domain) < per_domain:
            ids = tokenizer(document["text"][: tokens * CHARACTERS_PER_WINDOW_TOKEN]).input_ids
            if len(ids) >= tokens:
                of_domain.append(torch.tensor(ids[:tokens]))
    return chosen


def load(folder: Path) -> Any:
    model: Any = MixtralForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def dense_model(base: BaseModel, config: dict[str, Any]) -> Any:
    """The base itself, as a float32 LlamaForCausalLM."""
    shared = {key: config[key] for key in SHARED_WITH_LLAMA}
    ffn_width = base.field("llama.feed_forward_length")
    model: Any = LlamaForCausalLM(LlamaConfig(**shared, intermediate_size=ffn_width))
    weights = {"model.embed_tokens": base.tensor("token_embd.weight")}
    weights["model.norm"] = base.tensor("output_norm.weight")
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        weights[f"{prefix}input_layernorm"] = base.tensor(f"blk.{layer}.attn_norm.weight")
        weights[f"{prefix}post_attention_layernorm"] = base.tensor(f"blk.{layer}.ffn_norm.weight")
        for projection in "qkvo":
            weights[f"{prefix}self_attn.{projection}_proj"] = base.attention(layer, projection)
        for matrix in ("gate", "up", "down"):
            weights[f"{prefix}mlp.{matrix}_proj"] = base.ffn(layer, matrix)
    weights["lm_head"] = weights["model.embed_tokens"]
    model.load_state_dict({f"{name}.weight": torch.tensor(values) for name, values in weights.items()})
    return model.eval()


@torch.no_grad()
def compare(model: Any, reference: Any, texts: dict[str, list[torch.Tensor]]) -> dict[str, dict[str, float]]:
    """Domain, and "all" -> figures."""
    everything = Sums()
    figures = {}
    for domain, chosen in texts.items():
        sums = Sums()
        for ids in chosen:
            ours, theirs = (each(ids[None]).logits[0].log_softmax(-1) for each in (model, reference))
            sums.add(ours, theirs, ids)
            everything.add(ours, theirs, ids)
        figures[domain] = sums.figures()
    return figures | {"all": everything.figures()}


@torch.no_grad()
def answer(model: Any, tokenizer: Any, question: str) -> str:
    """The greedy answer with repetition penalty 1.1, at most 40 tokens."""
    messages = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids = model.generate(**prompt, do_sample=False, repetition_penalty=1.1, max_new_tokens=40)
    text: str = tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    return text


def references(options: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """The models to compare with, one at a time: each takes 1.5 GB."""
    if options.original:
        with tempfile.TemporaryDirectory() as folder:
            write_model(Path(folder), BaseModel(find_base()), Delta(options.original))
            yield "original", load(Path(folder))
    if options.dense:
        base = BaseModel(find_base())
        yield "dense", dense_model(base, json.loads((options.model / "config.json").read_bytes()))


def print_table(name: str, figures: dict[str, dict[str, float]]) -> None:
    print(f"\nagainst {name:14s}  tokens  KL (nats)   ± s.e.  perplexity  reference's")
    for domain, row in figures.items():
        print(
            f"  {domain:20s}  {row['tokens']:6.0f}  {row['kl']:9.5f}  {row['kl_standard_error']:7.5f}"
            f"  {row['perplexity']:10.3f}  {row['reference_perplexity']:11.3f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="a built smolmoe; default: the one in the user's cache")
    parser.add_argument("--text", type=Path, required=True, help="JSON lines of {domain, text}")
    parser.add_argument("--original", type=Path, help="the uncompressed difference")
    parser.add_argument("--dense", action="store_true", help="compare with the dense base as well")
    parser.add_argument("--window", type=int, default=512, help="tokens of a window")
    parser.add_argument("--windows", type=int, default=4, help="windows of each domain")
    options = parser.parse_args()
    options.model = options.model or build_demo_model()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = load(options.model)
    texts = windows(options.text, tokenizer, options.window, options.windows)
    result: dict[str, Any] = {"question": QUESTION, "answer": answer(model, tokenizer, QUESTION)}
    print(f"{QUESTION}\n  {result['answer']}", flush=True)
    for name, reference in references(options):
        result[name] = compare(model, reference, texts)
        print_table(name, result[name])
    print(json.dumps(result))
    if "Paris" not in result["answer"]:
        sys.exit("the answer does not name Paris")


if __name__ == "__main__":
    main()
