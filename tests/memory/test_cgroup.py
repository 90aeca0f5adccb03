"""Limits of memory and time are those of the process's own control group and of all groups that it lies in."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import psutil
import pytest
import torch

from kadr.memory import cgroup, cpu, device
from tests.page_commands import ROOT

GIB = 1 << 30
NONE = sys.maxsize
V1_NO_LIMIT = "9223372036854771712"
_JOIN = """
import sys
from pathlib import Path
Path(sys.argv[1]).write_text("0")
from kadr.memory.cgroup import free_memory_bytes, memory_limit_bytes
print(memory_limit_bytes(), free_memory_bytes())
"""


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(cgroup, "GROUPS_ROOT", tmp_path / "groups")
    monkeypatch.setattr(cgroup, "GROUPS_FILE", tmp_path / "groups" / "self")
    return tmp_path / "groups"


def write(groups: Path, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        (groups / name).parent.mkdir(parents=True, exist_ok=True)
        (groups / name).write_text(f"{text}\n")


def memory(limit: object, used: int = 0, inactive: int = 0) -> dict[str, str]:
    return {
        "memory.max": str(limit),
        "memory.current": str(used),
        "memory.stat": f"anon 7\ninactive_file {inactive}\nslab 9",
    }


def in_folder(folder: str, files: Mapping[str, str]) -> dict[str, str]:
    return {f"{folder}/{name}": text for name, text in files.items()}


def test_container_sees_its_limit_at_the_root(groups: Path) -> None:
    write(groups, {"self": "0::/", **memory(4 * GIB, used=3 * GIB, inactive=GIB)})
    assert (cgroup.memory_limit_bytes(), cgroup.free_memory_bytes()) == (4 * GIB, 2 * GIB)
    write(groups, memory(2 * GIB, used=3 * GIB))
    assert cgroup.free_memory_bytes() == 0


def test_systemd_unit_has_the_lowest_limit_on_its_way_up(groups: Path) -> None:
    write(groups, {"self": "0::/system.slice/kadr.service", **in_folder("system.slice/kadr.service", memory(8 * GIB))})
    assert cgroup.memory_limit_bytes() == cgroup.free_memory_bytes() == 8 * GIB
    write(groups, {"system.slice/kadr.service/memory.high": str(6 * GIB)})
    assert cgroup.memory_limit_bytes() == 6 * GIB
    write(groups, in_folder("system.slice", memory(10 * GIB, used=9 * GIB)))  # by its neighbours
    assert (cgroup.memory_limit_bytes(), cgroup.free_memory_bytes()) == (6 * GIB, GIB)
    write(groups, in_folder("other.slice", memory(GIB)))
    assert cgroup.memory_limit_bytes() == 6 * GIB


def test_groups_of_version_1_are_found_by_their_controller(groups: Path) -> None:
    limits = {"memory.limit_in_bytes": str(GIB), "memory.usage_in_bytes": "600", "memory.stat": "total_inactive_file 9"}
    root = {"memory.limit_in_bytes": V1_NO_LIMIT, "memory.usage_in_bytes": "7"}
    self_file = "5:cpu,cpuacct:/jobs\n4:memory:/jobs/one\n0::/"
    write(groups, {"self": self_file, **in_folder("memory", root), **in_folder("memory/jobs/one", limits)})
    assert (cgroup.memory_limit_bytes(), cgroup.free_memory_bytes()) == (GIB, GIB - 600 + 9)
    write(groups, in_folder("cpu/jobs", {"cpu.cfs_quota_us": "250000", "cpu.cfs_period_us": "100000"}))
    write(groups, in_folder("cpu", {"cpu.cfs_quota_us": "-1", "cpu.cfs_period_us": "100000"}))
    assert cgroup.cpu_share() == 3


def test_container_of_version_1_does_not_see_its_path(groups: Path) -> None:
    limits = {"memory.limit_in_bytes": str(GIB), "memory.usage_in_bytes": "0"}
    write(groups, {"self": "4:memory:/docker/5f2", **in_folder("memory", limits)})
    assert cgroup.memory_limit_bytes() == GIB


@pytest.mark.parametrize("self_file", ["0::/", "0::/../../elsewhere", "0::", "", "nonsense", "0::/gone"])
@pytest.mark.parametrize("limit", ["max", ""])
def test_no_limit_is_found_where_none_is_set(self_file: str, limit: str, groups: Path) -> None:
    write(groups, {"self": self_file, **memory(limit), "cpu.max": "max 100000"})
    assert cgroup.memory_limit_bytes() == cgroup.free_memory_bytes() == cgroup.cpu_share() == NONE


def test_share_of_time_limits_the_usable_cores(groups: Path) -> None:
    write(groups, {"self": "0::/a/b", "a/b/cpu.max": "150000 100000"})
    assert cgroup.cpu_share() == 2
    write(groups, {"a/cpu.max": "1000 100000"})
    assert cgroup.cpu_share() == cpu.usable_cores() == 1


def test_plan_has_no_more_than_the_limit_leaves(groups: Path) -> None:
    write(groups, {"self": "0::/", **memory(10_000, used=4_000)})
    assert device.free_bytes(torch.device("cpu")) == 6_000
    assert device.container_limit_bytes() == 10_000
    write(groups, memory(1 << 60))  # of more memory than there is
    assert device.container_limit_bytes() is None
    assert 0 < device.free_bytes(torch.device("cpu")) <= psutil.virtual_memory().total


def test_limit_of_a_real_group_is_seen_from_inside() -> None:
    root = Path("/sys/fs/cgroup")
    is_v1 = (root / "memory").is_dir()
    group = (root / "memory" if is_v1 else root) / f"kadr-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / ("memory.limit_in_bytes" if is_v1 else "memory.max")).write_text(str(GIB))
    except OSError as error:
        with contextlib.suppress(OSError):
            group.rmdir()
        pytest.skip(f"no control group can be made here: {error.strerror}")
    try:
        arguments = [sys.executable, "-c", _JOIN, str(group / "cgroup.procs")]
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
        output = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=True).stdout
    finally:
        group.rmdir()
    limit, free = map(int, output.split())
    assert limit == GIB
    assert GIB // 2 < free < GIB
