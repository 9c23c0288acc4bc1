"""What a token gets beside others is what it gets alone, bit for bit, whatever the others are.

Attention's share is in tests/test_triton_attention.py. Without a GPU the kernels run in Triton's interpreter,
on tiny shapes; on a GPU, where every number of tokens may be a kernel of its own, on those of real models.
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels.triton_rope import rope_and_store

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MOST = 8


def random(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(DEVICE)


def same_alone(results: Callable[[list[int]], list[Tensor]], companies: list[list[int]]) -> None:
    """`results` of some tokens: tensors with a row for each. Every company, and everyone alone."""
    together = results(list(range(MOST)))
    assert not any(result.isnan().any() for result in together)
    for tokens in [*companies, *([token] for token in range(MOST))]:
        for found, expected in zip(results(tokens), together, strict=True):
            assert torch.equal(found, expected[tokens]), tokens


@pytest.mark.parametrize(
    "sizes", [(3, 1, 16), pytest.param((32, 4, 128), marks=pytest.mark.gpu)], ids=["tiny", "real"]
)
@pytest.mark.parametrize("mode", ["none", "head", "full"])
def test_queries_keys_and_values(mode: str, sizes: tuple[int, int, int]) -> None:
    heads, kv_heads, d = sizes
    qkv, angle = random(1, MOST, (heads + 2 * kv_heads) * d), random(2, 20, d // 2).repeat(1, 2)
    lengths = (heads * d, kv_heads * d) if mode == "full" else (d, d)
    q_norm, k_norm = (random(3 + i, n) if mode != "none" else None for i, n in enumerate(lengths))
    positions = torch.tensor([3, 19, 0, 7, 7, 11, 2, 5], dtype=torch.int32, device=DEVICE)
    sequences = torch.tensor([4, 2, 7, 0, 1, 3, 6, 5], dtype=torch.int32, device=DEVICE)  # of a page each

    def results(tokens: list[int]) -> list[Tensor]:
        keys, values = torch.full((2, MOST, 20, kv_heads, d), math.nan, device=DEVICE).half()
        q = torch.full((len(tokens), heads, d), math.nan, device=DEVICE).half()
        rope_and_store(
            qkv[tokens], angle.cos(), angle.sin(), sequences[tokens, None], positions[tokens], keys, values,
            q,
            heads=heads, kv_heads=kv_heads, head_dim=d, qk_norm=mode, q_norm=q_norm, k_norm=k_norm, eps=1e-5,
        )  # fmt: skip
        at = sequences[tokens], positions[tokens]
        return [q, keys[at], values[at]]

    same_alone(results, [[5, 1], [0, 7, 3]])

