"""Routing traces as files: load one, ours or another's, and record one from a running engine.

A trace is an .npz. Axis letters: T tokens, L layers with experts, K experts per token, E experts a layer,
S sequences, F forward passes.

    experts          [T, L, K] ids in router order          seq_offsets      [S + 1] rows of each sequence
    weights          [T, L, K] their weights                 forward_offsets  [F + 1] rows that ran together
    scores           [T, L, E] the router's probabilities    dataset          [S] a name each
    token            [T] ids, -1 unknown                     num_experts      E
    phase            [T] 0 prefill, 1 decode                 meta             JSON: what was recorded how

Only `experts` and `seq_offsets` are needed. Without `num_experts`, E is the smallest multiple of 8 above all
ids (models have 8, 32, 48, 60, 64, 128, 160 …: only the 60 of Qwen1.5-MoE come out wrong, as 64). Imports no
torch.
"""

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cache_policies.routing_trace import RoutingTrace, forwards_of
from flashmoe.errors import TraceError
from flashmoe.npz import DEFAULT_LIMIT_BYTES, Array, StreamedArray, read_npz, write_npz
from storage.safetensors_header import quote
from storage.storage_errors import StorageError

if TYPE_CHECKING:
    from torch import Tensor

FORMAT_VERSION = 1
ARRAYS = ("experts", "seq_offsets", "weights", "scores", "token", "phase", "forward_offsets", "dataset",
          "num_experts", "meta")  # fmt: skip
MOST_LAYERS, MOST_EXPERTS, MOST_TOKEN_ID = 1024, 1 << 16, 2**31 - 1
LONGEST_NAME = 200
ROWS_AT_A_TIME = 1 << 14  # when checking and copying, so that a wide trace needs no second one's memory


def load_trace(path: Path, with_scores: bool = True, limit_bytes: int = DEFAULT_LIMIT_BYTES) -> RoutingTrace:
    """Read and check a trace; it is named as its file. Scores stay in the width they are stored in.

    Without `with_scores` they are not read: of all arrays they are by far the largest. Raises TraceError.
    """
    arrays = read_npz(path, [name for name in ARRAYS if with_scores or name != "scores"], limit_bytes)
    check = _Checks(path, arrays)
    check.version()
    experts = check.experts()
    seq_offsets = check.offsets("seq_offsets")
    phase = check.phase()
    if "forward_offsets" in arrays:
        forward_offsets = check.forward_offsets(seq_offsets)
    else:
        forward_offsets = forwards_of(phase, seq_offsets)
    return RoutingTrace(
        path.stem,
        check.num_experts,
        experts,
        seq_offsets,
        forward_offsets,
        check.datasets(),
        check.figures("weights", check.top_k),
        check.figures("scores", check.num_experts),
        check.tokens(),
    )


