"""What the experts' inputs look like on a text: so that quantising spends its precision where it is used.

The source model runs over the text, layer by layer: all of the text passes one layer before the next, so
it runs once and only one layer's records are in memory. For int8 the mean squares are recorded of what
enters gate and up, by layer, and of what enters down, by expert; the squared error of a column then
counts as much as its mean square, as with llama.cpp's imatrix. For int4 it is the whole mean of x x^T,
for flashmoe/gptq.py, of one layer at a time. Axis letters: T tokens, D hidden, F expert width.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from flashmoe.bench_text import read_prompts
from flashmoe.config import RunConfig
from flashmoe.decoder import Decoder
from flashmoe.errors import BudgetError, ConfigError
from flashmoe.gptq import Hessian, hessian_bytes
from flashmoe.loader import LoadedEngine, OpenedModel, load_engine, plan_model
from flashmoe.model_source import Progress
from flashmoe.tokenizer import Tokenizer
from flashmoe.weights import ExpertId
from kernels.expert_ffn import Addresses, ExpertFFN, Routing
from kernels.native import ACTIVATIONS, Experts, Matrix, make_context
from kernels.reference import ACTIVATIONS as REFERENCE_ACTIVATIONS

WINDOW = 512
SHORTEST = 32  # tokens of a text worth running
DEFAULT_TOKENS = 16384
RAM_BUDGETS = ("1GB", "2GB", "4GB", "8GB", "16GB", "auto")  # of the model that runs: the first one that works
HESSIAN_BYTES = 480 << 20  # at a time: 2 GB in all, with the model that runs and what waits to be written
PRIOR_TOKENS = 16  # an expert that saw few tokens is taken to be like its layer's mean
FLOOR = 1e-3  # of the mean: no column is worth nothing


@dataclass(frozen=True, slots=True)
class CalibrationText:
    """A text to run, and how much of it."""

    path: Path
    tokens: int = DEFAULT_TOKENS

    def digest(self) -> str:
        """Of the whole text. Raises ConfigError if it cannot be read."""
        try:
            return hashlib.sha256(self.path.read_bytes()).hexdigest()[:16]
        except OSError as error:
            raise ConfigError(f"cannot read {self.path}: {error.strerror}") from error

    def describe(self) -> str:
        """Changes with the text and the number of tokens."""
        return f"{self.digest()}, {self.tokens} tokens"


@dataclass(frozen=True, slots=True)
class Calibration:
    """Mean squares of the columns, fp32: of gate's and up's by layer, of down's by expert."""

    inputs: dict[int, Tensor]  # [D]
    hidden: dict[ExpertId, Tensor]  # [F]
    tokens: int

    def importance(self, expert: ExpertId) -> tuple[Tensor, Tensor]:
        return self.inputs[expert[0]], self.hidden[expert]


def calibrate(
    model: OpenedModel, text: CalibrationText, threads: int, progress: Progress | None = None
) -> Calibration:
    """Run the model over the text and record. Raises ConfigError for a text without enough tokens."""
    inputs: dict[int, Tensor] = {}
    hidden: dict[ExpertId, Tensor] = {}
    with TextRun(model, text, threads) as run:
        layers = [layer for layer, is_moe in enumerate(model.config.moe_layers) if is_moe]
        for done, layer in enumerate(layers):
            squares = _Squares(model)
            run.to(layer, squares)
            inputs[layer] = _floored(squares.inputs / run.tokens)
            for expert, importance in enumerate(squares.of_hidden()):
                hidden[layer, expert] = importance
            if progress is not None:
                progress("calibrating (layers)", done + 1, len(layers))
    return Calibration(inputs, hidden, run.tokens)


