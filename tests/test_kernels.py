"""The experts' arithmetic against float64, and that its bits depend on nothing but the numbers."""

from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.activation import ACTIVATIONS
from kernels.expert_ffn import ExpertFFN, ExpertWeights, Routing
from kernels.mixed_linear import MATRIX_BLOCK, VECTOR_BLOCK, MixedLinear
from kernels.reference import ffn_reference, moe_reference

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
TOKENS = [1, 2, 3, 8, 33, 64]
# Error of random sums of fp32 products over the norm of the result; rounding x to bf16 would give 2e-3.
FP32 = 1e-6
PAGE = 4096


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed)).to(dtype)


def random_expert(d: int, f: int, dtype: torch.dtype, seed: int = 0) -> ExpertWeights:
    gate, up, down = (
        random(*s, dtype=dtype, seed=3 * seed + i) for i, s in enumerate(((f, d), (f, d), (d, f)))
    )
    return ExpertWeights(gate, up, down)


def error(ours: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm of the float64 result."""
    assert ours.dtype == torch.float32 and exact.dtype == torch.float64 and ours.shape == exact.shape
    return float((ours.double() - exact).norm() / exact.norm())


def placed(tensor: Tensor, offset: int) -> Tensor:
    """The same numbers, `offset` bytes behind the beginning of a page, as in a slot."""
    raw = tensor.contiguous().view(torch.uint8).flatten()
    room = bytearray(len(raw) + PAGE + offset)
    begin = -torch.frombuffer(room, dtype=torch.uint8).data_ptr() % PAGE + offset
    view = memoryview(room)[begin : begin + len(raw)]
    torch.frombuffer(view, dtype=torch.uint8).copy_(raw)
    moved = torch.frombuffer(view, dtype=tensor.dtype).view(tensor.shape)
    assert moved.data_ptr() % PAGE == offset % PAGE
    return moved


# MixedLinear


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(
    "rows, columns", [(1, 1), (1, 7), (7, 1), (5, 3), (33, 17), (64, 48), (129, 257), (768, 2048)]
)
def test_mixed_linear_is_the_fp32_product(dtype: torch.dtype, tokens: int, rows: int, columns: int) -> None:
    x, weight, bias = (
        random(tokens, columns),
        random(rows, columns, dtype=dtype, seed=1),
        random(rows, seed=2),
    )
    linear = MixedLinear()
    exact = x.double() @ weight.double().T
    assert error(linear(x, weight), exact) < FP32
    assert error(linear(x, weight, bias), exact + bias.double()) < FP32


@pytest.mark.parametrize("tokens, block", [(1, VECTOR_BLOCK), (2, MATRIX_BLOCK)])
def test_weights_of_several_blocks_and_a_rest_are_multiplied_whole(tokens: int, block: int) -> None:
    columns = 1009
    rows = 2 * (block // columns) + 5  # two blocks and five rows
    x, weight = random(tokens, columns), random(rows, columns, dtype=torch.bfloat16, seed=1)
    exact = x.double() @ weight.double().T
    ours = MixedLinear()(x, weight)
    assert error(ours, exact) < FP32
    for row in (0, block // columns - 1, block // columns, rows - 1):
        assert error(ours[:, row], exact[:, row]) < 10 * FP32  # a sum may cancel


def test_rows_wider_than_a_block_are_multiplied_one_at_a_time() -> None:
    linear, columns = MixedLinear(), MATRIX_BLOCK + 3
    for tokens in (1, 2):
        x, weight = random(tokens, columns), random(3, columns, dtype=torch.bfloat16, seed=1)
        assert error(linear(x, weight), x.double() @ weight.double().T) < 100 * FP32


def test_a_product_is_not_changed_by_the_next_one() -> None:
    """The scratch is shared; results are not views of it."""
    linear = MixedLinear()
    for tokens in (1, 4):
        x, weight = random(tokens, 40), random(30, 40, dtype=torch.bfloat16, seed=1)
        first = linear(x, weight)
        before = first.clone()
        linear(random(tokens, 50, seed=2), random(60, 50, dtype=torch.bfloat16, seed=3))
        assert torch.equal(first, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", TOKENS)
def test_the_bits_of_a_product_do_not_depend_on_where_the_weights_lie(
    dtype: torch.dtype, tokens: int
) -> None:
    """Tensors in a safetensors file begin at any byte, and a slot keeps their place within the page."""
    linear = MixedLinear()
    for rows, columns in ((5, 3), (24, 32), (97, 129), (128, 576), (576, 128)):
        x, weight = random(tokens, columns), random(rows, columns, dtype=dtype, seed=1)
        expected = linear(x, placed(weight, 0))
        for offset in (1, 2, 3, 4, 8, 12, 20, 32, 36, 60):
            assert torch.equal(linear(x, placed(weight, offset)), expected), (rows, columns, offset)


@pytest.mark.parametrize("tokens", TOKENS)
def test_the_bits_of_an_fp32_product_do_not_depend_on_the_page_of_the_weights(tokens: int) -> None:
    """fp32 weights are multiplied where they lie, and a BLAS may look at the alignment, which slots keep."""
    linear = MixedLinear()
    for rows, columns in ((5, 3), (97, 129), (128, 576)):
        x, weight = random(tokens, columns), random(rows, columns, seed=1)
        for offset in (0, 1, 4, 20, 60):
            expected = linear(x, placed(weight, offset))
            assert torch.equal(linear(x, placed(weight, offset + PAGE)), expected)
            assert torch.equal(linear(x, placed(weight, offset + 3 * PAGE)), expected)


# Experts


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", TOKENS)
def test_an_expert_is_the_reference_expert(activation: str, dtype: torch.dtype, tokens: int) -> None:
    ffn = ExpertFFN(activation, MixedLinear())
    for d, f in ((1, 1), (7, 5), (33, 129), (130, 64)):
        x, expert = random(tokens, d, seed=9) + 0.1, random_expert(d, f, dtype)
        exact = ffn_reference(x.double(), *expert, activation)
        if exact.norm() > 0:  # relu of one neuron may be nothing at all
            assert error(ffn.feed_forward(x, expert), exact) < 4 * FP32
        else:
            assert not ffn.feed_forward(x, expert).any()


def test_the_activations_are_those_that_transformers_knows_by_these_names() -> None:
    known = pytest.importorskip("transformers.activations", reason="transformers is the oracle").ACT2FN
    x = torch.linspace(-6, 6, 101)
    for name, activation in ACTIVATIONS.items():
        assert torch.allclose(activation(x), known[name](x), atol=1e-6), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [2, 3, 33])
def test_a_moe_layer_of_many_tokens_is_the_reference_layer(dtype: torch.dtype, tokens: int) -> None:
    d, f, experts, top_k = 24, 10, 5, 3
    x, weights = random(tokens, d), torch.rand(tokens, top_k, generator=generator(1))
    ids = torch.rand(tokens, experts, generator=generator(2)).argsort(dim=1)[:, :top_k]
    table = [random_expert(d, f, dtype, seed) for seed in range(experts)]
    ffn, routing = ExpertFFN("silu", MixedLinear()), Routing(ids, weights)
    products = torch.full((tokens * top_k, d), torch.nan)
    for expert in routing.experts:
        ffn.tokens(x, routing, expert, table[expert], products)
    exact = moe_reference(x.double(), ids, weights.double(), [*table], "silu")
    assert error(ffn.combine(products, top_k), exact) < FP32


def test_one_token_is_the_reference_layer_and_leaves_other_products_alone() -> None:
    d, f, top_k = 24, 10, 3
    x, weights = random(1, d), torch.rand(1, top_k, generator=generator(1))
    table = [random_expert(d, f, torch.bfloat16, seed) for seed in range(4)]
    ids = torch.tensor([[2, 0, 3]])
    ffn, products = ExpertFFN("silu", MixedLinear()), torch.full((top_k, d), torch.nan)
    ffn.one_token(x, weights[0, 1], table[0], products[1])
    assert products.isnan().any(dim=1).tolist() == [True, False, True]
    ffn.one_token(x, weights[0, 0], table[2], products[0])
    ffn.one_token(x, weights[0, 2], table[3], products[2])
    exact = moe_reference(x.double(), ids, weights.double(), [*table], "silu")
    assert error(ffn.combine(products, top_k), exact) < FP32


def test_the_order_in_which_experts_run_and_where_they_lie_leave_every_bit_alone() -> None:
    tokens, d, f, experts, top_k = 9, 40, 24, 4, 3
    x, weights = random(tokens, d), torch.rand(tokens, top_k, generator=generator(1))
    ids = torch.rand(tokens, experts, generator=generator(2)).argsort(dim=1)[:, :top_k]
    table = [random_expert(d, f, torch.bfloat16, seed) for seed in range(experts)]
    ffn, routing = ExpertFFN("silu", MixedLinear()), Routing(ids, weights)

    def run(order: tuple[int, ...], offset: int) -> Tensor:
        products = torch.full((tokens * top_k, d), torch.nan)
        for expert in order:
            moved = ExpertWeights(*(placed(matrix, offset) for matrix in table[expert]))
            ffn.tokens(x, routing, expert, moved, products)
        return ffn.combine(products, top_k)

    expected = run(tuple(range(experts)), 0)
    for offset, order in enumerate(permutations(range(experts))):
        assert torch.equal(run(order, offset), expected)


# Routing and combining


@settings(deadline=None)
@given(st.data())
def test_routing_covers_every_token_and_choice_exactly_once(data: st.DataObject) -> None:
    experts = data.draw(st.integers(1, 12))
    top_k = data.draw(st.integers(1, experts))
    one_token = st.permutations(range(experts)).map(lambda order: order[:top_k])
    chosen = data.draw(st.lists(one_token, min_size=1, max_size=20))
    ids = torch.tensor(chosen)
    weights = torch.arange(ids.numel(), dtype=torch.float32).view(ids.shape)
    routing = Routing(ids, weights)
    assert sorted(routing.experts) == sorted({expert for token in chosen for expert in token})
    covered: list[int] = []
    for expert in routing.experts:
        rows = routing.rows(expert).tolist()
        assert rows == sorted(rows)
        for row in rows:
            token, k = divmod(row, top_k)
            assert chosen[token][k] == expert
            assert routing.weights[row].item() == weights[token, k].item()
        covered += rows
    assert sorted(covered) == list(range(ids.numel()))


def test_the_experts_of_the_last_tokens_come_last() -> None:
    """What the end of a prompt used is what decoding needs first; the cache keeps the end of this list."""
    ids = torch.tensor([[3, 1], [0, 3], [2, 0], [0, 5]])
    assert Routing(ids, torch.ones(4, 2)).experts == [1, 3, 2, 0, 5]


def test_combine_adds_each_tokens_own_products() -> None:
    products = torch.tensor([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0], [4.0, 40.0], [5.0, 50.0], [6.0, 60.0]])
    assert ExpertFFN.combine(products, 3).tolist() == [[6.0, 60.0], [15.0, 150.0]]
    assert ExpertFFN.combine(products, 2).tolist() == [[3.0, 30.0], [7.0, 70.0], [11.0, 110.0]]
    assert torch.equal(ExpertFFN.combine(products, 1), products)


@pytest.mark.parametrize("top_k", [2, 3, 4, 5, 8, 17])
def test_combine_adds_in_top_k_order(top_k: int) -> None:
    """Of sums that round, the one from the first choice on: the bits tell."""
    products = random(5 * top_k, 67) * 10 ** random(5 * top_k, 1, seed=1)
    rows = products.view(5, top_k, 67)
    expected = rows[:, 0].clone()
    for k in range(1, top_k):
        expected += rows[:, k]
    assert torch.equal(ExpertFFN.combine(products, top_k), expected)
    if top_k > 2:
        assert not torch.equal(ExpertFFN.combine(rows.flip(1).reshape(-1, 67), top_k), expected)
