"""`--learn`: what is kept of a chat, when a training starts, and that a worse policy is never put to use."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cache_policies.routing_trace import RoutingTrace
from flashmoe import LLM, learning, train_policy
from flashmoe.errors import BudgetError, PolicyError
from flashmoe.npz import write_npz
from flashmoe.policy_file import shipped_policy
from flashmoe.trace import TraceRecorder, load_trace
from storage.storage_errors import StorageError

SLICE = Path(__file__).parent / "data" / "gpt-oss-20b-slice.npz"


@pytest.fixture(autouse=True)
def data_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nobody's own chats."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    return tmp_path / "data"


def store(trace: RoutingTrace, folder: Path, name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {
        "experts": trace.experts, "seq_offsets": trace.seq_offsets, "dataset": np.array(trace.datasets),
        "num_experts": np.array(trace.num_experts, dtype=np.int64),
    }  # fmt: skip
    write_npz(folder / f"{name}-{len(trace)}.npz", arrays)


def test_a_chat_leaves_its_routing_where_only_its_owner_reads_it(tiny_model: Path, data_home: Path) -> None:
    with LLM(tiny_model, ram_budget="8G", context=256, policy="learned", learn=True) as llm:
        stats = llm.generate("hello there", max_tokens=40, temperature=0).stats
        assert llm.expert_cache.policy.name == "learned"
    assert llm.learning is not None
    kept = list(data_home.rglob("*.npz"))
    assert len(kept) == 1
    trace = load_trace(kept[0])
    assert len(trace) == stats.prompt_tokens + stats.decode_tokens - 1, "the last one never ran"
    assert trace.scores is not None and trace.layers == llm.config.num_moe_layers
    assert llm.learning.outcome == f"learn: {len(trace)} of 2000 new tokens for the next training"
    assert llm.learning.folder in kept[0].parents
    assert llm.learning.folder.stat().st_mode & 0o777 == 0o700, "token ids can be turned back into text"


def test_a_chat_of_a_few_tokens_is_not_kept(tiny_model: Path, data_home: Path) -> None:
    with LLM(tiny_model, ram_budget="8G", context=64, learn=True) as llm:
        llm.generate("a", max_tokens=2, temperature=0)
    assert list(data_home.rglob("*.npz")) == []


def test_a_run_records_no_more_than_is_kept(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning, "MOST_TOKENS", 50)
    with LLM(tiny_model, ram_budget="8G", context=256, learn=True) as llm:
        assert llm.learning is not None
        assert len(llm.generate("hello there", max_tokens=80, temperature=0).token_ids) == 80
        assert len(llm.learning.recorder) == 50


def test_a_full_disk_ends_the_recording_and_not_the_answer(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LLM(tiny_model, ram_budget="8G", context=256, learn=True) as llm:
        assert llm.learning is not None

        def full() -> None:
            raise StorageError("cannot record any more: No space left on device")

        monkeypatch.setattr(llm.learning.recorder, "forward_ends", full)
        assert len(llm.generate("hello there", max_tokens=5, temperature=0).token_ids) == 5
    assert llm.learning.outcome.endswith("training; cannot record any more: No space left on device")


def test_a_model_that_does_not_load_leaves_no_recorder_open(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[TraceRecorder] = []
    close = TraceRecorder.close

    def note(recorder: TraceRecorder) -> None:
        closed.append(recorder)
        close(recorder)

    monkeypatch.setattr(TraceRecorder, "close", note)
    with pytest.raises(BudgetError):
        LLM(tiny_model, ram_budget="1M", learn=True)
    assert len(closed) == 1


def test_a_folder_that_cannot_be_written_is_one_line(tiny_model: Path) -> None:
    with pytest.raises(StorageError, match="--learn cannot write to .*: Not a directory|File exists"):  # noqa: SIM117
        with LLM(tiny_model, ram_budget="8G", context=256, learn=True) as llm:
            assert llm.learning is not None
            llm.generate("hello there", max_tokens=40, temperature=0)
            (llm.learning.folder / "traces").write_text("")


def test_a_policy_that_this_version_cannot_use_gives_way_to_the_shipped_one(tmp_path: Path) -> None:
    """Other features after an update would have ended every run with --learn, until the file was deleted."""
    (tmp_path / "policy.txt").write_text(shipped_policy().replace("match_16", "match_15"))
    assert learning.own_policy(tmp_path) is None
    (tmp_path / "policy.txt").write_text(shipped_policy())
    assert learning.own_policy(tmp_path) == tmp_path / "policy.txt"


def test_the_users_own_policy_takes_the_place_of_the_shipped_one(tiny_model: Path, data_home: Path) -> None:
    with LLM(tiny_model, ram_budget="8G", context=64, learn=True) as llm:
        assert llm.learning is not None
        (llm.learning.folder / "policy.txt").write_text(shipped_policy())
        assert llm.learning.policy("learned") == f"learned:{llm.learning.folder / 'policy.txt'}"
        assert llm.learning.policy("lru") == "lru"
    with LLM(tiny_model, ram_budget="8G", context=64, policy="learned", learn=True) as llm:
        assert llm.run_config.policy.endswith("policy.txt")
        assert llm.expert_cache.policy.name == "learned"


def keep_run_of(tokens: int, folder: Path) -> int:
    with TraceRecorder(1, 4, 1) as recorder:
        for _ in range(tokens):
            recorder.forward_begins([7])
            recorder.routed(0, torch.tensor([[1]]), torch.tensor([[1.0]]), torch.full((1, 4), 0.25))
            recorder.forward_ends()
        return learning.keep(recorder, folder)


def test_the_newest_traces_are_kept_and_new_tokens_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learning, "MOST_TOKENS", 100)
    assert keep_run_of(40, tmp_path) == 40
    assert keep_run_of(50, tmp_path) == 90
    assert keep_run_of(45, tmp_path) == 95, "the first one has made room"
    (tmp_path / "report.json").write_text("{}")
    os.utime(tmp_path / "report.json", (2**33, 2**33))
    assert keep_run_of(5, tmp_path) == 0, "all has been trained on, and five are too few to keep"


def test_a_trace_that_another_run_drops_at_the_same_time_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_run_of(40, tmp_path)
    tokens = learning._tokens

    def drop(path: Path) -> int:
        path.unlink()
        return tokens(path)

    monkeypatch.setattr(learning, "_tokens", drop)
    assert keep_run_of(5, tmp_path) == 0


def test_one_training_at_a_time_and_a_forgotten_lock_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(learning.subprocess, "Popen", lambda command, **_: started.append(command))
    assert learning.train_in_background(tmp_path)
    assert not learning.train_in_background(tmp_path)
    assert len(started) == 1 and started[0][-1] == str(tmp_path)
    os.utime(tmp_path / "training", (1, 1))
    assert learning.train_in_background(tmp_path)


def test_a_training_gives_its_lock_back_whatever_happens(tmp_path: Path) -> None:
    (tmp_path / "training").touch()

    def fails(folder: Path) -> None:
        raise PolicyError("no traces")

    before = os.getpriority(os.PRIO_PROCESS, 0)
    if before != 0:
        pytest.skip("this process has not the usual priority")
    pid = os.fork()
    if pid == 0:  # a process lowers its priority for good
        try:
            learning.main(tmp_path, fails)
        except PolicyError:
            os._exit(os.getpriority(os.PRIO_PROCESS, 0))
        os._exit(99)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 19
    assert not (tmp_path / "training").exists()


def test_a_training_keeps_only_what_hits_more_on_what_it_did_not_see(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = load_trace(SLICE)
    store(trace.rows(0, 600), tmp_path / "traces", "1")
    store(trace.rows(600, len(trace)), tmp_path / "traces", "2")
    (tmp_path / "traces" / "3-10.npz").write_bytes(b"half a file")
    monkeypatch.setattr(train_policy, "CAPACITY_SHARES", (0.25,))
    quick = replace(train_policy.TrainOptions(), rounds=0, rows=20_000)
    monkeypatch.setattr(train_policy, "TrainOptions", lambda jobs: replace(quick, jobs=jobs))

    poor = shipped_policy().split("\nTree=1\n")[0] + "\nend of trees\n"
    (tmp_path / "policy.txt").write_text(poor)
    report = learning.improve(tmp_path)
    assert report["tokens"] == len(trace)
    assert report["kept"] is True
    assert (tmp_path / "policy.txt").read_text() != poor
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert not (tmp_path / "traces" / "3-10.npz").exists()

    (tmp_path / "policy.txt").unlink()
    monkeypatch.setattr(train_policy, "train_policy", lambda traces, options: poor)
    report = learning.improve(tmp_path)
    assert report["kept"] is False and not (tmp_path / "policy.txt").exists()


def test_without_traces_there_is_nothing_to_train_on(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="has no traces; chat with --learn first"):
        learning.improve(tmp_path)
