"""LRB: gradient-boosted trees, trained on the run itself, guess when an expert is needed again."""

import random
from collections import deque
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cache_policies.policy import CachePolicy, ExpertId, Geometry

if TYPE_CHECKING:
    import lightgbm

GAPS = 31  # past gaps between uses, as published
COUNTERS = 10  # exponentially decayed use counts, as published
HALF_LIVES = 2.0 ** np.arange(1, 1 + COUNTERS)  # published: 2^10 to 2^19 requests, of far more objects
CANDIDATES = 64  # residents looked at for one eviction, as published
BATCH = 16_384  # labelled samples that make a new model; published: 131 072, for longer traces
WINDOW = 16  # memory window, in times that a layer needs to ask for as many experts as it has
MODEL = {  # as published, but for what makes it repeatable and quiet
    "objective": "regression", "num_leaves": 32, "learning_rate": 0.1, "feature_fraction": 0.8,
    "bagging_fraction": 0.8, "bagging_freq": 5, "num_threads": 1, "deterministic": True,
    "force_row_wise": True, "verbosity": -1,
}  # fmt: skip
ROUNDS = 32


class _Sample:
    """An expert as it looked once; waits for its next use."""

    __slots__ = ("key", "time", "features")

    def __init__(self, key: ExpertId, time: int, features: NDArray[np.float64]) -> None:
        self.key, self.time, self.features = key, time, features


class LRB(CachePolicy):
    """Learning Relaxed Belady (Z. Song et al., NSDI 2020): evicts, of 64 sampled candidates, the one whose
    next use is predicted farthest ahead.

    Every event samples one expert of its layer used within the memory window. Its label is log1p(events until
    its next use), or log1p(2 windows) once it has waited a window. Each full batch of labels trains a new
    model; until the first one, LRU decides. Features: age, the last 31 gaps, 10 decayed counters.

    Adapted: time is counted in events of the expert's own layer; all experts have one size and one type, so
    those features are gone. One object serves all layers, whether they share their slots or not.
    """

    name = "lrb"

    def __init__(self, geometry: Geometry, seed: int = 0) -> None:
        layers, experts = geometry.layers, geometry.experts
        self._seed = seed
        self._random = random.Random(seed)
        self._window = max(1, WINDOW * experts // geometry.top_k)
        self._now = np.zeros(layers, dtype=np.int64)
        self._last_used = np.full((layers, experts), np.nan)
        self._gaps = np.full((layers, experts, GAPS), np.nan)  # the newest first
        self._counts = np.zeros((layers, experts, COUNTERS))  # as of the last use
        self._waiting: list[deque[_Sample]] = [deque() for _ in range(layers)]
        self._waiting_for: dict[ExpertId, list[_Sample]] = {}
        self._features = np.empty((BATCH, 1 + GAPS + COUNTERS))
        self._labels = np.empty(BATCH)
        self._labelled = 0
        self._model: lightgbm.Booster | None = None

    def step(
        self,
        layer: int,
        routed: Sequence[int],
        weights: Sequence[float] | None = None,
        scores: Sequence[float] | None = None,
        token: int = -1,
    ) -> None:
        self._now[layer] += 1
        now = int(self._now[layer])
        experts = sorted(routed)
        for expert in experts:
            for sample in self._waiting_for.pop((layer, expert), ()):
                self._learn(sample, now - sample.time)
        self._use(layer, experts, now)
        waiting = self._waiting[layer]
        while waiting and now - waiting[0].time >= self._window:
            sample = waiting.popleft()
            samples = self._waiting_for.get(sample.key)
            if samples and samples[0] is sample:  # not used since
                del samples[0]
                self._learn(sample, 2 * self._window)
        self._sample(layer, now)

    def _use(self, layer: int, experts: list[int], now: int) -> None:
        gap = now - self._last_used[layer, experts]  # NaN for a first use
        self._gaps[layer, experts, 1:] = self._gaps[layer, experts, :-1]
        self._gaps[layer, experts, 0] = gap
        decay = 0.5 ** (np.nan_to_num(gap)[:, None] / HALF_LIVES)
        self._counts[layer, experts] = 1 + self._counts[layer, experts] * decay
        self._last_used[layer, experts] = now

    def _sample(self, layer: int, now: int) -> None:
        known = np.flatnonzero(now - self._last_used[layer] < self._window)  # NaN compares false
        if not len(known):
            return
        expert = int(known[int(self._random.random() * len(known))])
        features = self._look(np.array([layer]), np.array([expert]))[0]
        sample = _Sample((layer, expert), now, features)
        self._waiting[layer].append(sample)
        self._waiting_for.setdefault(sample.key, []).append(sample)

    def _look(self, layers: NDArray[np.int64], experts: NDArray[np.int64]) -> NDArray[np.float64]:
        """The features of these experts now, one row each."""
        age = (self._now[layers] - self._last_used[layers, experts])[:, None]
        counts = self._counts[layers, experts] * 0.5 ** (np.nan_to_num(age) / HALF_LIVES)
        return np.hstack((age, self._gaps[layers, experts], counts))

    def _learn(self, sample: _Sample, events: int) -> None:
        self._features[self._labelled] = sample.features
        self._labels[self._labelled] = np.log1p(events)
        self._labelled += 1
        if self._labelled == BATCH:
            self._labelled = 0
            self._train()

    def _train(self) -> None:
        import lightgbm

        samples = lightgbm.Dataset(self._features, self._labels, free_raw_data=True)
        self._model = lightgbm.train({**MODEL, "seed": self._seed}, samples, num_boost_round=ROUNDS)

    def victims(self, candidates: Collection[ExpertId], n: int) -> list[ExpertId]:
        if n > len(candidates):
            raise ValueError(f"{n} victims asked for, but only {len(candidates)} experts may leave")
        if n == 0:
            return []
        keys = sorted(candidates)
        if self._model is None:
            layers, experts = np.array(keys).T
            ahead = np.nan_to_num(self._now[layers] - self._last_used[layers, experts], nan=np.inf)
        else:
            if len(keys) > CANDIDATES:
                keys = sorted(self._random.sample(keys, max(n, CANDIDATES)))
            layers, experts = np.array(keys).T
            ahead = np.asarray(self._model.predict(self._look(layers, experts), num_threads=1))
        return [keys[i] for i in np.argsort(-ahead, kind="stable")[:n].tolist()]
