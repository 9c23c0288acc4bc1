"""`--learn`: a policy of the user's own, trained in the background on the routing of their own chats.

A run records its routing; when it ends, the trace goes into a folder of this model's and, once enough is new,
a process of low priority trains there. The next run begins with what it found. Nothing leaves the machine;
but a trace holds token ids beside expert ids and scores, and they can be turned back into what was said: the
folder is its owner's alone. Folders may be deleted at any time.

    python -m flashmoe.learning FOLDER    trains there now
"""

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from cache_policies.routing_trace import RoutingTrace, join_traces
from flashmoe.errors import PolicyError, TraceError
from storage.safetensors_writer import write_whole
from storage.storage_errors import StorageError

if TYPE_CHECKING:
    from torch import Tensor

    from flashmoe.config import ModelConfig
    from flashmoe.trace import TraceRecorder

# Of the newest tokens so many are kept, and of one run no more are recorded; of new ones so many are worth a
# training.
MOST_TOKENS, NEW_TOKENS = 40_000, 2_000
MOST_SCORE_BYTES = 256 << 20  # of the traces that a training holds; joined they are there twice
LEAST_RECORDED = 32  # tokens of a run that are worth a file
POLICY_NAME, REPORT_NAME, LOCK_NAME, TRACES_NAME = "policy.txt", "report.json", "training", "traces"
STALE_LOCK_S = 4 * 3600.0


class Learning:
    """One run's part in it: records, and when the run is over stores the trace and starts a training.

    A `RoutingObserver` that never ends an answer: a full disk ends the recording.
    """

    def __init__(self, recorder: "TraceRecorder", folder: Path) -> None:
        self.recorder, self.folder = recorder, folder
        self.outcome = ""  # for people, once it has ended
        self._records = False  # the pass that goes on
        self._failure = ""

    @classmethod
    def begin(cls, config: "ModelConfig", model: Path) -> "Learning":
        """For the model in this folder. StorageError when nothing can be written."""
        from flashmoe.trace import TraceRecorder

        folder = learning_folder(config, model)
        with _writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            folder.chmod(0o700)
        meta = {"model_type": config.model_type, "recorded_by": "flashmoe run --learn"}
        shape = config.num_moe_layers, config.num_experts, config.num_experts_per_tok
        return cls(TraceRecorder(*shape, meta, folder), folder)

    def policy(self, asked_for: str) -> str:
        """The user's own policy instead of the shipped one, if there is one."""
        own = own_policy(self.folder)
        return asked_for if own is None or asked_for != "learned" else f"learned:{own}"

    def forward_begins(self, token_ids: Sequence[int]) -> None:
        self._records = not self._failure and len(self.recorder) + len(token_ids) <= MOST_TOKENS
        if self._records:
            self.recorder.forward_begins(token_ids)

    def routed(self, layer: int, ids: "Tensor", weights: "Tensor", probabilities: "Tensor") -> None:
        if self._records:
            self.recorder.routed(layer, ids, weights, probabilities)

    def forward_ends(self) -> None:
        if self._records:
            try:
                self.recorder.forward_ends()
            except StorageError as error:
                self._failure = f"; {error}"

    def end(self) -> None:
        """Safe to call once. StorageError when the trace cannot be stored."""
        with self.recorder, _writing(self.folder):
            new = keep(self.recorder, self.folder)
            trains = new >= NEW_TOKENS and train_in_background(self.folder)
        if trains:
            self.outcome = f"learn: {new} new tokens, training a policy of your own in the background"
        else:
            self.outcome = f"learn: {new} of {NEW_TOKENS} new tokens for the next training"
        self.outcome += self._failure


def learning_folder(config: "ModelConfig", model: Path) -> Path:
    """Where a model's traces and policy live. Models of one name and shape share them."""
    from platformdirs import user_data_path

    shape = (config.model_type, config.num_moe_layers, config.num_experts, config.num_experts_per_tok)
    digest = hashlib.sha256(repr((model.resolve().name, shape)).encode()).hexdigest()[:12]
    return user_data_path("flashmoe", appauthor=False) / "learned" / digest


def own_policy(folder: Path) -> Path | None:
    """The policy trained there, if there is one that this version can use: an older one's features may
    differ."""
    from flashmoe.policy_file import read_policy

    path = folder / POLICY_NAME
    try:
        read_policy(path)
    except PolicyError:
        return None
    return path


