"""smolmoe end to end: real routing, real text, real budgets."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flashmoe import LLM, GenerationStats

pytestmark = pytest.mark.demo

QUESTION = "What is the capital of France?"
ROOT = Path(__file__).parents[1]


def test_greedy_tokens_equal_those_of_transformers_in_fp32_on_the_same_bf16_weights(smolmoe: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.MixtralForCausalLM.from_pretrained(smolmoe, dtype=torch.float32).eval()
    greedy = transformers.GenerationConfig(
        do_sample=False, repetition_penalty=1.1, max_new_tokens=64, eos_token_id=2, pad_token_id=2
    )
    with LLM(smolmoe, ram_budget="8G", context=512) as llm:
        for question in (QUESTION, "Write a haiku about the sea."):
            text = llm.tokenizer.apply_chat_template([{"role": "user", "content": question}])
            ids = llm.tokenizer.encode(text)
            with torch.no_grad():
                theirs = model.generate(torch.tensor([ids]), generation_config=greedy)[0, len(ids) :].tolist()
            params = llm.sampling_params({"temperature": 0, "repetition_penalty": 1.1, "max_tokens": 64})
            stats = GenerationStats()
            for _ in llm.stream_tokens(ids, params, stats):
                pass
            assert stats.token_ids == theirs


def test_a_tight_budget_gives_the_tokens_of_an_ample_one(smolmoe: Path) -> None:
    answers = []
    for budget in ("16G", "700M" if _rss_bytes() < 350 << 20 else None):
        budget = budget or f"{(_rss_bytes() >> 20) + 420}M"
        with LLM(smolmoe, ram_budget=budget, policy="lfru", context=512) as llm:
            answers.append(llm.chat(temperature=0).send(QUESTION, max_tokens=24))
            assert (llm.plan.slots == llm.plan.experts) == (budget == "16G")
    assert answers[0].token_ids == answers[1].token_ids
    assert "Paris" in answers[0].text
    assert answers[1].stats.misses > answers[0].stats.misses


def test_one_prompt_on_the_command_line_inside_a_budget_smaller_than_the_model(
    smolmoe: Path, tmp_path: Path
) -> None:
    stats_file = tmp_path / "stats.jsonl"
    command = [sys.executable, "-m", "flashmoe", "run", "--model", str(smolmoe), "--ram-budget", "640M"]
    options = ["--temperature", "0", "--max-tokens", "16", "--stats-json", str(stats_file), "--per-token"]
    done = subprocess.run(
        [*command, *options, "--prompt", QUESTION], cwd=ROOT, capture_output=True, text=True, check=True
    )
    stats = json.loads(stats_file.read_text())
    assert "Paris" in done.stdout
    assert done.stdout.strip() == stats["text"].strip()
    assert stats["peak_rss_bytes"] <= stats["ram_budget_bytes"] == 640 << 20
    assert stats["ram_budget_bytes"] < sum(f.stat().st_size for f in smolmoe.glob("*.safetensors"))
    assert len(stats["tokens"]) == stats["decode_tokens"] == 16


@pytest.mark.root
@pytest.mark.drive
@pytest.mark.parametrize("policy, prefetch", [("lru", "off"), ("lfu", "off"), ("learned", "2")])
def test_200_tokens_in_a_memory_cgroup_of_exactly_the_budget(
    smolmoe: Path, policy: str, prefetch: str
) -> None:
    """Not killed, and the bytes that the kernel counted are misses x expert bytes within one percent, and
    what was guessed in vain."""
    command = [sys.executable, "scripts/check_budget.py", "--model", str(smolmoe), "--ram-budget", "640M"]
    options = ["--policy", policy, "--prefetch", prefetch]
    done = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["cgroup"]["oom_kills"] == 0
    assert result["peak_rss_bytes"] <= result["budget_bytes"] == result["cgroup"]["limit_bytes"]
    assert result["misses"] > 1000
    expected = result["misses"] * result["expert_bytes"] + result["bytes_guessed_in_vain"]
    assert result["io_bytes"] == pytest.approx(expected, rel=0.01)
    assert (result["bytes_guessed_in_vain"] > 0) == (prefetch != "off")


def _rss_bytes() -> int:
    from storage import host

    return host.rss_bytes()