class _Checks:
    """The arrays of one file; every method gives one that is right, or raises TraceError."""

    def __init__(self, path: Path, arrays: Mapping[str, Array]) -> None:
        self._path, self._arrays = path, arrays
        for name in ("experts", "seq_offsets"):
            if name not in arrays:
                raise TraceError(
                    f"{path} has no array {name}; a trace has experts [tokens, layers, top-k] and"
                    " seq_offsets [sequences + 1]"
                )
        experts = arrays["experts"]
        if experts.dtype.kind not in "iu" or experts.ndim != 3:
            raise self._wrong("experts", "integers of shape [tokens, layers, top-k]")
        self._rows, self._layers, self.top_k = experts.shape
        if not (self._rows and 0 < self._layers <= MOST_LAYERS and 0 < self.top_k <= MOST_EXPERTS):
            raise self._wrong("experts", f"at least one token, 1 to {MOST_LAYERS} layers and an expert")
        self.num_experts = self._declared_experts()

    def version(self) -> None:
        meta = self._arrays.get("meta")
        if meta is None:
            return
        try:
            version = json.loads(str(meta.item()))["format"] if meta.dtype.kind == "U" else None
        except (ValueError, KeyError, TypeError, RecursionError):
            version = None
        if type(version) is not int:
            raise self._wrong("meta", 'one text of JSON, {"format": 1, …}')
        if version > FORMAT_VERSION:
            raise TraceError(
                f"{self._path} has trace format {version}, this flashmoe knows {FORMAT_VERSION}; update it"
            )

    def experts(self) -> NDArray[np.integer]:
        experts: NDArray[np.integer] = self._arrays["experts"]
        for begin in range(0, self._rows, ROWS_AT_A_TIME):
            block = experts[begin : begin + ROWS_AT_A_TIME]
            outside = (block < 0) | (block >= self.num_experts)
            if outside.any():
                row, layer, _ = np.argwhere(outside)[0].tolist()
                raise TraceError(
                    f"{self._path}: row {begin + row}, layer {layer} chose {block[row, layer].tolist()};"
                    f" experts go from 0 to {self.num_experts - 1}"
                )
            ordered = np.sort(block, axis=2)
            twice = (ordered[:, :, 1:] == ordered[:, :, :-1]).any(axis=2)
            if twice.any():
                row, layer = np.argwhere(twice)[0].tolist()
                raise TraceError(
                    f"{self._path}: row {begin + row}, layer {layer} chose an expert twice:"
                    f" {block[row, layer].tolist()}"
                )
        return experts

    def offsets(self, name: str) -> NDArray[np.int64]:
        array = self._arrays[name]
        if array.dtype.kind not in "iu" or array.ndim != 1 or len(array) < 2:
            raise self._wrong(name, "at least two integers in one row")
        offsets = array.astype(np.int64)
        # Compared, not subtracted: differences of 64-bit numbers may come round to positive ones.
        if offsets[0] != 0 or offsets[-1] != self._rows or (offsets[1:] < offsets[:-1]).any():
            raise TraceError(
                f"{self._path}: {name} should rise from 0 to the {self._rows} rows of experts;"
                f" they begin with {offsets[:4].tolist()} and end with {int(offsets[-1])}"
            )
        return offsets

    def forward_offsets(self, seq_offsets: NDArray[np.int64]) -> NDArray[np.int64]:
        """A pass has rows, and all of them of one sequence."""
        offsets = np.unique(self.offsets("forward_offsets"))
        astride = ~np.isin(seq_offsets, offsets)
        if astride.any():
            raise TraceError(
                f"{self._path}: a sequence begins at row {int(seq_offsets[astride][0])}, where"
                " forward_offsets has no border"
            )
        return offsets

    def phase(self) -> NDArray[np.integer] | None:
        phase = self._by_row("phase", "iu")
        if phase is not None and not np.isin(phase, (0, 1)).all():
            raise self._wrong("phase", "0 for prefill and 1 for decode")
        return phase

    def tokens(self) -> NDArray[np.integer] | None:
        tokens = self._by_row("token", "iu")
        if tokens is not None and (int(tokens.min()) < -1 or int(tokens.max()) > MOST_TOKEN_ID):
            raise self._wrong("token", f"ids from 0 to {MOST_TOKEN_ID}, or -1")
        return tokens

    def figures(self, name: str, width: int) -> NDArray[np.floating] | None:
        """Weights and scores: finite, and in the shape of `experts`."""
        array = self._arrays.get(name)
        if array is None:
            return None
        if array.dtype.kind != "f" or array.shape != (self._rows, self._layers, width):
            raise self._wrong(name, f"floats of shape {[self._rows, self._layers, width]}")
        for begin in range(0, self._rows, ROWS_AT_A_TIME):
            finite = np.isfinite(array[begin : begin + ROWS_AT_A_TIME])
            if not finite.all():
                row, layer, _ = np.argwhere(~finite)[0].tolist()
                raise TraceError(
                    f"{self._path}: row {begin + row}, layer {layer} has {name} that are no finite numbers"
                )
        return array

    def datasets(self) -> tuple[str, ...]:
        """One name a sequence; the file's own where there are none."""
        sequences = len(self._arrays["seq_offsets"]) - 1
        names = self._arrays.get("dataset")
        if names is None:
            return (self._path.stem,) * sequences
        if names.dtype.kind != "U" or names.shape != (sequences,):
            raise self._wrong("dataset", f"{sequences} names, one a sequence")
        return tuple(map(str, names.tolist()))

    def _declared_experts(self) -> int:
        declared, experts = self._arrays.get("num_experts"), self._arrays["experts"]
        if declared is None:
            return min(MOST_EXPERTS, -(-(max(0, int(experts.max())) + 1) // 8) * 8)
        if declared.dtype.kind not in "iu" or declared.size != 1:
            raise self._wrong("num_experts", "one integer")
        if not self.top_k <= int(declared.item()) <= MOST_EXPERTS:
            raise self._wrong("num_experts", f"from top-k {self.top_k} to {MOST_EXPERTS}")
        return int(declared.item())

    def _by_row(self, name: str, kinds: str) -> NDArray[np.integer] | None:
        array = self._arrays.get(name)
        if array is not None and (array.dtype.kind not in kinds or array.shape != (self._rows,)):
            raise self._wrong(name, f"{self._rows} integers, one a row of experts")
        return array

    def _wrong(self, name: str, expected: str) -> TraceError:
        array = self._arrays[name]
        shown = f" ({quote(str(array.item()))})" if array.size == 1 else ""
        return TraceError(
            f"{self._path}: {name} should be {expected}; it is {array.dtype.str} {list(array.shape)}{shown}"
        )


class TraceRecorder:
    """A `RoutingObserver` that keeps what it sees, in files without a name until `save`: with all scores a
    trace grows by some kB a token, which a RAM budget has no place for.

    Tokens of a forward pass that an error cut short are not kept. Raises StorageError when the disk is full.
    """

    def __init__(
        self,
        layers: int,
        num_experts: int,
        top_k: int,
        meta: Mapping[str, Any] | None = None,
        spool_folder: Path | None = None,
    ) -> None:
        """`layers`: those with experts. `meta`: facts for the reader of the file, JSON."""
        self.layers, self.num_experts, self.top_k = layers, num_experts, top_k
        self.meta = {"format": FORMAT_VERSION, **(meta or {})}
        id_dtype = np.uint8 if num_experts <= 256 else np.uint16
        try:
            self._spools = [
                _Spool(np.dtype(id_dtype), (layers, top_k), spool_folder),
                _Spool(np.dtype(np.float16), (layers, top_k), spool_folder),
                _Spool(np.dtype(np.float16), (layers, num_experts), spool_folder),
            ]
        except OSError as error:
            raise StorageError(
                f"cannot record in {error.filename or spool_folder}: {error.strerror}"
            ) from error
        self._one_token = [spool.buffer(1) for spool in self._spools]
        self._buffers = self._one_token
        self._pass_tokens: Sequence[int] = ()
        self._ordinal = 0
        self._tokens: list[int] = []
        self._forward_offsets = [0]
        self._starts: list[tuple[int, str]] = []

    def __len__(self) -> int:
        """Tokens so far."""
        return len(self._tokens)

    @property
    def sequences(self) -> int:
        """Those that have a token."""
        return sum(start < len(self) for start, _ in self._starts)

    def begin_sequence(self, dataset: str) -> None:
        """What comes now has nothing to do with what came before."""
        if self._starts and self._starts[-1][0] == len(self):
            self._starts.pop()
        self._starts.append((len(self), dataset[:LONGEST_NAME]))

    def forward_begins(self, token_ids: Sequence[int]) -> None:
        self._pass_tokens, self._ordinal = token_ids, 0
        alone = len(token_ids) == 1
        self._buffers = self._one_token if alone else [s.buffer(len(token_ids)) for s in self._spools]

    def routed(self, layer: int, ids: "Tensor", weights: "Tensor", probabilities: "Tensor") -> None:
        """Layers come in order; one without experts does not come, and has no number in the trace."""
        for buffer, values in zip(self._buffers, (ids, weights, probabilities), strict=True):
            buffer[:, self._ordinal] = values.numpy()
        self._ordinal += 1

    def forward_ends(self) -> None:
        assert self._ordinal == self.layers, "a layer with experts did not come"
        if not self._starts:
            self.begin_sequence("")
        try:
            for spool, buffer in zip(self._spools, self._buffers, strict=True):
                spool.append(buffer, len(self))
        except OSError as error:
            raise StorageError(f"cannot record any more: {error.strerror}") from error
        self._forward_offsets.append(len(self) + len(self._pass_tokens))
        self._tokens += self._pass_tokens  # last: from now on they count

    def save(self, path: Path) -> None:
        """Write all so far. TraceError when that is nothing, StorageError when it cannot be written."""
        if not len(self):
            raise TraceError(f"{path}: no token ran, so there is no trace to write")
        experts, weights, scores = (spool.streamed(len(self)) for spool in self._spools)
        write_npz(path, {"experts": experts, "weights": weights, "scores": scores, **self._small_arrays()})

    def trace(self, name: str) -> RoutingTrace:
        """All so far, in memory."""
        small = self._small_arrays()
        experts, weights, scores = (spool.whole(len(self)) for spool in self._spools)
        return RoutingTrace(
            name, self.num_experts, experts, small["seq_offsets"], small["forward_offsets"],
            tuple(small["dataset"].tolist()), weights, scores, small["token"],
        )  # fmt: skip

    def close(self) -> None:
        """Give the disk space back."""
        for spool in self._spools:
            spool.close()

    def __enter__(self) -> "TraceRecorder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _small_arrays(self) -> dict[str, Array]:
        starts = [start for start in self._starts if start[0] < len(self)]
        offsets = [row for row in self._forward_offsets if row <= len(self)]
        sizes = np.diff(offsets)
        return {
            "token": np.array(self._tokens, dtype=np.int32),
            "phase": np.repeat((sizes == 1).astype(np.uint8), sizes),
            "seq_offsets": np.array([row for row, _ in starts] + [len(self)], dtype=np.int64),
            "forward_offsets": np.array(offsets, dtype=np.int64),
            "dataset": np.array([name for _, name in starts], dtype=f"<U{LONGEST_NAME}"),
            "num_experts": np.array(self.num_experts, dtype=np.int64),
            "meta": np.array(json.dumps(self.meta)),
        }


class _Spool:
    """Rows of one array, in a file that goes when it is closed."""

    def __init__(self, dtype: np.dtype[Any], row_shape: tuple[int, ...], folder: Path | None) -> None:
        self._dtype, self._row_shape = dtype, row_shape
        self._row_bytes = dtype.itemsize * int(np.prod(row_shape))
        self._file: IO[bytes] = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed by `close`

    def buffer(self, rows: int) -> Array:
        return np.empty((rows, *self._row_shape), self._dtype)

    def append(self, rows: Array, at: int) -> None:
        """Behind the first `at` rows: what an interrupted call has left there is written over."""
        if self._file.tell() != at * self._row_bytes:
            self._file.seek(at * self._row_bytes)
        self._file.write(rows.data)

    def streamed(self, rows: int) -> StreamedArray:
        return StreamedArray(self._dtype, (rows, *self._row_shape), self._pieces(rows))

    def whole(self, rows: int) -> Array:
        array = self.buffer(rows)
        at = 0
        for piece in self._pieces(rows):
            count = len(piece) // self._row_bytes
            array[at : at + count] = np.frombuffer(piece, self._dtype).reshape(count, *self._row_shape)
            at += count
        return array

    def close(self) -> None:
        self._file.close()

    def _pieces(self, rows: int) -> Iterator[bytes]:
        per_piece = max(1, (1 << 20) // self._row_bytes)
        self._file.seek(0)
        for begin in range(0, rows, per_piece):
            yield self._file.read(min(per_piece, rows - begin) * self._row_bytes)
