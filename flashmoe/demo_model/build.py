"""Build smolmoe into a folder: check the inputs, write weights, then small files, then give it its name.

`flashmoe.demo_model.build_demo_model` is the way in.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

from flashmoe.demo_model import MODEL_NAME, MODEL_VERSION, Progress
from flashmoe.demo_model import delta as delta_file
from flashmoe.demo_model.delta import Delta
from flashmoe.demo_model.gguf_base import BaseModel, check_sha256, find_base
from flashmoe.demo_model.hf_files import model_config, small_files
from flashmoe.demo_model.new_folder import new_folder, write_synced
from flashmoe.demo_model.weights import SmolmoeWeights, expert_of, mixtral_specs
from flashmoe.errors import DemoModelError
from storage.safetensors_writer import TensorSpec, write_sharded
from storage.storage_errors import StorageError

DELTA = Path(__file__).with_name(delta_file.FILE_NAME)
DELTA_SHA256 = "9ef7efdd0c2edd733f7d8581d4942c6d22605936122ecef7842ee1d959213257"
MANIFEST = "smolmoe.json"  # which build this is, and the size of every file: says that a folder is complete
SHARD_BYTES = 256 * 2**20


def build(folder: Path, progress: Progress | None = None) -> Path:
    """Build smolmoe at `folder` unless it is there; return the folder. Raises DemoModelError."""
    if is_complete(folder):
        return folder
    try:
        _refuse_other_content(folder)
        base_path = find_base()
        check_sha256(DELTA, DELTA_SHA256, "reinstall flashmoe")
        if progress is not None:  # gguf takes seconds over the vocabulary
            progress("reading the base model", 0, base_path.stat().st_size)
        base, delta = BaseModel(base_path), Delta(DELTA)
        with new_folder(folder) as temporary:
            write_model(temporary, base, delta, progress)
    except FileExistsError:
        if not is_complete(folder):  # else another process built it in the meantime
            raise DemoModelError(f"{folder} was filled by something else while smolmoe was built") from None
    except (OSError, StorageError) as error:
        raise DemoModelError(f"cannot build the demo model at {folder}: {error}") from error
    return folder


def is_complete(folder: Path) -> bool:
    """Whether the folder holds this version of smolmoe with every file in its full size."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        return manifest["version"] == MODEL_VERSION and all(
            (folder / name).stat().st_size == nbytes for name, nbytes in manifest["files"].items()
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return False


def write_model(folder: Path, base: BaseModel, delta: Delta, progress: Progress | None = None) -> None:
    """Write all of smolmoe's files into an existing folder.

    Raises OSError or StorageError, before the first byte where the disk has no room for all of them.
    """
    config = model_config(base, delta)
    specs = mixtral_specs(config)
    weights = SmolmoeWeights(base, delta)
    data = with_progress(weights.bf16_bytes, specs, f"building {MODEL_NAME}", progress)
    write_sharded(folder, specs, data, SHARD_BYTES, together=expert_of, metadata={"format": "pt"})
    for name, content in small_files(base, config).items():
        write_synced(folder / name, content)
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    manifest = {"name": MODEL_NAME, "version": MODEL_VERSION, "files": sizes}
    write_synced(folder / MANIFEST, json.dumps(manifest, indent=2).encode() + b"\n")


def with_progress(
    data: Callable[[str], memoryview], specs: Iterable[TensorSpec], what: str, progress: Progress | None
) -> Callable[[str], memoryview]:
    """`data` with `progress` called after each tensor of `specs`."""
    if progress is None:
        return data
    total_bytes = sum(spec.nbytes for spec in specs)
    done_bytes = 0

    def reporting(name: str) -> memoryview:
        nonlocal done_bytes
        tensor = data(name)
        done_bytes += len(tensor)
        progress(what, done_bytes, total_bytes)
        return tensor

    return reporting


def _refuse_other_content(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DemoModelError(
            f"{folder} exists and is not a complete smolmoe {MODEL_VERSION}; delete it or name another folder"
        )
