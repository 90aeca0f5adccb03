"""The limits of a container or a systemd unit: control groups of Linux, version 2 and 1. Elsewhere there are none.

A container usually sees its own group as the root of /sys/fs/cgroup. A unit of systemd, and a container in the host's
namespace, lies further down: /proc/self/cgroup says where, and each group on the way limits all that are below it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

GROUPS_ROOT = Path("/sys/fs/cgroup")
GROUPS_FILE = Path("/proc/self/cgroup")  # lines "number:controllers:/path", in version 2 "0::/path"


class MemoryFiles(NamedTuple):
    """Names of files of a group. limits: the lowest of them counts; inactive: a line of stat, cached files."""

    limits: tuple[str, ...]
    used: str
    inactive: str


MEMORY_FILES = {
    2: MemoryFiles(("memory.max", "memory.high"), "memory.current", "inactive_file"),
    1: MemoryFiles(("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file"),
}


def memory_limit_bytes() -> int:
    """Returns the lowest limit on this process's memory; sys.maxsize without one."""
    return min((limit for limit, _ in _memory_limits()), default=sys.maxsize)


def free_memory_bytes() -> int:
    """Returns the free memory under all limits; sys.maxsize without one.

    Cached files that are not in use count as free: the system drops them under pressure.
    """
    return min((free for _, free in _memory_limits()), default=sys.maxsize)


def cpu_share() -> int:
    """Returns the cores that this process's share of time is worth, rounded up; sys.maxsize without a limit."""
    shares = [_cpu_share(version, group) for version, group in _groups("cpu")]
    return min(shares, default=sys.maxsize)


def _memory_limits() -> Iterator[tuple[int, int]]:
    """Yields limit and free bytes of every group that has a limit."""
    for version, group in _groups("memory"):
        files = MEMORY_FILES[version]
        limits = [int(text) for name in files.limits if (text := _read(group / name)).isdecimal()]
        used = _read(group / files.used)
        if limits and used.isdecimal():
            yield min(limits), max(0, min(limits) - int(used) + _stat(group, files.inactive))


def _cpu_share(version: int, group: Path) -> int:
    if version == 2:
        quota, _, period = _read(group / "cpu.max").partition(" ")
    else:
        quota, period = _read(group / "cpu.cfs_quota_us"), _read(group / "cpu.cfs_period_us")  # quota -1: no limit
    if not quota.isdecimal() or not period.isdecimal():
        return sys.maxsize
    return math.ceil(int(quota) / int(period))


def _groups(controller: str) -> Iterator[tuple[int, Path]]:
    """Yields the version and folder of each group that this process is in, from its own up to the root."""
    paths = {1: PurePosixPath("/"), 2: PurePosixPath("/")}
    for line in _read(GROUPS_FILE).splitlines():
        number, controllers, path = (*line.split(":", 2), "", "")[:3]
        if (version := 2 if number == "0" else 1) == 2 or controller in controllers.split(","):
            paths[version] = PurePosixPath(path)
    for version, root in ((2, GROUPS_ROOT), (1, GROUPS_ROOT / controller)):
        own = paths[version]
        if ".." in own.parts:  # in a group outside of what this namespace shows
            own = PurePosixPath("/")
        for group in (own, *own.parents):
            yield version, root / group.relative_to(group.anchor)


def _stat(group: Path, key: str) -> int:
    lines = _read(group / "memory.stat").splitlines()
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{key} ")), 0)


def _read(path: Path) -> str:
    """Returns the text of a file; "" where there is none, or the system does not let it be read."""
    try:
        return path.read_text("utf-8", "replace").strip()
    except OSError:
        return ""
