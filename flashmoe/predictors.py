"""Predictors of the experts that a token will ask for in layers to come."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor

from flashmoe.config import ModelConfig
from flashmoe.decoder import Decoder, native_router
from flashmoe.errors import ConfigError
from flashmoe.prefetch import Guess, Predictor
from flashmoe.weights import DenseWeights
from kernels.native import Context

REPEATS = 0.1  # what an expert's use by the token before adds to its chance
MAPS = 1000
RIDGE, SOLVE_TOKENS = 3.0, 64
ONE = np.ones(1, dtype=np.float32)


class NextRouter:
    """The next layer's own norm and router on this layer's residual stream, before its experts are added.

    No training: a layer changes the stream little (Mixtral-offloading, arXiv 2312.17238; Fate, 2502.12224).
    """

    def __init__(
        self, config: ModelConfig, weights: DenseWeights, kernels: Context, horizon: int = 1
    ) -> None:
        self._kernels, self._horizon = kernels, horizon
        self._routers = [native_router(config, layer) for layer in weights.layers]
        self._h = torch.empty(config.hidden_size)
        self._probabilities = torch.empty(config.num_experts)
        self._ids = torch.empty(config.num_experts_per_tok, dtype=torch.int32)
        self._weights = torch.empty(config.num_experts_per_tok)
        buffers = (self._h, self._probabilities, self._ids, self._weights)
        self._addresses = tuple(buffer.data_ptr() for buffer in buffers)

    def forward_begins(self, token_ids: Sequence[int]) -> None:
        pass

    def predict(self, layer: int, x: Tensor, routed: Sequence[int], scores: Sequence[float]) -> list[Guess]:
        guesses: list[Guess] = []
        for ahead in range(layer + 1, min(layer + 1 + self._horizon, len(self._routers))):
            router = self._routers[ahead]
            if router is not None:
                self._kernels.route(router, x.data_ptr(), 1, *self._addresses)
                chosen = zip(self._ids.tolist(), self._weights.tolist(), strict=True)
                guesses += [Guess(ahead, expert, weight) for expert, weight in chosen]
        return guesses

    def predict_together(self, layer: int, x: Tensor) -> list[Guess]:
        """For one step of several sequences, x [T, D]: the next layer's experts, the surest first. An
        expert's confidence is the chance that at least one token wants it, were weights chances."""
        ahead, tokens = layer + 1, len(x)
        router = self._routers[ahead] if ahead < len(self._routers) else None
        if router is None:
            return []
        top_k = len(self._ids)
        h, probabilities = torch.empty(tokens, x.shape[1]), torch.empty(tokens, len(self._probabilities))
        ids, weights = torch.empty(tokens, top_k, dtype=torch.int32), torch.empty(tokens, top_k)
        self._kernels.route(
            router, x.data_ptr(), tokens, h.data_ptr(), probabilities.data_ptr(), ids.data_ptr(),
            weights.data_ptr(),
        )  # fmt: skip
        unwanted = np.ones(len(self._probabilities))
        np.multiply.at(unwanted, ids.numpy().ravel(), 1 - np.minimum(weights.numpy().ravel(), 1.0))
        order = np.argsort(unwanted, kind="stable")
        return [Guess(ahead, int(e), float(1 - unwanted[e])) for e in order if unwanted[e] < 1]


