"""The promise: policy, reader and budget change when bytes arrive, never what is computed. Bits are
compared."""

from pathlib import Path

import pytest
import torch
from engines import build_engine
from tiny_models import make_tiny_checkpoint

from cache_policies.registry import POLICY_NAMES
from flashmoe.budget import PREFILL_CHUNK
from flashmoe.engine import Engine
from flashmoe.pack import PackOptions, pack
from kernels.native import available_isas

TOP_K = 4  # the sum of two does not depend on their order, that of more does
FAMILIES = ("mixtral", "qwen3_moe", "qwen2_moe", "olmoe")
PACKED = (("mixtral", "int4", "bf16"), ("qwen2_moe", "int8", "int8"))  # family, experts, dense weights
PROMPT = [(7 * i * i + 3 * i) % 89 for i in range(PREFILL_CHUNK + 60)]  # more than one chunk
TURNS = (PROMPT[:5], PROMPT[5:], [11, 12, 13])


@pytest.fixture(scope="module", params=[*FAMILIES, *PACKED], ids=str)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("tiny")
    family, *packed = (request.param,) if isinstance(request.param, str) else request.param
    make_tiny_checkpoint(made, family=family, num_experts_per_tok=TOP_K)
    if not packed:
        return made
    pack(made, made.with_name(f"{made.name}-packed"), PackOptions(*packed, threads=2))
    return made.with_name(f"{made.name}-packed")


def conversation(engine: Engine) -> torch.Tensor:
    """All logits of a conversation of three prompts with eight greedy tokens after each."""
    tokens: list[int] = []
    seen = []
    for turn in TURNS:
        tokens += turn
        logits = engine.prefill(tokens[engine.reuse(tokens) :])
        for _ in range(8):
            seen.append(logits)
            tokens.append(int(logits.argmax()))
            logits = engine.decode_one_token(tokens[-1])
        seen.append(logits)
    engine.decoder.experts.close()
    return torch.stack(seen)


@pytest.fixture(scope="module")
def all_resident(folder: Path) -> torch.Tensor:
    return conversation(build_engine(folder, context=2048))


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_every_policy_gives_the_same_bits(folder: Path, all_resident: torch.Tensor, policy: str) -> None:
    assert torch.equal(conversation(build_engine(folder, slots=7, policy=policy, context=2048)), all_resident)


@pytest.mark.parametrize("slots", [TOP_K, 5, 13])  # of 24; top-k is the smallest workable
def test_every_budget_gives_the_same_bits(folder: Path, all_resident: torch.Tensor, slots: int) -> None:
    assert torch.equal(conversation(build_engine(folder, slots=slots, context=2048)), all_resident)


@pytest.mark.parametrize("reader", [pytest.param("direct", marks=pytest.mark.drive), "buffered", "mmap"])
def test_every_reader_gives_the_same_bits(folder: Path, all_resident: torch.Tensor, reader: str) -> None:
    assert torch.equal(conversation(build_engine(folder, slots=5, reader=reader, context=2048)), all_resident)


def test_the_size_of_the_context_does_not_change_the_bits(folder: Path, all_resident: torch.Tensor) -> None:
    assert torch.equal(conversation(build_engine(folder, slots=5, context=700)), all_resident)


@pytest.mark.parametrize("threads", [1, 3])
def test_every_number_of_threads_gives_the_same_bits(
    folder: Path, all_resident: torch.Tensor, threads: int
) -> None:
    engine = build_engine(folder, slots=5, threads=threads, context=2048)
    assert torch.equal(conversation(engine), all_resident)


@pytest.mark.parametrize("isa", available_isas())
def test_every_instruction_set_gives_the_same_bits(
    folder: Path, all_resident: torch.Tensor, isa: str
) -> None:
    assert torch.equal(conversation(build_engine(folder, slots=5, isa=isa, context=2048)), all_resident)
