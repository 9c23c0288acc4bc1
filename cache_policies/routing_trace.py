"""A recorded routing trace in memory: what every token chose in every layer. Reading files is not done here.

Axis letters: T tokens, L layers with experts, K experts per token, E experts a layer, S sequences.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Tokens of a prompt that came without the borders of its prefill chunks: as many as an engine takes at once.
PREFILL_CHUNK = 512
SPAN = 1024


@dataclass(frozen=True, slots=True)
class RoutingTrace:
    """Rows are tokens in the order in which they ran; a sequence is a range of rows.

    `experts` [T, L, K] integers, in router order; `weights` [T, L, K] the normalised top-k weights; `scores`
    [T, L, E] the router's probabilities of all experts; `tokens` [T] ids, -1 where not known; `datasets` one
    name a sequence. `forward_offsets` [F + 1]: rows that went through the model in one pass, so a prefill
    chunk or a single decoded token.
    """

    name: str
    num_experts: int
    experts: NDArray[np.integer]
    seq_offsets: NDArray[np.int64]
    forward_offsets: NDArray[np.int64]
    datasets: tuple[str, ...]
    weights: NDArray[np.floating] | None = None
    scores: NDArray[np.floating] | None = None
    tokens: NDArray[np.integer] | None = None

    @property
    def layers(self) -> int:
        return int(self.experts.shape[1])

    @property
    def top_k(self) -> int:
        return int(self.experts.shape[2])

    def __len__(self) -> int:
        return len(self.experts)

    def select(self, sequences: Collection[int]) -> "RoutingTrace":
        """These sequences alone, one behind the other in the order of the trace."""
        chosen = sorted(set(sequences))
        ranges = [(int(self.seq_offsets[i]), int(self.seq_offsets[i + 1])) for i in chosen]
        rows = np.concatenate([np.arange(*r) for r in ranges]) if ranges else np.zeros(0, dtype=np.int64)
        forwards, at = [np.zeros(1, dtype=np.int64)], 0
        for begin, end in ranges:
            inside = self.forward_offsets[(self.forward_offsets > begin) & (self.forward_offsets <= end)]
            forwards.append(inside - begin + at)
            at += end - begin
        lengths = np.array([0, *(end - begin for begin, end in ranges)], dtype=np.int64)
        return RoutingTrace(
            self.name,
            self.num_experts,
            self.experts[rows],
            np.cumsum(lengths),
            np.concatenate(forwards),
            tuple(self.datasets[i] for i in chosen),
            None if self.weights is None else self.weights[rows],
            None if self.scores is None else self.scores[rows],
            None if self.tokens is None else self.tokens[rows],
        )

    def rows(self, begin: int, end: int) -> "RoutingTrace":
        """The tokens from `begin` to `end`; a sequence or chunk that a border cuts is cut."""
        sequences = [
            i
            for i, (first, last) in enumerate(zip(self.seq_offsets[:-1], self.seq_offsets[1:], strict=True))
            if first < end and last > begin
        ]
        inside = self.seq_offsets[(self.seq_offsets > begin) & (self.seq_offsets < end)]
        borders = self.forward_offsets[(self.forward_offsets > begin) & (self.forward_offsets < end)]
        return RoutingTrace(
            self.name,
            self.num_experts,
            self.experts[begin:end],
            np.concatenate([[0], inside - begin, [end - begin]]).astype(np.int64),
            np.concatenate([[0], borders - begin, [end - begin]]).astype(np.int64),
            tuple(self.datasets[i] for i in sequences),
            None if self.weights is None else self.weights[begin:end],
            None if self.scores is None else self.scores[begin:end],
            None if self.tokens is None else self.tokens[begin:end],
        )

    def of_datasets(self, names: Collection[str]) -> "RoutingTrace":
        """The sequences of these data sets."""
        return self.select([i for i, name in enumerate(self.datasets) if name in names])

    def spans(self) -> Iterator[tuple[int, int, bool]]:
        """(first row, end row, whether they ran together): each prefill chunk, and runs of tokens that ran
        one by one, cut to what is good to hold in Python lists."""
        sizes = np.diff(self.forward_offsets)
        row = 0
        for chunk in [*np.flatnonzero(sizes > 1).tolist(), len(sizes)]:
            until = int(self.forward_offsets[chunk])
            yield from ((begin, min(begin + SPAN, until), False) for begin in range(row, until, SPAN))
            if chunk < len(sizes):
                row = int(self.forward_offsets[chunk + 1])
                yield until, row, True

    def step_numbers(self) -> NDArray[np.int64]:
        """[T, L]: how many events a policy saw before this row's; a chunk goes layer by layer."""
        numbers = np.arange(len(self) * self.layers, dtype=np.int64).reshape(len(self), self.layers)
        for begin, end, is_chunk in self.spans():
            if is_chunk:
                numbers[begin:end] = numbers[begin:end].reshape(self.layers, end - begin).T.copy()
        return numbers


def join_traces(parts: Sequence[RoutingTrace], name: str) -> RoutingTrace:
    """One behind the other; all of one model. What one of them lacks, the whole lacks.

    Raises ValueError when their shapes differ.
    """
    shapes = {(part.layers, part.num_experts, part.top_k) for part in parts}
    if len(shapes) != 1:
        raise ValueError(f"traces of {len(shapes)} different models cannot be joined")
    starts = np.cumsum([0, *map(len, parts)])

    def offsets(of: str) -> NDArray[np.int64]:
        moved = [getattr(part, of)[1:] + start for part, start in zip(parts, starts, strict=False)]
        return np.concatenate([np.zeros(1, dtype=np.int64), *moved])

    def joined(of: str) -> Any:
        arrays = [getattr(part, of) for part in parts]
        return None if any(array is None for array in arrays) else np.concatenate(arrays)

    return RoutingTrace(
        name,
        parts[0].num_experts,
        joined("experts"),
        offsets("seq_offsets"),
        offsets("forward_offsets"),
        tuple(dataset for part in parts for dataset in part.datasets),
        joined("weights"),
        joined("scores"),
        joined("tokens"),
    )


def forwards_of(phase: NDArray[np.integer] | None, seq_offsets: NDArray[np.int64]) -> NDArray[np.int64]:
    """Forward offsets of a trace that has none: `phase` [T], 0 prefill and 1 decode; None: all decoded.

    A sequence's prompt runs in chunks of PREFILL_CHUNK, every other token alone.
    """
    total = int(seq_offsets[-1])
    if phase is None:
        return np.arange(total + 1, dtype=np.int64)
    decoded = np.asarray(phase) != 0
    borders = {0, total}
    for begin, end in zip(seq_offsets[:-1].tolist(), seq_offsets[1:].tolist(), strict=True):
        row = begin
        while row < end:
            borders.add(row)
            if decoded[row]:
                row += 1
                continue
            later = np.flatnonzero(decoded[row:end])
            prompt_end = row + int(later[0]) if len(later) else end
            row = min(row + PREFILL_CHUNK, prompt_end)
    return np.array(sorted(borders), dtype=np.int64)
