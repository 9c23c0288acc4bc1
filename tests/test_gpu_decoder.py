"""The decoder of a GPU against the CPU's, on tiny models: in Triton's interpreter, or on a GPU if there is
one.

VRAM is ordinary memory in the interpreter; graphs are captured on a GPU only. What is the same in both: the
tiers, the steps of a token, the kernels' arithmetic.
"""

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from tiny_models import make_tiny_checkpoint
from torch import Tensor

from flashmoe.config import RunConfig
from flashmoe.decoder import Stretch
from flashmoe.engine import Engine
from flashmoe.gpu_loader import build_decoder, read_all, slot_bytes, use_policy
from flashmoe.loader import OpenedModel, load_engine, open_cache, open_model, plan_model
from flashmoe.pack import PackOptions, pack
from flashmoe.vram_budget import VramPlan
from flashmoe.weights import load_dense
from kernels import triton_decode
from kernels.expert_slots import BITS
from kernels.native import make_context

# Triton's interpreter computes rows beyond a tile's last with whatever is there, and numpy says so.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CONTEXT = 64
RUN = RunConfig("8G", context=CONTEXT, policy="lru", prefetch="off", cpu_experts="never")
TOKENS = [7, 31, 200, 5, 99, 17, 31, 200, 5]
PROMPT = 5  # of the tokens
FAMILIES = ("mixtral", "qwen3_moe", "qwen2_moe", "olmoe")


@pytest.fixture(autouse=True, scope="module")
def _few_programs() -> Iterator[None]:
    """The interpreter takes milliseconds a program: wide ones, where nobody measures speed."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        if DEVICE.type == "cpu":
            guessed = triton_decode.launch_shape

            def wide(kernel: str, format: str, columns: int) -> triton_decode.Shape:
                shape = guessed(kernel, format, columns)
                return shape if format in BITS else shape._replace(rows=128)

            monkeypatch.setattr(triton_decode, "launch_shape", wide)
        yield


class Opened:
    """A model, its engine on the GPU, and what it lives in."""

    def __init__(
        self, folder: Path, slots: int, ram_slots: int = 0, run: RunConfig = RUN, conversations: int = 1
    ) -> None:
        """`slots` of VRAM, 0: one for every expert; likewise `ram_slots`."""
        self.model = model = open_model(folder)
        experts = len(model.read_plans)
        slots = slots or experts
        plan = plan_model(model, run)
        self.plan = plan = replace(plan, slots=ram_slots or experts)
        self.vram = vram = VramPlan(
            budget_bytes=1 << 30, driver_bytes=0, dense_bytes=0, kv_cache_bytes=0, workspace_bytes=0,
            slot_bytes=slot_bytes(model.config, model.expert_format), slots=slots,
            spare_slots=0 if slots == experts else 2, experts=experts, context=plan.context,
            kv_tokens=conversations * plan.context, conversations=conversations,
        )  # fmt: skip
        weights = load_dense(model.layout, device=DEVICE)
        ram = open_cache(model, plan, run, "buffered")
        self.decoder = build_decoder(
            model.config, weights, ram, make_context(1), model.expert_format, vram, run, DEVICE,
            packed=model.layout.packed is not None,
        )  # fmt: skip
        self.cache = self.decoder.experts
        if vram.holds_all:
            read_all(self.cache, model.config, None)
        self.engine = Engine(self.decoder)

    def __enter__(self) -> "Opened":
        return self

    def __exit__(self, *error: object) -> None:
        self.cache.close()


def logits_of(engine: Engine, tokens: Sequence[int] = TOKENS, prompt: int = PROMPT) -> Tensor:
    """Of the prompt's last token and of each one after it."""
    rows = [engine.prefill(tokens[:prompt]).clone()]
    rows += [engine.decode_one_token(token).clone() for token in tokens[prompt:]]
    return torch.stack(rows)


