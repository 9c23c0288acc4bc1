"""Build smolmoe in a process of its own: the memory it takes is not charged to the run that follows."""

import json
import os
import subprocess
import sys
from pathlib import Path

from flashmoe.demo_model import Progress, default_folder
from flashmoe.errors import DemoModelError


def build_in_child(progress: Progress | None = None, folder: Path | None = None) -> Path:
    """Like `build_demo_model`: returns at once where the model is complete. Raises DemoModelError."""
    from flashmoe.demo_model.build import is_complete

    folder = folder or default_folder()
    if is_complete(folder):
        return folder
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "flashmoe.demo_model", str(folder)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}
    ) as child:
        assert child.stdout is not None
        for line in child.stdout:
            if not line.startswith("{"):  # some library's own words
                continue
            message = json.loads(line)
            if "error" in message:
                raise DemoModelError(message["error"])
            if progress is not None and "progress" in message:
                progress(*message["progress"])
    if child.returncode:
        raise DemoModelError(f"building the demo model ended with status {child.returncode}")
    return folder
