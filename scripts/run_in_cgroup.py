#!/usr/bin/env python3
"""Run a command inside a fresh memory cgroup with a byte limit, and say what it used.

    scripts/run_in_cgroup.py --limit 600M -- flashmoe run --model PATH --ram-budget 600M --prompt "…"

cgroup v1 or v2, whichever is mounted and writable (root, or a delegated subtree). The page cache that the
command pulls in counts, as it does for the kernel. Swap is forbidden to the group where the kernel can. The
last line on stderr is one JSON object; the exit status is the command's, 137 if it was killed, 77 where no
cgroup can be made.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

CANNOT = 77
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class CgroupUnavailable(Exception):
    """No memory cgroup can be made here; the text says why."""


@dataclass(frozen=True)
class CgroupRun:
    """What happened inside: bytes as counted by the kernel for the whole group, page cache included."""

    returncode: int
    limit_bytes: int
    peak_bytes: int | None  # None where the kernel does not keep it
    oom_kills: int
    hierarchy: str


class MemoryCgroup:
    """A fresh group with a limit; a context manager that removes it."""

    def __init__(self, limit_bytes: int, root: Path = Path("/sys/fs/cgroup")) -> None:
        self.limit_bytes = limit_bytes
        if (root / "memory" / "memory.limit_in_bytes").exists():
            self.hierarchy, parent = "v1", root / "memory"
        elif (root / "cgroup.controllers").exists():
            self.hierarchy, parent = "v2", root / _own_v2_group().lstrip("/")
        else:
            raise CgroupUnavailable(f"no memory cgroup hierarchy is mounted at {root}")
        try:
            self.path = Path(tempfile.mkdtemp(prefix="flashmoe-", dir=parent))
        except OSError as error:
            raise CgroupUnavailable(f"cannot make a group under {parent}: {error.strerror}") from error

    def __enter__(self) -> "MemoryCgroup":
        limit = "memory.limit_in_bytes" if self.hierarchy == "v1" else "memory.max"
        swap = "memory.memsw.limit_in_bytes" if self.hierarchy == "v1" else "memory.swap.max"
        try:
            (self.path / limit).write_text(str(self.limit_bytes))
        except OSError as error:
            self.path.rmdir()
            raise CgroupUnavailable(f"{self.path / limit}: {error.strerror}") from error
        if (self.path / swap).exists():
            (self.path / swap).write_text(str(self.limit_bytes) if self.hierarchy == "v1" else "0")
        return self

    def __exit__(self, *_: object) -> None:
        self.path.rmdir()

    def enter_this_process(self) -> None:
        (self.path / "cgroup.procs").write_text(str(os.getpid()))

    def peak_bytes(self) -> int | None:
        names = ("memory.max_usage_in_bytes", "memory.peak")
        found = (self.path / name for name in names if (self.path / name).exists())
        return next((int(path.read_text()) for path in found), None)

    def oom_kills(self) -> int:
        name = "memory.oom_control" if self.hierarchy == "v1" else "memory.events"
        pairs = (line.split() for line in (self.path / name).read_text().splitlines())
        return sum(int(value) for key, value in pairs if key == "oom_kill")


def run_in_cgroup(command: Sequence[str], limit_bytes: int, **popen: object) -> CgroupRun:
    """Run `command` inside a group of `limit_bytes`; CgroupUnavailable where that is not permitted."""
    with MemoryCgroup(limit_bytes) as group:
        done = subprocess.run(command, preexec_fn=group.enter_this_process, **popen)  # type: ignore[call-overload]
        return CgroupRun(done.returncode, limit_bytes, group.peak_bytes(), group.oom_kills(), group.hierarchy)


def _own_v2_group() -> str:
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    return next((line[3:] for line in lines if line.startswith("0::")), "/")


def _size(text: str) -> int:
    unit = UNITS.get(text[-1:].upper(), 1)
    return int(float(text[:-1] if unit > 1 else text) * unit)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--limit", type=_size, required=True, help="bytes, or with K, M, G, T (binary)")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command:
        parser.error("no command given")
    try:
        run = run_in_cgroup(command, args.limit)
    except CgroupUnavailable as error:
        print(f"skipped: {error}", file=sys.stderr)
        return CANNOT
    print(json.dumps(asdict(run)), file=sys.stderr)
    return 137 if run.oom_kills or run.returncode < 0 else run.returncode


if __name__ == "__main__":
    sys.exit(main())