class Hessians:
    """The mean of x x^T of experts' inputs, for experts asked for in ascending order.

    At most HESSIAN_BYTES at a time: a layer's experts in as many runs of it as that takes, mostly one.
    """

    def __init__(self, model: OpenedModel, text: CalibrationText, threads: int) -> None:
        self._model = model
        self._run = TextRun(model, text, threads)
        self._grams: _Grams | None = None

    def of(self, expert: ExpertId) -> tuple[Hessian, list[Tensor]]:
        """Of gate's and up's inputs, one for the layer, and of down's: blended with the layer's mean."""
        layer, number = expert
        grams = self._grams
        if grams is None or grams.layer != layer or number not in grams.hidden:
            self._grams = grams = None  # their memory is for the next ones
            c = self._model.config
            numbers = experts_at_a_time(c.hidden_size, c.moe_intermediate_size, c.num_experts, number)
            grams = _Grams(self._model, layer, numbers)
            self._run.to(layer, grams, stay=numbers.stop < c.num_experts)
            self._grams = grams
        width = self._model.config.moe_intermediate_size
        return grams.inputs, grams.hidden[number].mean_with(grams.mean_hidden, width / 2)

    def __enter__(self) -> "Hessians":
        return self

    def __exit__(self, *_: object) -> None:
        self._run.close()


