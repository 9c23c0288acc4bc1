"""What Linux memory cgroups, version 1 and 2, leave to this process.

A limit may sit on any level above the process, and what counts is the level with the least room left. Both
versions may be mounted at once; the one without a memory controller simply has no limit files. On other
systems there is nothing to find. Reference: the kernel's Documentation/admin-guide/cgroup-v1/memory.rst and
cgroup-v2.rst.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

NO_LIMIT_BYTES = 2**60  # version 1 writes "no limit" as a number near 2**63


@dataclass(frozen=True, slots=True)
class CgroupLimit:
    """The cgroup level with the least room left, and the smallest limit of all levels."""

    limit_bytes: int
    left_bytes: int  # limit - usage + page cache that can be reclaimed, never below 0
    source: str  # the file that holds the limit


@dataclass(frozen=True, slots=True)
class _Version:
    limit_names: tuple[str, ...]
    usage_name: str
    cache_keys: tuple[str, ...]


# Above memory.high a process is not killed but slowed down to a crawl, so for us it is a limit too.
_V2 = _Version(("memory.max", "memory.high"), "memory.current", ("inactive_file", "active_file"))
_V1 = _Version(
    ("memory.limit_in_bytes",), "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")
)


def tightest_limit(proc: Path = Path("/proc")) -> CgroupLimit | None:
    """The memory limit that binds this process, on whatever level it sits; None if there is none."""
    limits = [limit for folder, version in _levels(proc) for limit in _limits_of(folder, version)]
    if not limits:
        return None
    tightest = min(limits, key=lambda limit: limit.left_bytes)
    return CgroupLimit(min(limit.limit_bytes for limit in limits), tightest.left_bytes, tightest.source)


def _levels(proc: Path) -> Iterator[tuple[Path, _Version]]:
    """Every folder from the process's own cgroup up to the mount point, of each mounted version."""
    memberships = dict(_memberships(proc))
    for version, root, mount_point in _mounts(proc):
        path = memberships.get(version)
        if path is None:
            continue
        # In a container the mount may show only a part of the hierarchy, and paths begin above that part.
        relative = os.path.relpath(path, root)
        levels = [] if relative == "." or relative.startswith("..") else relative.split("/")
        for depth in range(len(levels), -1, -1):
            yield mount_point.joinpath(*levels[:depth]), version


def _memberships(proc: Path) -> Iterator[tuple[_Version, str]]:
    """This process's path in each hierarchy; lines are `0::/path` (version 2) or `4:memory:/path`."""
    for line in _lines(proc / "self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            yield _V2, path
        elif "memory" in controllers.split(","):
            yield _V1, path


def _mounts(proc: Path) -> Iterator[tuple[_Version, str, Path]]:
    """Version, root inside the hierarchy and mount point of each mount that may hold memory limits."""
    for line in _lines(proc / "self/mountinfo"):
        left, _, right = line.partition(" - ")
        _, _, _, root, mount_point, *_ = left.split()
        kind, _, options = right.split(" ", 2)
        if kind == "cgroup2":
            yield _V2, _unescape(root), Path(_unescape(mount_point))
        elif kind == "cgroup" and "memory" in options.split(","):
            yield _V1, _unescape(root), Path(_unescape(mount_point))


def _limits_of(folder: Path, version: _Version) -> Iterator[CgroupLimit]:
    usage = _number(folder / version.usage_name)
    for name in version.limit_names:
        limit = _number(folder / name)
        if limit is not None and usage is not None and limit < NO_LIMIT_BYTES:
            left = max(0, limit - usage + _reclaimable(folder, version))
            yield CgroupLimit(limit, min(left, limit), str(folder / name))


def _reclaimable(folder: Path, version: _Version) -> int:
    fields = (line.split() for line in _lines(folder / "memory.stat"))
    return sum(int(value) for key, value in fields if key in version.cache_keys)


def _number(path: Path) -> int | None:
    """The file's number; None for `max` and for a file that is not there."""
    lines = _lines(path)
    return int(lines[0]) if lines and lines[0].isdigit() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _unescape(text: str) -> str:
    """mountinfo writes a space as \\040."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)
