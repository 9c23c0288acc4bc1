"""From what the user calls a model to a folder: paths, the local Hugging Face cache, and what is refused.

The cache is laid out as huggingface_hub does it (refs, snapshots, blobs behind symlinks) and read offline.
The library reads its settings from the environment when it is imported, so a fresh process asks each cache.
"""

import fnmatch
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from flashmoe.errors import ConfigError
from flashmoe.model_source import find_model

ROOT = Path(__file__).resolve().parent.parent
ASK = """
import json, sys
from flashmoe.errors import ConfigError
from flashmoe.model_source import find_model
for model in sys.argv[1:]:
    try:
        print(json.dumps(["found", str(find_model(model))]))
    except ConfigError as error:
        print(json.dumps(["refused", str(error)]))
"""
OLD, NEW = "0" * 39 + "1", "0" * 39 + "2"


def add_snapshot(home: Path, repo_id: str, commit: str, refs: tuple[str, ...] = ()) -> Path:
    """One revision of a repo as huggingface_hub leaves it after a download."""
    repo = home / "hub" / f"models--{repo_id.replace('/', '--')}"
    snapshot = repo / "snapshots" / commit
    for folder in (snapshot, repo / "blobs", repo / "refs"):
        folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        blob = repo / "blobs" / f"{commit[-4:]}-{name}"
        blob.write_text(f"{name} of {commit}")
        (snapshot / name).symlink_to(os.path.relpath(blob, snapshot))
    for ref in refs:
        (repo / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
        (repo / "refs" / ref).write_text(commit)
    return snapshot


def ask(home: Path, *models: str) -> list[tuple[str, str]]:
    """What `find_model` says to each, offline, in the cache `home`: ("found", folder) or ("refused", why)."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGINGFACE_", "TRANSFORMERS_"))}
    done = subprocess.run(
        [sys.executable, "-c", ASK, *models],
        cwd=ROOT, env=kept | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [(kind, text) for kind, text in map(json.loads, done.stdout.splitlines())]


# Paths


def test_a_folder_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "my models" / "tiny"
    folder.mkdir(parents=True)
    assert find_model(str(folder)) == folder
    monkeypatch.chdir(tmp_path)
    assert find_model("my models/tiny") == Path("my models/tiny")
    assert find_model(".") == Path(".")


def test_a_tilde_is_the_users_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny").mkdir()
    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(tmp_path))
    assert find_model("~/tiny") == tmp_path / "tiny"


def test_a_folder_wins_over_a_repo_of_the_same_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert find_model("owner/name") == Path("owner/name")


def test_a_file_is_refused_with_what_is_wanted_instead(tmp_path: Path) -> None:
    shard = tmp_path / "model.safetensors"
    shard.write_bytes(b"")
    with pytest.raises(ConfigError) as caught:
        find_model(str(shard))
    assert f"{shard} is a file; --model takes the folder that holds config.json" in str(caught.value)


@pytest.mark.parametrize(
    "nonsense",
    ["mixtral", "/no/such/folder", "./no/such", "../owner/name", "a b/c", "owner/", "/name", "a/b/c", "a\0b",
     "https://host/owner/name", "x" * 5000, "~nosuchuser/model", "a/b..c", "a/b--c", "a/b.git", "a/b\u00e9",
     "a/" + "b" * 200, "-owner/name", "owner/.name", "C:\\models\\x"],
    ids=lambda text: ascii(text[:20]),
)  # fmt: skip
def test_what_is_neither_folder_nor_repo_id_is_refused_without_asking_anyone(nonsense: str) -> None:
    with pytest.raises(ConfigError) as caught:
        find_model(nonsense)
    assert "no folder" in str(caught.value) and "\n" not in str(caught.value)


# The Hugging Face cache


def test_a_repo_in_the_cache_is_found_offline(tmp_path: Path) -> None:
    snapshot = add_snapshot(tmp_path, "owner/name-7B.v0.1", OLD, refs=("main",))
    ((kind, found),) = ask(tmp_path, "owner/name-7B.v0.1")
    assert (kind, Path(found)) == ("found", snapshot)
    assert (snapshot / "config.json").read_text() == f"config.json of {OLD}"


def test_a_revision_is_a_branch_a_tag_or_a_commit(tmp_path: Path) -> None:
    old = add_snapshot(tmp_path, "owner/name", OLD, refs=("v0.1", "refs/pr/3"))
    new = add_snapshot(tmp_path, "owner/name", NEW, refs=("main",))
    models = ["owner/name", "owner/name@main", "owner/name@v0.1", "owner/name@refs/pr/3", f"owner/name@{OLD}"]
    found = [Path(text) for kind, text in ask(tmp_path, *models) if kind == "found"]
    assert found == [new, new, old, old, old]


def test_what_the_cache_lacks_is_one_line_that_names_it(tmp_path: Path) -> None:
    add_snapshot(tmp_path, "owner/name", OLD, refs=("main",))
    answers = ask(tmp_path, "owner/other", "owner/name@v9", f"owner/name@{NEW}", "other/name")
    for (kind, text), repo in zip(
        answers, ("owner/other", "owner/name", "owner/name", "other/name"), strict=True
    ):
        assert kind == "refused" and "\n" not in text
        assert f"{repo} is no local folder, not in the Hugging Face cache, and cannot be downloaded: " in text


def test_an_empty_cache_is_one_clear_line_too(tmp_path: Path) -> None:
    ((kind, text),) = ask(tmp_path / "nothing here", "owner/name")
    assert kind == "refused" and "not in the Hugging Face cache" in text and "\n" not in text


# The hub, played by a function


def test_what_the_cache_lacks_is_downloaded_but_not_the_pickled_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    def hub(repo_id: str, **options: Any) -> str:
        asked.append(options | {"repo_id": repo_id})
        if options.get("local_files_only"):
            raise LocalEntryNotFoundError("not here")
        (tmp_path / "model.safetensors").touch()
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", hub)
    assert find_model("owner/name@v2") == tmp_path
    assert [(a["repo_id"], a["revision"]) for a in asked] == [("owner/name", "v2")] * 2
    wanted = ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "chat_template.jinja"]
    unwanted = ["pytorch_model.bin", "model.gguf", "README.md", "consolidated.pth"]
    for options in asked:
        for name in wanted + unwanted:
            allowed = any(fnmatch.fnmatch(name, pattern) for pattern in options["allow_patterns"])
            assert allowed == (name in wanted), name


def test_a_failed_download_is_one_line_with_the_hubs_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def hub(repo_id: str, **options: Any) -> str:
        raise LocalEntryNotFoundError(
            "Got: ConnectError: no route to host\nAn error happened while trying to …"
        )

    monkeypatch.setattr("huggingface_hub.snapshot_download", hub)
    with pytest.raises(ConfigError) as caught:
        find_model("owner/name")
    assert str(caught.value).endswith("cannot be downloaded: Got: ConnectError: no route to host")


def test_a_snapshot_that_lacks_a_shard_is_not_taken_for_the_model(tmp_path: Path) -> None:
    snapshot = add_snapshot(tmp_path, "owner/name", OLD, refs=("main",))
    (snapshot / "model.safetensors").rename(snapshot / "model-00001-of-00002.safetensors")
    shards = {part: f"model-0000{part}-of-00002.safetensors" for part in "12"}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    ((kind, _),) = ask(tmp_path, "owner/name")
    assert kind == "refused"


def test_a_failed_download_without_a_reason_is_refused_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def hub(repo_id: str, **options: Any) -> str:
        from huggingface_hub.errors import LocalEntryNotFoundError

        raise LocalEntryNotFoundError("not here") if options.get("local_files_only") else OSError()

    monkeypatch.setattr("huggingface_hub.snapshot_download", hub)
    with pytest.raises(ConfigError, match="cannot be downloaded"):
        find_model("owner/name")
