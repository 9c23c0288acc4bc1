"""From what the user calls a model to a folder: a path, a Hugging Face repo id, or the demo model."""

import json
from collections.abc import Callable
from pathlib import Path

from flashmoe.errors import ConfigError

FILES = ["*.safetensors", "*.json", "*.jinja"]
Progress = Callable[[str, int, int], None]  # (what, done, total)


def find_model(model: str | None, progress: Progress | None = None) -> Path:
    """The folder of a checkpoint. `model`: a folder; `owner/name[@revision]`, taken from the local Hugging
    Face cache or downloaded; None: smolmoe, built on first use. ConfigError says what was tried.
    """
    if model is None:
        from flashmoe.demo_model.in_child import build_in_child

        return build_in_child(progress)
    try:
        folder = Path(model).expanduser()
        is_folder, exists = folder.is_dir(), folder.exists()
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(f"no folder {model[:80]}: {error}") from error
    if is_folder:
        return folder
    if exists:
        raise ConfigError(
            f"{model} is a file; --model takes the folder that holds config.json and the safetensors"
        )
    repo_id, _, revision = model.partition("@")
    if not _is_repo_id(repo_id):
        raise ConfigError(
            f"no folder {model}; --model takes a folder of safetensors or a repo id such as owner/name"
        )
    return _from_hub(repo_id, revision or None)


def _is_repo_id(text: str) -> bool:
    """owner/name, as the Hugging Face Hub allows it."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented, not listed

    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return text.isascii() and text.count("/") == 1


def _from_hub(repo_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        snapshot = snapshot_download(repo_id, revision=revision, allow_patterns=FILES, local_files_only=True)
        if _has_weights(Path(snapshot)):  # else somebody fetched its config or tokenizer only
            return Path(snapshot)
    except LocalEntryNotFoundError:
        pass  # not in the cache: download it, with the library's own progress bars
    except OSError as error:
        raise ConfigError(f"the Hugging Face cache cannot be read: {error}") from error
    try:
        snapshot = snapshot_download(repo_id, revision=revision, allow_patterns=FILES)
    except Exception as error:  # the hub's own, the HTTP client's, the transfer library's: many trees
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"{repo_id} is no local folder, not in the Hugging Face cache, and cannot be downloaded: {reason}"
        ) from error
    if not _has_weights(Path(snapshot)):
        raise ConfigError(f"{repo_id} has no safetensors; only such models can be run")
    return Path(snapshot)


def _has_weights(snapshot: Path) -> bool:
    """Whether all shards are there: the single file, or all that the index names."""
    index = snapshot / "model.safetensors.index.json"
    if not index.is_file():
        return any(snapshot.glob("*.safetensors"))
    try:
        named = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
        return all((snapshot / str(name)).is_file() for name in named)
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return True  # a broken index is for `open_checkpoint` to name
