"""From what the user calls a model to a folder: a path, a Hugging Face repo id, or nothing (the demo
model)."""

import re
from collections.abc import Callable
from pathlib import Path

from flashmoe.errors import ConfigError

FILES = ["*.safetensors", "*.json", "*.jinja"]
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")

Progress = Callable[[str, int, int], None]  # (what, done, total)


def find_model(model: str | None, progress: Progress | None = None) -> Path:
    """The folder of a checkpoint. `model`: a folder; `owner/name[@revision]`, taken from the local Hugging
    Face cache or downloaded; None: smolmoe, built on first use. ConfigError says what was tried.
    """
    if model is None:
        from flashmoe.demo_model.in_child import build_in_child

        return build_in_child(progress)
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ConfigError(
            f"{model} is a file; --model takes the folder that holds config.json and the safetensors"
        )
    if not _REPO_ID.fullmatch(model):
        raise ConfigError(
            f"no folder {model}; --model takes a folder of safetensors or a repo id such as owner/name"
        )
    return _from_hub(*model.partition("@")[::2])


def _from_hub(repo_id: str, revision: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    chosen = revision or None
    try:
        return Path(snapshot_download(repo_id, revision=chosen, allow_patterns=FILES, local_files_only=True))
    except LocalEntryNotFoundError:
        pass  # not in the cache: download it, with the library's own progress bars
    try:
        return Path(snapshot_download(repo_id, revision=chosen, allow_patterns=FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"{repo_id} is no local folder, not in the Hugging Face cache, and cannot be downloaded: {reason}"
        ) from error
