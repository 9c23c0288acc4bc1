"""What a token gets beside others is what it gets alone, bit for bit, whatever the others are.

Attention's share is in tests/test_triton_attention.py. Without a GPU the kernels run in Triton's interpreter,
on tiny shapes; on a GPU, where another number of tokens could mean another kernel, on those of real models.
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels import expert_slots
from kernels.triton_decode import MOST_TOKENS, ExpertDecode, GpuMatrix, Shape, linear
from kernels.triton_rope import rope_and_store
from kernels.triton_router import route
from kernels.triton_token import embed_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MOST = MOST_TOKENS
DENSE = [*expert_slots.FLOATS, *expert_slots.BITS]


def random(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(DEVICE)


def same_alone(results: Callable[[list[int]], list[Tensor]], companies: list[list[int]]) -> None:
    """`results` of some tokens: tensors with a row for each. Every company, and everyone alone (without a GPU
    two of them: the interpreter is slow)."""
    together = results(list(range(MOST)))
    assert not any(result.isnan().any() for result in together)
    alone = range(MOST) if DEVICE == "cuda" else (0, MOST - 1)
    for tokens in [*companies, *([token] for token in alone)]:
        for found, expected in zip(results(tokens), together, strict=True):
            assert torch.equal(found, expected[tokens]), tokens


def tiny_or(*real: tuple[int, ...], tiny: tuple[int, ...]) -> list[object]:
    """Sizes: the real ones on a GPU only."""
    return [tiny, *(pytest.param(sizes, marks=pytest.mark.gpu) for sizes in real)]


def poisoned(*shape: int) -> Tensor:
    return torch.full(shape, math.nan, device=DEVICE)


def packed(format: str, rows: int, columns: int) -> GpuMatrix:
    weight = random(rows, rows, columns, scale=columns**-0.5).cpu()
    return GpuMatrix(expert_slots.pack_matrix(format, weight).to(DEVICE), format, rows, columns)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("sizes", tiny_or((1024, 2048), (512, 4096), (256, 12288), tiny=(16, 96)))
@pytest.mark.parametrize("format", DENSE)
def test_dense_products(format: str, sizes: tuple[int, int], exact: bool) -> None:
    if exact and format in expert_slots.FLOATS:
        pytest.skip("always exact")
    rows, columns = sizes
    weight, shape = packed(format, rows, columns), None
    if DEVICE == "cpu":  # few programs, and columns in chunks, as 12,288 of them are
        shape = Shape(1, 1, 64) if format in expert_slots.BITS else Shape(16, 1, 64)
    x, norm, before, bias = (
        random(i, *n) for i, n in enumerate([(MOST, columns), (columns,), (MOST, rows), (rows,)])
    )

    def results(tokens: list[int]) -> list[Tensor]:
        plain, added = poisoned(len(tokens), rows), before[tokens]
        linear(x[tokens], weight, plain, exact=exact, shape=shape)
        linear(
            x[tokens], weight, added,
            norm=norm, eps=1e-5, bias=bias, residual=True, exact=exact, shape=shape,
        )  # fmt: skip
        return [plain, added]

    same_alone(results, [[5, 1, 6]])


@pytest.mark.parametrize("sizes", tiny_or((128, 2048, 8), (60, 2048, 4), (8, 4096, 2), tiny=(6, 48, 2)))
def test_routers(sizes: tuple[int, int, int]) -> None:
    experts, hidden, top_k = sizes
    x, norm, router = random(1, MOST, hidden), random(2, hidden), random(3, experts, hidden, scale=0.1)
    table = torch.arange(experts, dtype=torch.int32, device=DEVICE)

    def results(tokens: list[int]) -> list[Tensor]:
        t = len(tokens)
        h, probabilities, weights = poisoned(t, hidden), poisoned(t, experts), poisoned(t, top_k)
        ids, slots = (torch.full((t, top_k), -9, dtype=torch.int32, device=DEVICE) for _ in range(2))
        missed = torch.zeros(1, dtype=torch.int32, device=DEVICE)
        route(
            x[tokens], norm, 1e-5, router, True, table, h, probabilities, ids, weights, slots, missed, 0,
            saved=(saved := poisoned(t, hidden)),
        )  # fmt: skip
        return [h, probabilities, ids, weights, slots, saved]

    same_alone(results, [[5, 1, 6], [7, 0]])


@pytest.mark.parametrize("sizes", tiny_or((300, 2048), tiny=(20, 96)))
@pytest.mark.parametrize("format", DENSE)
def test_embeddings(format: str, sizes: tuple[int, int]) -> None:
    weight = packed(format, *sizes)
    ids = torch.randint(sizes[0], (MOST,), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    missed = torch.zeros(1, dtype=torch.int32, device=DEVICE)

    def results(tokens: list[int]) -> list[Tensor]:
        embed_rows(weight, ids[tokens], out := poisoned(len(tokens), sizes[1]), missed, 9)
        return [out]

    same_alone(results, [[5, 1, 6]])


@pytest.mark.parametrize("in_ram", [False, True])  # some of them, and pairs of one expert share what is read
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("sizes", tiny_or((2048, 768, 8), (4096, 1536, 2), tiny=(32, 32, 2)))
@pytest.mark.parametrize("format", expert_slots.FORMATS)
def test_experts(format: str, sizes: tuple[int, int, int], exact: bool, in_ram: bool) -> None:
    if exact and format not in expert_slots.BITS:
        pytest.skip("always exact")
    hidden, width, top_k = sizes
    stride, experts = -(-expert_slots.slot_bytes(format, hidden, width) // 64) * 64, top_k + 2
    arena = torch.zeros(experts, stride, dtype=torch.uint8)
    for e, slot in enumerate(arena):
        gate, up = (random(10 * e + i, width, hidden, scale=hidden**-0.5).cpu() for i in range(2))
        down = random(10 * e + 2, hidden, width, scale=width**-0.5).cpu()
        blob = expert_slots.pack_expert(format, gate, up, down)
        slot[: len(blob)] = blob
    arena, ram = arena.to(DEVICE), None
    if in_ram:
        ram = arena[2:].cpu().pin_memory() if DEVICE == "cuda" else arena[2:]
        arena = arena[:2]
    decode = ExpertDecode(hidden, width, format, "silu", top_k, MOST, DEVICE, exact)
    x, before = random(5, MOST, hidden), random(6, MOST, hidden)
    order = [torch.randperm(experts, generator=torch.Generator().manual_seed(t))[:top_k] for t in range(MOST)]
    slots, weights = torch.stack(order).int().to(DEVICE), random(7, MOST, top_k).softmax(-1)

    def results(tokens: list[int]) -> list[Tensor]:
        decode.products.fill_(math.nan)
        y = before[tokens]
        decode.run(x[tokens], slots[tokens].flatten(), arena, ram)
        decode.combine(weights[tokens], y)
        return [y, decode.products.view(MOST, top_k, hidden)[: len(tokens)].clone()]

    same_alone(results, [[5, 1, 6]])


@pytest.mark.parametrize("sizes", tiny_or((32, 4, 128), (16, 16, 64), tiny=(3, 1, 16)))
@pytest.mark.parametrize("mode", ["none", "head", "full"])
def test_queries_keys_and_values(mode: str, sizes: tuple[int, int, int]) -> None:
    heads, kv_heads, d = sizes
    qkv, angle = random(1, MOST, (heads + 2 * kv_heads) * d), random(2, 20, d // 2).repeat(1, 2)
    lengths = (heads * d, kv_heads * d) if mode == "full" else (d, d)
    q_norm, k_norm = (random(3 + i, n) if mode != "none" else None for i, n in enumerate(lengths))
    positions = torch.tensor([3, 19, 0, 7, 7, 11, 2, 5], dtype=torch.int32, device=DEVICE)
    sequences = torch.tensor([4, 2, 7, 0, 1, 3, 6, 5], dtype=torch.int32, device=DEVICE)  # of a page each

    def results(tokens: list[int]) -> list[Tensor]:
        keys, values = poisoned(2, MOST, 20, kv_heads, d).half()
        q = poisoned(len(tokens), heads, d).half()
        rope_and_store(
            qkv[tokens], angle.cos(), angle.sin(), sequences[tokens, None], positions[tokens], keys, values,
            q,
            heads=heads, kv_heads=kv_heads, head_dim=d, qk_norm=mode, q_norm=q_norm, k_norm=k_norm, eps=1e-5,
        )  # fmt: skip
        at = sequences[tokens], positions[tokens]
        return [q, keys[at], values[at]]

    same_alone(results, [[5, 1], [0, 7, 3]])

