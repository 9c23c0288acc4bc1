"""A recorded live run, replayed, gives the same hits and misses to the last one: replay is the engine.

Weights and scores are rounded to half precision, as in a trace."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from engines import build_engine
from torch import Tensor

from cache_policies.policy import Geometry
from cache_policies.replay import replay
from cache_policies.routing_trace import RoutingTrace
from flashmoe.engine import Engine
from flashmoe.policies import LIVE_NAMES, build_policy

LAYERS, EXPERTS, TOP_K = 3, 8, 2
PROMPTS = (list(range(7, 60)), list(range(90, 7, -2)))


class Recorder:
    """An observer of the decoder that keeps what ran as a trace."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.forwards: list[int] = [0]
        self.layers: dict[int, list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = {}

    def forward_begins(self, token_ids: Sequence[int]) -> None:
        self.tokens += token_ids
        self.forwards.append(len(self.tokens))

    def routed(self, layer: int, ids: Tensor, weights: Tensor, probabilities: Tensor) -> None:
        rows = tuple(tensor.numpy().copy() for tensor in (ids, weights, probabilities))
        self.layers.setdefault(layer, []).append(rows)  # type: ignore[arg-type]

    def forward_ends(self) -> None:
        pass

    def trace(self) -> RoutingTrace:
        layers = [self.layers[layer] for layer in sorted(self.layers)]
        ids, weights, scores = (
            np.stack([np.concatenate([rows[i] for rows in layer]) for layer in layers], axis=1)
            for i in range(3)
        )
        ends = np.array([0, len(self.tokens)])
        return RoutingTrace(
            "live", EXPERTS, ids, ends, np.array(self.forwards), ("live",), weights.astype(np.float16),
            scores.astype(np.float16), np.array(self.tokens),
        )  # fmt: skip


def run_two_prompts(engine: Engine) -> RoutingTrace:
    """A prompt, an answer, and a second prompt: chunks and single tokens."""
    engine.decoder.observer = recorder = Recorder()
    for prompt in PROMPTS:
        engine.reset()
        logits = engine.prefill(prompt)
        for _ in range(12):
            logits = engine.decode_one_token(int(logits.argmax()))
    return recorder.trace()


@pytest.mark.parametrize("policy", LIVE_NAMES)
@pytest.mark.parametrize(
    ("slots", "per_layer", "spare"),
    [
        (2, False, 0), (3, False, 2), (7, False, 0), (12, False, 3), (24, False, 0),
        (2, True, 0), (4, True, 1), (7, True, 3),
    ],  # fmt: skip
)
def test_a_live_run_replayed_has_the_same_hits_and_misses(
    tiny_model: Path, policy: str, slots: int, per_layer: bool, spare: int
) -> None:
    engine = build_engine(tiny_model, slots=slots, policy=policy, per_layer=per_layer, spare=spare)
    trace = run_two_prompts(engine)
    live = engine.decoder.experts
    geometry = Geometry(LAYERS, EXPERTS, TOP_K, slots, per_layer)
    counts = replay(trace, build_policy(policy, geometry), geometry, spare)
    assert (counts.hits, counts.misses) == (live.counters.hits, live.counters.misses)
    assert live.counters.hits > 0 or slots == 2
    live.close()
