"""Which experts a token goes to, against the formula written out."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmoe.router import route


def plain_route(logits: list[float], top_k: int, renormalise: bool) -> list[tuple[int, float]]:
    """Softmax over all, the k largest, each with its share: for one token, in Python floats."""
    largest = max(logits)
    exponentials = [math.exp(x - largest) for x in logits]
    probabilities = [e / sum(exponentials) for e in exponentials]
    chosen = sorted(range(len(logits)), key=lambda i: -probabilities[i])[:top_k]
    total = sum(probabilities[i] for i in chosen) if renormalise else 1.0
    return [(i, probabilities[i] / total) for i in chosen]


@settings(deadline=None)
@given(
    order=st.permutations(range(10)),
    spread=st.sampled_from([0.01, 0.5, 3.0]),
    top_k=st.integers(1, 10),
    renormalise=st.booleans(),
)
def test_routing_is_softmax_then_top_k(
    order: list[int], spread: float, top_k: int, renormalise: bool
) -> None:
    logits = [spread * rank for rank in order]
    ids, weights = route(torch.eye(10), torch.tensor([logits]).T.repeat(1, 10), top_k, renormalise)
    assert ids.dtype == torch.int64 and weights.dtype == torch.float32
    assert ids.shape == weights.shape == (10, top_k)
    expected = plain_route(logits, top_k, renormalise)
    for token in range(10):
        assert ids[token].tolist() == [i for i, _ in expected]
        assert weights[token].tolist() == pytest.approx([w for _, w in expected], rel=1e-5)


def test_logits_are_the_products_of_hidden_states_and_the_rows_of_the_gate() -> None:
    gate = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])  # three experts of two features
    ids, weights = route(torch.tensor([[2.0, 1.0], [-3.0, -4.0]]), gate, 2, renormalise=False)
    assert ids.tolist() == [[0, 1], [2, 0]]
    for token, logits in enumerate([[2.0, 1.0, -3.0], [-3.0, -4.0, 7.0]]):
        expected = [w for _, w in plain_route(logits, 2, renormalise=False)]
        assert weights[token].tolist() == pytest.approx(expected, rel=1e-5)


def test_weights_come_largest_first_and_sum_to_one_when_renormalised() -> None:
    hidden = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    gate = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))
    for top_k in (1, 4, 16):
        _, plain = route(hidden, gate, top_k, renormalise=False)
        _, renormalised = route(hidden, gate, top_k, renormalise=True)
        assert torch.equal(plain, plain.sort(dim=1, descending=True).values)
        assert torch.allclose(renormalised.sum(dim=1), torch.ones(50), atol=1e-6)
        assert (plain.sum(dim=1) <= 1 + 1e-6).all()


def test_renormalising_equals_a_softmax_over_the_chosen_logits() -> None:
    """Mixtral's rule as the paper writes it."""
    hidden = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    gate = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
    ids, weights = route(hidden, gate, 2, renormalise=True)
    expected = torch.softmax((hidden @ gate.T).gather(1, ids), dim=1)
    assert torch.allclose(weights, expected, atol=1e-6)


def test_equal_logits_give_equal_weights_and_different_experts() -> None:
    ids, weights = route(torch.zeros(3, 4), torch.ones(8, 4), 5, renormalise=True)
    assert [len(set(token)) for token in ids.tolist()] == [5, 5, 5]
    assert torch.equal(weights, torch.full((3, 5), 0.2))
    again, _ = route(torch.zeros(3, 4), torch.ones(8, 4), 5, renormalise=True)
    assert torch.equal(ids, again)


def test_logits_too_large_for_an_exponential_still_route() -> None:
    gate = torch.tensor([[1e4], [3e4], [2e4]])
    ids, weights = route(torch.tensor([[1.0]]), gate, 1, renormalise=True)
    assert ids.tolist() == [[1]] and weights.tolist() == [[1.0]]
