"""The NEON kernels, cross-compiled and run under qemu: the same bits as scalar, and as this machine's."""

import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "check_kernels.sh"
TOOLS = ("cmake", "aarch64-linux-gnu-g++", "qemu-aarch64")
MISSING = [tool for tool in TOOLS if shutil.which(tool) is None]


@pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)} (g++-aarch64-linux-gnu, qemu-user)")
def test_neon_gives_the_bits_of_every_other_instruction_set() -> None:
    done = subprocess.run(
        [SCRIPT, "neon", "200"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:]
