"""The C++ library's self-test (kernels/cpu/selftest.cpp) under AddressSanitizer and UBSan.

The first run compiles for about a minute of processor time, later ones only what has changed. The long run:

    FLASHMOE_SELFTEST_CASES=100000 python -m pytest tests/test_cpu_selftest.py

takes about ten minutes. Other sanitizers and other machines: scripts/check_kernels.sh.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
BUILD = REPOSITORY / "build" / "selftest"
CASES = int(os.environ.get("FLASHMOE_SELFTEST_CASES", "3000"))


def compiler_missing() -> str | None:
    """Why the self-test cannot be built here, if so."""
    if shutil.which("cmake") is None:
        return "needs cmake"
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++")):
        return "needs a C++ compiler"
    return None


MISSING = compiler_missing()


@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
def test_the_library_agrees_with_itself_and_with_double_precision_under_sanitizers() -> None:
    """Every instruction set of this machine; memory errors, undefined behaviour and leaks fail it too."""
    run("cmake", "-S", str(REPOSITORY), "-B", str(BUILD), "-DFLASHMOE_PYTHON=OFF",
        "-DFLASHMOE_SANITIZE=address,undefined")  # fmt: skip
    run("cmake", "--build", str(BUILD), "--target", "selftest", "-j", str(os.cpu_count() or 1))
    output = run(str(BUILD / "kernels" / "cpu" / "selftest"), "--cases", str(CASES))
    assert output.splitlines()[-1].startswith(f"passed: {CASES} cases"), output


def run(*command: str) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}"
    return done.stdout