def experts_at_a_time(hidden: int, width: int, experts: int, first: int) -> range:
    """As many from `first` as have room beside the two of the whole layer; at least one."""
    room = HESSIAN_BYTES - hessian_bytes(hidden) - hessian_bytes(width)
    return range(first, min(experts, first + max(1, room // hessian_bytes(width))))


def take_windows(tokenizer: Tokenizer, texts: Sequence[str], tokens: int) -> Iterator[list[int]]:
    """Windows of up to 512 tokens, `tokens` in all: the first of texts all over the list, then the second."""
    step = max(1, len(texts) * WINDOW // max(tokens, 1))
    order = [text for first in range(step) for text in texts[first::step]]
    encoded: list[list[int]] = []
    left = tokens
    depth = 0
    while left >= SHORTEST:
        found = False
        for number, text in enumerate(order):
            if number == len(encoded):
                encoded.append(tokenizer.encode(text))
            window = encoded[number][depth * WINDOW : (depth + 1) * WINDOW][:left]
            if len(window) >= SHORTEST:
                found = True
                left -= len(window)
                yield window
            if left < SHORTEST:
                return
        if not found:
            return
        depth += 1


class Listener(Protocol):
    """What is told of a layer's activations, window by window."""

    def see(self, x: Tensor, hidden: Mapping[int, Tensor]) -> None:
        """x [T, D]: what the experts are given; hidden: what enters down, [its tokens, F] of each expert that
        serves any, in ascending order.
        """


class TextRun:
    """The source model on a text, one layer after the other."""

    def __init__(self, model: OpenedModel, text: CalibrationText, threads: int) -> None:
        self._model, self._threads = model, threads
        self._windows = list(take_windows(model.tokenizer, read_prompts(text.path), text.tokens))
        if not self._windows:
            raise ConfigError(f"{text.path} has no text of {SHORTEST} tokens to calibrate with")
        self.tokens = sum(map(len, self._windows))
        self._loaded: LoadedEngine | None = None
        self._layer = 0  # that comes next

    def to(self, layer: int, listener: Listener, stay: bool = False) -> None:
        """Run on up to and with `layer`, listening to that one; `stay`: it comes next once more."""
        assert layer >= self._layer
        if self._loaded is None:
            self._load()
        while self._layer < layer:
            self._run_layer(None, False)
        self._run_layer(listener, stay)

    def _load(self) -> None:
        self._loaded = _load(self._model, self._threads)
        decoder = _cpu_decoder(self._loaded)
        self._recorder = _Recorder(self._model, self._loaded, self._threads)
        decoder.expert_ffn = self._recorder
        self._x = [decoder.embed(ids) for ids in self._windows]  # [T, D] each: what enters the layer

    def _run_layer(self, listener: Listener | None, stay: bool) -> None:
        assert self._loaded is not None
        self._recorder.listener = listener
        for x in self._x:
            _cpu_decoder(self._loaded).run_layer(self._layer, x.clone() if stay else x)
        self._layer += not stay

    def close(self) -> None:
        if self._loaded is not None:
            self._loaded.cache.close()
            self._loaded = None

    def __enter__(self) -> "TextRun":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _load(model: OpenedModel, threads: int) -> LoadedEngine:
    for ram_budget in RAM_BUDGETS:
        run = RunConfig(ram_budget, context=WINDOW, threads=threads)
        try:
            return load_engine(model, plan_model(model, run), run)
        except BudgetError:
            if ram_budget == RAM_BUDGETS[-1]:
                raise
    raise AssertionError("no budget")


def _cpu_decoder(loaded: LoadedEngine) -> Decoder:
    assert isinstance(loaded.engine.decoder, Decoder)
    return loaded.engine.decoder


class _Recorder(ExpertFFN):
    """Computes experts as ever, and tells the listener what they are given."""

    def __init__(self, model: OpenedModel, loaded: LoadedEngine, threads: int) -> None:
        c = model.config
        activation = ACTIVATIONS[c.hidden_act]
        experts = Experts(c.hidden_size, c.moe_intermediate_size, model.expert_format, activation, False)
        super().__init__(_cpu_decoder(loaded).kernels, experts, c.hidden_size, c.num_experts_per_tok)
        self.listener: Listener | None = None
        self._own = make_context(threads)  # the other one holds the event's activations
        self._format, self._activate = model.expert_format, REFERENCE_ACTIVATIONS[c.hidden_act]
        self._width, self._k = c.moe_intermediate_size, c.num_experts_per_tok

    def begin(self, x: Tensor) -> None:
        self._x = x
        self._hidden: dict[int, Tensor] = {}
        super().begin(x)

    def add(self, routing: Routing, experts: Sequence[tuple[int, Addresses]]) -> None:
        super().add(routing, experts)
        if self.listener is None:
            return
        for expert, addresses in experts:
            x = self._x[torch.from_numpy(routing.rows_of([expert])[1] // self._k)]  # [T, D]
            gate, up = (self._linear(address, x) for address in addresses[:2])
            self._hidden[expert] = self._activate(gate, up)

    def end(self, weights: Tensor, y: Tensor) -> None:
        super().end(weights, y)
        if self.listener is not None:  # sorted: experts come as they are read, and sums are to be the same
            self.listener.see(self._x, dict(sorted(self._hidden.items())))

    def _linear(self, address: int, x: Tensor) -> Tensor:
        """x [T, D] -> [T, F]"""
        y = torch.empty(len(x), self._width)
        matrix = Matrix(address, self._format, self._width, x.shape[1])
        self._own.linear(matrix, 0, x.data_ptr(), len(x), True, y.data_ptr(), self._width)
        return y


class _Squares:
    """Listens for the sums of squares of each column."""

    def __init__(self, model: OpenedModel) -> None:
        c = model.config
        self.inputs = torch.zeros(c.hidden_size)
        self._hidden = torch.zeros(c.num_experts, c.moe_intermediate_size)
        self._counts = torch.zeros(c.num_experts, 1)

    def see(self, x: Tensor, hidden: Mapping[int, Tensor]) -> None:
        self.inputs += x.square().sum(dim=0)
        for expert, h in hidden.items():
            self._hidden[expert] += h.square().sum(dim=0)
            self._counts[expert] += len(h)

    def of_hidden(self) -> Iterator[Tensor]:
        """[F] of each expert: its mean squares, blended with the layer's."""
        mean = self._hidden.sum(dim=0) / self._counts.sum().clamp_min(1)
        for squares, count in zip(self._hidden, self._counts, strict=True):
            yield _floored((squares + PRIOR_TOKENS * mean) / (count + PRIOR_TOKENS))


class _Grams:
    """Listens for the sums of x x^T: of inputs, and of down's for the experts in `numbers`."""

    def __init__(self, model: OpenedModel, layer: int, numbers: range) -> None:
        c = model.config
        self.layer = layer
        self.inputs = Hessian(c.hidden_size)
        self.hidden = {number: Hessian(c.moe_intermediate_size) for number in numbers}
        self._all = Hessian(c.moe_intermediate_size)

    @property
    def mean_hidden(self) -> list[Tensor]:
        """Over all experts of the layer."""
        return self._all.mean()

    def see(self, x: Tensor, hidden: Mapping[int, Tensor]) -> None:
        self.inputs.add(x)
        self._all.add(torch.cat(list(hidden.values())))
        for expert in hidden.keys() & self.hidden.keys():
            self.hidden[expert].add(hidden[expert])


def _floored(mean_squares: Tensor) -> Tensor:
    mean = float(mean_squares.mean())
    return mean_squares + FLOOR * mean if mean > 0 else torch.ones_like(mean_squares)