def on_cpu(model: OpenedModel, run: RunConfig = RUN) -> Tensor:
    loaded = load_engine(model, plan_model(model, run), run)
    try:
        return logits_of(loaded.engine)
    finally:
        loaded.cache.close()


def error(found: Tensor, expected: Tensor) -> float:
    """The largest relative error of a row."""
    return ((found - expected).norm(dim=1) / expected.norm(dim=1)).max().item()


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model in int4 and in int8, dense weights too."""
    folder = tmp_path_factory.mktemp("packed")
    shape = {"num_experts_per_tok": 4, "num_hidden_layers": 2}
    source = make_tiny_checkpoint(folder / "source", "qwen3_moe", **shape)
    for name in ("int4", "int8", "bf16"):
        pack(source, folder / name, PackOptions(name, name, 1))
    return {name: folder / name for name in ("int4", "int8", "bf16")}


class Reference(NamedTuple):
    """A model and its logits with every expert in VRAM: once for all tests, they take seconds."""

    folder: Path
    logits: Tensor


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return all_in_vram(make_tiny_checkpoint(tmp_path_factory.mktemp("mixtral") / "model", "mixtral"))


@pytest.fixture(scope="module")
def packed_bf16(packed: dict[str, Path]) -> Reference:
    return all_in_vram(packed["bf16"])


def all_in_vram(folder: Path) -> Reference:
    with Opened(folder, 0) as opened:
        return Reference(folder, logits_of(opened.engine))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_cpus_within_16_bit_rounding(family: str, tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path / family, family)
    with Opened(folder, 0) as opened:
        assert opened.cache.is_complete
        assert error(logits_of(opened.engine), on_cpu(opened.model)) < 2e-2


@pytest.mark.parametrize(
    "overrides",
    [
        {"use_sliding_window": True, "sliding_window": 5},
        {"num_attention_heads": 4, "num_key_value_heads": 1, "tie_word_embeddings": True},
    ],
)
def test_what_families_differ_in_is_the_same_on_both(overrides: dict[str, object], tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path / "model", "qwen3_moe", **overrides)
    with Opened(folder, 0) as opened:
        assert error(logits_of(opened.engine), on_cpu(opened.model)) < 2e-2


@pytest.mark.parametrize(("format", "exact"), [("int4", False), ("int8", True)])
def test_packed_weights_meet_the_same_activations_as_on_the_cpu(
    format: str, exact: bool, packed: dict[str, Path]
) -> None:
    run = replace(RUN, exact_activations=exact)
    with Opened(packed[format], 0, run=run) as opened:
        found, expected = logits_of(opened.engine), on_cpu(opened.model, run)
    # Rounding turns a close choice of the router now and then, and then a row is far off.
    errors = (found - expected).norm(dim=1) / expected.norm(dim=1)
    assert errors.median() < (3e-2 if exact else 0.1) and errors.max() < 0.5


@pytest.mark.parametrize("ram_slots", [0, 6])
@pytest.mark.parametrize("slots", [6, 10, 20])
def test_no_bit_depends_on_how_many_experts_fit(slots: int, ram_slots: int, mixtral: Reference) -> None:
    with Opened(mixtral.folder, slots, ram_slots) as opened:
        assert torch.equal(logits_of(opened.engine), mixtral.logits)
        assert opened.cache.counters.misses > 0


@pytest.mark.parametrize(("slots", "ram_slots"), [(10, 0), (10, 6), (6, 8)])
def test_no_bit_depends_on_whether_experts_are_read_in_place(
    slots: int, ram_slots: int, packed_bf16: Reference
) -> None:
    """`ram_slots` 0: what is not in VRAM is in RAM; else some of it is on the drive."""
    with Opened(packed_bf16.folder, slots, ram_slots) as opened:
        assert opened.cache.in_place
        for _ in range(2):  # the second time from slots that promotions have filled
            opened.engine.reset()
            assert torch.equal(logits_of(opened.engine), packed_bf16.logits)
        opened.decoder._report()
        assert opened.cache.counters.in_place > 0


def test_tokens_launched_whole_go_on_from_the_layer_that_lacked_an_expert(mixtral: Reference) -> None:
    with Opened(mixtral.folder, 12) as opened:
        opened.decoder._steps_of(1).missed = 0.0  # as if misses had been rare
        assert torch.equal(logits_of(opened.engine), mixtral.logits)
        assert opened.cache.counters.misses > 0


@pytest.mark.parametrize("choice", ["auto", "always"])
def test_experts_computed_on_the_cpu_change_no_more_than_rounding(choice: str, mixtral: Reference) -> None:
    with Opened(mixtral.folder, 10, run=replace(RUN, cpu_experts=choice)) as opened:
        assert error(logits_of(opened.engine), mixtral.logits) < 1e-2
        if choice == "always":
            assert opened.cache.counters.cpu_experts > 0


def test_a_token_again_after_an_error_gives_the_same_logits(mixtral: Reference) -> None:
    """The KV cache counts a token when all of its layers have run."""
    with Opened(mixtral.folder, 8) as opened:
        opened.engine.prefill(TOKENS[:PROMPT])
        for i, token in enumerate(TOKENS[PROMPT:], 1):
            fetch = opened.cache.fetch

            def fail(*arguments: object) -> None:
                raise KeyboardInterrupt

            opened.cache.fetch = fail  # type: ignore[method-assign]
            try:
                opened.engine.decode_one_token(token)
            except KeyboardInterrupt:
                opened.cache.fetch = fetch  # type: ignore[method-assign]
                assert torch.equal(opened.engine.decode_one_token(token), mixtral.logits[i])
            finally:
                opened.cache.fetch = fetch  # type: ignore[method-assign]


def test_what_the_observer_sees_is_what_the_cpu_routes(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path / "model", "mixtral")

    class Watch:
        def __init__(self) -> None:
            self.seen: list[tuple[int, list[list[int]]]] = []

        def forward_begins(self, token_ids: Sequence[int]) -> None: ...

        def forward_ends(self) -> None: ...

        def routed(self, layer: int, ids: Tensor, weights: Tensor, probabilities: Tensor) -> None:
            assert torch.allclose(probabilities.sum(-1), torch.ones(len(ids)), atol=1e-5)
            self.seen.append((layer, [sorted(row) for row in ids.tolist()]))

    model = open_model(folder)
    loaded = load_engine(model, plan_model(model, RUN), RUN)
    loaded.engine.decoder.observer = cpu = Watch()
    logits_of(loaded.engine)
    loaded.cache.close()
    for slots in (0, 9):
        with Opened(folder, slots) as opened:
            opened.decoder.observer = gpu = Watch()
            logits_of(opened.engine)
        assert [layer for layer, _ in gpu.seen] == [layer for layer, _ in cpu.seen]
        equal = sum(a == b for a, b in zip(cpu.seen, gpu.seen, strict=True))
        assert equal >= 0.9 * len(cpu.seen)  # rounding turns a close choice now and then


def together(opened: Opened, texts: Sequence[Sequence[int]]) -> list[Tensor]:
    """Prompts one by one, then a token of each text a step, as long as it lasts -> what `logits_of` gives for
    each."""
    kv_caches = [opened.decoder.new_sequence() for _ in texts]
    for kv_cache in kv_caches:
        kv_cache.claim(CONTEXT)
    rows: list[list[Tensor]] = []
    for kv_cache, tokens in zip(kv_caches, texts, strict=True):
        rows.append([opened.decoder.forward_batch([Stretch(kv_cache, list(tokens[:PROMPT]))])[0].clone()])
    for at in range(PROMPT, max(map(len, texts))):
        still = [i for i, tokens in enumerate(texts) if at < len(tokens)]
        batch = [Stretch(kv_caches[i], [texts[i][at]]) for i in still]
        for i, logits in zip(still, opened.decoder.forward_batch(batch).clone(), strict=True):
            rows[i].append(logits)
    for kv_cache in kv_caches:
        kv_cache.give_back(0)
    return [torch.stack(of_text) for of_text in rows]


TEXTS = [TOKENS, [3, 3, 77, 140, 9, 12, 201, 55], [250, 1, 8, 64, 32, 16, 4, 2, 90]]


@pytest.fixture(scope="module")
def alone(mixtral: Reference) -> list[Tensor]:
    with Opened(mixtral.folder, 0) as opened:
        found = []
        for tokens in TEXTS:
            opened.engine.reset()
            found.append(logits_of(opened.engine, tokens))
        return found


@pytest.mark.parametrize(("slots", "ram_slots"), [(0, 0), (12, 0), (9, 8)])
def test_no_bit_depends_on_who_else_decodes(
    slots: int, ram_slots: int, mixtral: Reference, alone: list[Tensor]
) -> None:
    with Opened(mixtral.folder, slots, ram_slots, conversations=len(TEXTS)) as opened:
        for found, expected in zip(together(opened, TEXTS), alone, strict=True):
            assert torch.equal(found, expected)
        assert opened.cache.counters.hits > 0


@pytest.mark.parametrize(("slots", "ram_slots"), [(10, 0), (6, 8)])
def test_nor_does_it_where_experts_are_read_in_place(
    slots: int, ram_slots: int, packed_bf16: Reference
) -> None:
    with Opened(packed_bf16.folder, slots, ram_slots, conversations=2) as opened:
        assert opened.cache.in_place
        first, _ = together(opened, TEXTS[:2])
        again, _ = together(opened, TEXTS[:2])
        assert torch.equal(first, packed_bf16.logits) and torch.equal(again, first)
        opened.decoder.settle()
        assert opened.cache.counters.in_place > 0


@pytest.mark.parametrize(("reference", "slots"), [("mixtral", 0), ("packed_bf16", 10)])
def test_another_policy_goes_on_with_graphs_of_its_own(
    reference: str, slots: int, request: pytest.FixtureRequest
) -> None:
    """torch gives up a pool of graphs whose graphs are all gone: the first token after `use_policy` failed,
    on a GPU. Of weights read in place the graphs before hold the RAM slots' address."""
    folder, logits = request.getfixturevalue(reference)
    with Opened(folder, slots) as opened:
        opened.engine.prefill(TOKENS[:1])  # by a graph
        opened.engine.reset()
        opened.cache.close()
        run, model = replace(RUN, policy="lfu"), opened.model
        ram = open_cache(model, opened.plan, run, "buffered")
        opened.cache = use_policy(opened.decoder, ram, model.expert_format, opened.vram, run)
        assert torch.equal(logits_of(opened.engine, TOKENS[: PROMPT + 1]), logits[:2])
        assert opened.cache.counters.hits > 0 and opened.cache.policy.name == "lfu"


def test_a_closed_decoder_holds_nothing_of_the_gpus_whoever_holds_it(packed_bf16: Reference) -> None:
    """A program that opens another model has the first one's objects for some time."""
    opened = Opened(packed_bf16.folder, 10, 0, conversations=2)
    decoder, sequence = opened.decoder, opened.decoder.new_sequence()
    sequence.claim(CONTEXT)
    opened.engine.prefill(TOKENS[:PROMPT])
    opened.engine.decode_one_token(TOKENS[PROMPT])
    step = decoder._steps_of(1).on_gpu
    tensors = [
        decoder.arena, *decoder.model.pages.tensors(0), step.x, step.table, decoder.model.lm_head.data,
        decoder._decode.products, decoder._prefill.products,
    ]  # fmt: skip
    held = [weakref.ref(tensor) for tensor in tensors]
    del tensors, step
    opened.cache.close()
    decoder.close()  # without a garbage collector's help: the next model is opened before it comes
    assert [ref() is None for ref in held] == [True] * len(held)
    assert sequence.length == 0 and opened.cache.counters.hits > 0  # which are still there