class TransitionTable:
    """Counts, learnt as tokens come: which experts of the next layer follow the experts of this one, and
    which the layer chose for the token before (ST-MoE, arXiv 2606.15453). No model needed."""

    def __init__(self, config: ModelConfig) -> None:
        layers, experts = config.num_hidden_layers, config.num_experts
        self._top_k = config.num_experts_per_tok
        self._moe_layers = config.moe_layers
        self._follows = np.full((layers, experts, experts), 1 / experts, dtype=np.float32)
        self._uses = np.ones((layers, experts), dtype=np.float32)
        self._last: list[list[int]] = [[] for _ in range(layers)]
        self._before: tuple[int, list[int]] | None = None  # the layer before and its experts

    def forward_begins(self, token_ids: Sequence[int]) -> None:
        self._before = None

    def predict(self, layer: int, x: Tensor, routed: Sequence[int], scores: Sequence[float]) -> list[Guess]:
        now = list(routed)
        if self._before is not None and self._before[0] == layer - 1:
            self._follows[layer - 1][np.ix_(self._before[1], now)] += 1
        self._uses[layer, now] += 1
        self._last[layer], self._before = now, (layer, now)
        ahead = layer + 1
        if ahead == len(self._moe_layers) or not self._moe_layers[ahead]:
            return []
        chances = (self._follows[layer, now] / self._uses[layer, now, None]).mean(axis=0)  # [E]
        if self._last[ahead]:
            chances[self._last[ahead]] += REPEATS
        return surest(ahead, chances, self._top_k)


class ExpertMaps:
    """Maps of earlier tokens: each one's router probabilities in all layers, and its request's prompt, as the
    mean of its embeddings (FineMoE, arXiv 2502.05370). The map is followed whose prompt and whose layers so
    far are most alike. The newest `MAPS` are kept. A map a request, the mean of its tokens, found a third as
    many of the misses. They go with the process: a mean of embeddings tells much of what was asked, so on
    the drive they are only where somebody calls `save`.
    """

    def __init__(self, config: ModelConfig, embed: Callable[[Sequence[int]], Tensor]) -> None:
        self._embed, self._top_k, self._moe_layers = embed, config.num_experts_per_tok, config.moe_layers
        shape = (config.num_hidden_layers, config.num_experts)
        self._maps = np.zeros((MAPS, *shape), dtype=np.float32)  # scaled to length 1 in each layer
        self._prompts = np.zeros((MAPS, config.hidden_size), dtype=np.float32)
        self._kept = 0  # so far; the next one goes to this place modulo MAPS
        self._prompt = np.zeros(config.hidden_size, dtype=np.float32)
        self._now = np.zeros(shape, dtype=np.float32)  # of this token, as far as it has come
        self._similar = np.zeros(0, dtype=np.float32)  # of each map, over the layers so far

    def forward_begins(self, token_ids: Sequence[int]) -> None:
        self._keep()
        if len(token_ids) > 1:
            self._prompt = _unit(self._embed(token_ids).numpy().mean(axis=0))
        self._similar = self._prompts[: min(self._kept, MAPS)] @ self._prompt

    def predict(self, layer: int, x: Tensor, routed: Sequence[int], scores: Sequence[float]) -> list[Guess]:
        seen = self._now[layer] = _unit(np.asarray(scores, dtype=np.float32))
        ahead, known = layer + 1, len(self._similar)
        if not known:
            return []
        self._similar += self._maps[:known, layer] @ seen
        if ahead == len(self._moe_layers) or not self._moe_layers[ahead]:
            return []
        return surest(ahead, self._maps[self._similar.argmax(), ahead], self._top_k)

    def save(self, path: Path) -> None:
        """Keep the maps for another day, as safetensors."""
        self._keep()
        kept = min(self._kept, MAPS)
        save_file({"maps": self._maps[:kept], "prompts": self._prompts[:kept]}, path)

    def load(self, path: Path) -> None:
        """Begin with the maps that `save` wrote. ConfigError for a file that does not fit this model."""
        try:
            found = load_file(path)
            maps, prompts = found["maps"][-MAPS:], found["prompts"][-MAPS:]
        except (OSError, KeyError, SafetensorError) as error:
            raise ConfigError(f"{path} holds no expert maps: {error}") from error
        shapes = (maps.shape, prompts.shape)
        known = ((len(maps), *self._maps.shape[1:]), (len(maps), *self._prompts.shape[1:]))
        if shapes != known or {maps.dtype, prompts.dtype} != {np.dtype(np.float32)}:
            raise ConfigError(f"{path} holds expert maps of another model")
        self._kept = len(maps)
        self._maps[: self._kept], self._prompts[: self._kept] = maps, prompts

    def _keep(self) -> None:
        """A token that ran through all layers becomes a map."""
        if all(self._now[layer].any() for layer, is_moe in enumerate(self._moe_layers) if is_moe):
            place = self._kept % MAPS
            self._maps[place], self._prompts[place] = self._now, self._prompt
            self._kept += 1
        self._now[:] = 0


