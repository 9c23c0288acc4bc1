"""What the experts' inputs look like on a text: so that quantising spends its precision where it is used.

The source model runs over the text; recorded are the mean squares of what enters gate and up, by layer, and
of what enters down, by expert. The squared error of a column then counts as much as its mean square, as with
llama.cpp's imatrix. Axis letters: T tokens, D hidden, F expert width.
"""

import ctypes
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from flashmoe.bench_text import read_prompts
from flashmoe.config import RunConfig
from flashmoe.errors import BudgetError, ConfigError
from flashmoe.loader import LoadedEngine, OpenedModel, load_engine, plan_model
from flashmoe.model_source import Progress
from flashmoe.tokenizer import Tokenizer
from flashmoe.weights import ExpertId
from kernels.expert_ffn import Addresses, ExpertFFN, Routing
from kernels.native import ACTIVATIONS, Context, Experts, Format, Matrix, make_context

WINDOW = 512
SHORTEST = 32  # tokens of a text worth running
DEFAULT_TOKENS = 16384
RAM_BUDGET = "2GB"  # for the model that runs, where that is enough
PRIOR_TOKENS = 16  # an expert that saw few tokens is taken to be like its layer's mean
FLOOR = 1e-3  # of the mean: no column is worth nothing
_GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_pytorch_tanh": partial(torch.nn.functional.gelu, approximate="tanh"),
    "relu": torch.nn.functional.relu,
}


@dataclass(frozen=True, slots=True)
class CalibrationText:
    """A text to run, and how much of it."""

    path: Path
    tokens: int = DEFAULT_TOKENS

    def describe(self) -> str:
        """Changes with the text and the number of tokens. Raises ConfigError if it cannot be read."""
        try:
            digest = hashlib.sha256(self.path.read_bytes()).hexdigest()[:16]
        except OSError as error:
            raise ConfigError(f"cannot read {self.path}: {error.strerror}") from error
        return f"{digest}, {self.tokens} tokens"


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
    windows = list(take_windows(model.tokenizer, read_prompts(text.path), text.tokens))
    if not windows:
        raise ConfigError(f"{text.path} has no text of {SHORTEST} tokens to calibrate with")
    loaded = _load(model, threads)
    recorder = _Recorder(model, loaded, threads)
    loaded.engine.decoder._ffn = recorder  # it stands where the experts' inputs pass
    done, total = 0, sum(map(len, windows))
    try:
        for ids in windows:
            loaded.engine.reset()
            loaded.engine.prefill(ids)
            done += len(ids)
            if progress is not None:
                progress("calibrating (tokens)", done, total)
    finally:
        loaded.cache.close()
    return recorder.result(total)


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


def _load(model: OpenedModel, threads: int) -> LoadedEngine:
    def load(ram_budget: str) -> LoadedEngine:
        run = RunConfig(ram_budget, context=WINDOW, threads=threads)
        return load_engine(model, plan_model(model, run), run)

    try:
        return load(RAM_BUDGET)
    except BudgetError:
        return load("auto")  # its dense weights alone need more


class _Recorder(ExpertFFN):
    """Computes experts as ever, and adds up the squares of what they are given. MoE layers come in turn."""

    def __init__(self, model: OpenedModel, loaded: LoadedEngine, threads: int) -> None:
        c = model.config
        experts = Experts(
            c.hidden_size,
            c.moe_intermediate_size,
            model.expert_format,
            ACTIVATIONS[c.hidden_act],
            False,
        )
        super().__init__(loaded.engine.decoder.kernels, experts, c.hidden_size, c.num_experts_per_tok)
        self._layers = [layer for layer, is_moe in enumerate(c.moe_layers) if is_moe]
        self._events = 0
        self._own: Context = make_context(threads)  # the other one holds the event's activations
        self._format: Format = model.expert_format
        self._width, self._gate, self._k = (
            c.moe_intermediate_size,
            _GATES[c.hidden_act],
            c.num_experts_per_tok,
        )
        self._input_squares = {layer: torch.zeros(c.hidden_size) for layer in self._layers}
        self._hidden_squares = {key: torch.zeros(self._width) for key in model.layout.experts}
        self._counts = dict.fromkeys(model.layout.experts, 0)

    def begin(self, x: Tensor) -> None:
        self._layer = self._layers[self._events % len(self._layers)]
        self._events += 1
        self._x = x
        self._input_squares[self._layer] += x.square().sum(dim=0)
        super().begin(x)

    def add(self, routing: Routing, expert: int, addresses: Addresses) -> None:
        super().add(routing, expert, addresses)
        begin, end = (ctypes.c_int32 * 2).from_address(routing.row_begin(expert))
        rows = (ctypes.c_int32 * (end - begin)).from_address(routing.rows + 4 * begin)
        x = self._x[[row // self._k for row in rows]]  # [T, D]
        gate, up = (self._linear(address, x) for address in addresses[:2])
        self._hidden_squares[self._layer, expert] += (self._gate(gate) * up).square().sum(dim=0)
        self._counts[self._layer, expert] += len(rows)

    def _linear(self, address: int, x: Tensor) -> Tensor:
        """x [T, D] -> [T, F]"""
        y = torch.empty(len(x), self._width)
        matrix = Matrix(address, self._format, self._width, x.shape[1])
        self._own.linear(matrix, 0, x.data_ptr(), len(x), True, y.data_ptr(), self._width)
        return y

    def result(self, tokens: int) -> Calibration:
        hidden: dict[ExpertId, Tensor] = {}
        for layer in self._layers:
            keys = [key for key in self._counts if key[0] == layer]
            seen = sum(self._counts[key] for key in keys)
            mean = sum((self._hidden_squares[key] for key in keys), torch.zeros(self._width)) / max(1, seen)
            for key in keys:
                squares = self._hidden_squares[key] + PRIOR_TOKENS * mean
                hidden[key] = _floored(squares / (self._counts[key] + PRIOR_TOKENS))
        inputs = {layer: _floored(squares / tokens) for layer, squares in self._input_squares.items()}
        return Calibration(inputs, hidden, tokens)


def _floored(mean_squares: Tensor) -> Tensor:
    mean = float(mean_squares.mean())
    return mean_squares + FLOOR * mean if mean > 0 else torch.ones_like(mean_squares)
