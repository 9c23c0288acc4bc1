"""The policy of the FlashMoE paper: a small network a layer ranks experts by recency and frequency.

`train` makes the weights from a recorded trace; `PaperNetwork` evaluates them. No files are read or written.
"""

import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cache_policies.policy import CachePolicy, ExpertId
from cache_policies.routing_trace import RoutingTrace

HIDDEN = (64, 64)  # with E = 128 this is the paper's 113 KB of float32 a layer
CLIP = 0.75  # of E: a next use farther ahead counts as this far


@dataclass(frozen=True, slots=True)
class PaperWeights:
    """The networks of all layers, one behind the other; plain float32 arrays.

    `matrices`: [L, 2E, H1], [L, H1, H2], [L, H2, E]; `biases`: [L, H1], [L, H2], [L, E].
    """

    matrices: tuple[NDArray[np.float32], ...]
    biases: tuple[NDArray[np.float32], ...]

    @property
    def layers(self) -> int:
        return len(self.matrices[0])

    @property
    def experts(self) -> int:
        return int(self.matrices[-1].shape[-1])


class PaperNetwork(CachePolicy):
    """Evicts the expert whose next use the layer's network puts farthest ahead (FlashMoE, arXiv 2601.17063).

    Inputs: 1 / r and f / max f of each of the layer's E experts; r is the layer's events since the last use,
    that one included, and f counts uses; both survive eviction, and 0 stands for never used. Output: E
    distances to the next use, 1 being CLIP * E events or more; the absolute value counts, as in the paper's
    code. ReLU instead of SiLU, which the trainer does not offer. Cached scores are the event's own: a layer's
    inputs change only when it runs.
    """

    name = "paper"

    def __init__(self, weights: PaperWeights) -> None:
        self._weights = weights
        self._age = np.full((weights.layers, weights.experts), np.inf, dtype=np.float32)
        self._uses = np.zeros((weights.layers, weights.experts), dtype=np.float32)
        self._distances: dict[int, list[float]] = {}  # layer -> of its experts, as of its last event

    def step(
        self,
        layer: int,
        routed: Sequence[int],
        weights: Sequence[float] | None = None,
        scores: Sequence[float] | None = None,
        token: int = -1,
    ) -> None:
        self._age[layer] += 1
        self._age[layer, routed] = 1
        self._uses[layer, routed] += 1
        self._distances.pop(layer, None)

    def victims(self, candidates: Collection[ExpertId], n: int) -> list[ExpertId]:
        if n > len(candidates):
            raise ValueError(f"{n} victims asked for, but only {len(candidates)} experts may leave")
        for layer in {layer for layer, _ in candidates}.difference(self._distances) if n else ():
            self._distances[layer] = self._evaluate(layer)
        ranked = sorted((-self._distances[layer][expert], layer, expert) for layer, expert in candidates if n)
        return [(layer, expert) for _, layer, expert in ranked[:n]]

    def _evaluate(self, layer: int) -> list[float]:
        values = inputs(self._age[layer], self._uses[layer])
        last = len(self._weights.matrices) - 1
        for i, (matrix, bias) in enumerate(zip(self._weights.matrices, self._weights.biases, strict=True)):
            values = values @ matrix[layer] + bias[layer]
            if i < last:
                values = np.maximum(values, 0)
        distances: list[float] = np.abs(values).tolist()
        return distances


def inputs(age: NDArray[np.float32], uses: NDArray[np.float32]) -> NDArray[np.float32]:
    """[..., E] ages and use counts -> [..., 2E]."""
    return np.concatenate((1 / age, uses / np.maximum(1, uses.max(axis=-1, keepdims=True))), axis=-1)


def train(trace: RoutingTrace, *, seed: int = 0, epochs: int = 200, rows: int = 40_000) -> PaperWeights:
    """Fit a network for each layer to the next uses that Belady would know; the first `rows` tokens at most.

    As published: mean squared error, Adam of rate 2e-3, batches of 256, at most `epochs` of them, patience 5
    on a tenth of the rows.
    """
    tokens = min(len(trace), rows)
    if not tokens:
        raise ValueError(f"{trace.name} has no tokens to train on")
    layers = [_fit(trace, layer, tokens, seed, epochs) for layer in range(trace.layers)]
    matrices, biases = zip(*layers, strict=True)
    return PaperWeights(
        tuple(np.stack(parts) for parts in zip(*matrices, strict=True)),
        tuple(np.stack(parts) for parts in zip(*biases, strict=True)),
    )


Arrays = list[NDArray[np.float32]]


def _fit(trace: RoutingTrace, layer: int, tokens: int, seed: int, epochs: int) -> tuple[Arrays, Arrays]:
    from sklearn.exceptions import ConvergenceWarning  # type: ignore[import-untyped]
    from sklearn.neural_network import MLPRegressor  # type: ignore[import-untyped]

    x, y = examples(trace.experts[:tokens, layer], trace.num_experts)
    network = MLPRegressor(
        hidden_layer_sizes=HIDDEN, batch_size=min(256, tokens), learning_rate_init=2e-3, max_iter=epochs,
        random_state=seed, early_stopping=tokens >= 100, n_iter_no_change=5,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # `epochs` is a limit, not a promise
        network.fit(x, y)
    return (
        [np.asarray(matrix, dtype=np.float32) for matrix in network.coefs_],
        [np.asarray(bias, dtype=np.float32) for bias in network.intercepts_],
    )


def examples(
    routed: NDArray[np.integer], experts: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """One layer's tokens [T, K] -> inputs [T, 2E] as the policy sees them, targets [T, E] in 0..1."""
    tokens = len(routed)
    used = np.zeros((tokens, experts), dtype=np.bool_)
    np.put_along_axis(used, routed.astype(np.int64), True, axis=1)
    time = np.arange(tokens)[:, None]
    last = np.maximum.accumulate(np.where(used, time, -np.inf), axis=0)
    following = np.minimum.accumulate(np.where(used, time, np.inf)[::-1], axis=0)[::-1]
    distance = np.vstack((following[1:], np.full((1, experts), np.inf))) - time
    x = inputs((time - last + 1).astype(np.float32), used.cumsum(axis=0).astype(np.float32))
    return x, (np.minimum(distance, CLIP * experts) / (CLIP * experts)).astype(np.float32)