class LearnedPredictor:
    """A linear model a layer, from this layer's router probabilities and those of the next layer at the token
    before, to the next layer's experts (after ProMoE, arXiv 2410.22134, with no hidden layer).

    Ridge regression by its normal equations, so it learns online: they grow with each token, and are solved
    every `SOLVE_TOKENS`.
    """

    def __init__(self, config: ModelConfig) -> None:
        layers, experts = config.num_hidden_layers, config.num_experts
        inputs = 2 * experts + 1
        self._top_k, self._moe_layers = config.num_experts_per_tok, config.moe_layers
        self._xx = np.tile(np.eye(inputs, dtype=np.float32) * RIDGE, (layers, 1, 1))
        self._xy = np.zeros((layers, inputs, experts), dtype=np.float32)
        self._weights = np.zeros((layers, inputs, experts), dtype=np.float32)
        self._scores = np.zeros((layers, experts), dtype=np.float32)  # of the newest token in each layer
        self._inputs: NDArray[np.float32] | None = None
        self._tokens = 0

    def forward_begins(self, token_ids: Sequence[int]) -> None:
        self._inputs = None
        self._tokens += 1
        if self._tokens % SOLVE_TOKENS == 0:
            self._weights = np.linalg.solve(self._xx, self._xy)

    def predict(self, layer: int, x: Tensor, routed: Sequence[int], scores: Sequence[float]) -> list[Guess]:
        if self._inputs is not None:
            self._xx[layer - 1] += np.outer(self._inputs, self._inputs)
            self._xy[layer - 1][:, list(routed)] += self._inputs[:, None]
        self._scores[layer] = scores
        ahead, self._inputs = layer + 1, None
        if ahead == len(self._moe_layers) or not self._moe_layers[ahead]:
            return []
        before = np.sqrt(self._scores[ahead])
        self._inputs = np.concatenate([np.log(self._scores[layer] + 1e-4), before, ONE])
        return surest(ahead, self._inputs @ self._weights[layer], self._top_k)


# `--predictor`; the names are those of config.PREDICTOR_NAMES.
PREDICTORS: dict[str, Callable[[Decoder, DenseWeights], Predictor]] = {
    "next-router": lambda decoder, weights: NextRouter(decoder.config, weights, decoder.kernels),
    "transitions": lambda decoder, weights: TransitionTable(decoder.config),
    "maps": lambda decoder, weights: ExpertMaps(decoder.config, decoder.embed),
    "learned": lambda decoder, weights: LearnedPredictor(decoder.config),
}


def predictor_bytes(name: str, config: ModelConfig) -> int:
    """The memory that a predictor takes; what is small is not counted."""
    layers, experts, inputs = config.num_hidden_layers, config.num_experts, 2 * config.num_experts + 1
    floats = {
        "transitions": layers * experts * experts,
        "maps": MAPS * (layers * experts + config.hidden_size),
        "learned": layers * inputs * (inputs + 3 * experts),  # a third one while it is solved
    }
    return 4 * floats.get(name, 0)


def surest(layer: int, chances: NDArray[np.float32], n: int) -> list[Guess]:
    """The `n` likeliest experts of a layer."""
    best = np.argsort(-chances, kind="stable")[:n].tolist()
    return [Guess(layer, expert, min(1.0, max(0.0, float(chances[expert])))) for expert in best]


def _unit(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scaled to length 1 along the last axis; zeros stay."""
    length = np.maximum(np.linalg.norm(values, axis=-1, keepdims=True), 1e-20)
    return np.asarray(values / length, dtype=np.float32)