def keep(recorder: "TraceRecorder", folder: Path) -> int:
    """Store what a run recorded, drop the oldest beyond MOST_TOKENS; returns the tokens not trained on yet.

    Raises StorageError when it cannot be written.
    """
    traces = folder / TRACES_NAME
    if len(recorder) >= LEAST_RECORDED:
        traces.mkdir(parents=True, exist_ok=True)
        recorder.save(traces / f"{time.time_ns()}-{len(recorder)}.npz")
    kept = new = 0
    trained_s = (folder / REPORT_NAME).stat().st_mtime if (folder / REPORT_NAME).is_file() else 0.0
    for path in sorted(traces.glob("*.npz"), reverse=True):
        tokens = _tokens(path)
        try:
            is_new = path.stat().st_mtime > trained_s
        except FileNotFoundError:  # a run that ends at the same time has dropped it
            continue
        if kept and kept + tokens > MOST_TOKENS:
            path.unlink(missing_ok=True)
            continue
        kept += tokens
        new += tokens if is_new else 0
    return new


def train_in_background(folder: Path) -> bool:
    """Start a training unless one runs already; it outlives this process and yields to everything else."""
    lock = folder / LOCK_NAME
    try:
        if time.time() - lock.stat().st_mtime > STALE_LOCK_S:
            lock.unlink()
    except OSError:
        pass  # no training runs
    try:
        os.close(os.open(lock, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    # -P: modules of the folder that the user happens to be in are none of ours.
    subprocess.Popen(
        [sys.executable, "-P", "-m", "flashmoe.learning", str(folder)],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    return True


def improve(folder: Path, jobs: int = 1) -> dict[str, object]:
    """Train on the folder's traces; keep the result only if it hits more than what is in use now, on the last
    fifth of them, which it did not see. Returns, and leaves in the folder, a report."""
    from flashmoe.policy_file import shipped_policy
    from flashmoe.trace import load_trace
    from flashmoe.train_policy import TrainOptions, mean_hit_rate, train_policy, write_policy

    parts: list[RoutingTrace] = []
    for path in sorted((folder / TRACES_NAME).glob("*.npz")):
        try:
            parts.append(load_trace(path))
        except TraceError:
            path.unlink(missing_ok=True)  # half written, or somebody else's: it would fail every time
    if not parts:
        raise PolicyError(f"{folder} has no traces; chat with --learn first")
    while len(parts) > 1 and sum(_score_bytes(part) for part in parts) > MOST_SCORE_BYTES:
        parts.pop(0)  # the oldest; a training must not take the memory of the chat that goes on beside it
    trace = join_traces(parts, "own chats")
    cut = max(1, round(0.8 * len(trace)))
    unseen = trace.rows(cut, len(trace))
    own = own_policy(folder)
    current = shipped_policy() if own is None else own.read_text("ascii")
    options = TrainOptions(jobs=jobs)
    candidate = train_policy([trace.rows(0, cut)], options)
    rates = [mean_hit_rate(text, unseen, jobs) for text in (current, candidate)]
    better = rates[1] > rates[0]
    if better:
        write_policy(folder / POLICY_NAME, train_policy([trace], options))
    report: dict[str, object] = {
        "tokens": len(trace), "hit_rate_before": rates[0], "hit_rate_trained": rates[1], "kept": better,
    }  # fmt: skip
    write_whole(folder / REPORT_NAME, f"{json.dumps(report)}\n".encode())
    return report


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(f"--learn cannot write to {folder}: {error.strerror}") from error


def _score_bytes(trace: RoutingTrace) -> int:
    return 0 if trace.scores is None else trace.scores.nbytes


def _tokens(path: Path) -> int:
    count = path.stem.rpartition("-")[2]
    return int(count) if count.isdigit() else 0


def main(folder: Path, train: Callable[[Path], object] = improve) -> None:
    """One training at the lowest priority; the lock goes whatever happens."""
    import psutil

    try:
        # Windows has classes, others a number.
        psutil.Process().nice(getattr(psutil, "IDLE_PRIORITY_CLASS", 19))
        train(folder)
    finally:
        (folder / LOCK_NAME).unlink(missing_ok=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
