"""How much memory a run takes at most, besides what was there before it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from kadr.bench.runner import Task
from kadr.memory.device import trim_heap

STATUS_FILE, RESET_FILE = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_FORGET_PEAK = "5"  # of proc(5): the highest mark becomes what is resident now
_LINE = re.compile(r"^Vm(HWM|RSS):\s+(\d+) kB$", re.MULTILINE)


def host_peak_bytes(task: Task) -> int | None:
    """By the system's account of this process, pages of files and all; None where it cannot be asked.

    Its highest mark is set back before the run, so what other contenders took does not count.
    """
    trim_heap()
    try:
        RESET_FILE.write_text(_FORGET_PEAK)
        before = _resident()["RSS"]
    except OSError:
        return None
    kept: Any = task()
    after = _resident()["HWM"]
    del kept  # the result is part of what the run takes
    return max(0, after - before)


def process_peak_bytes(pid: int) -> int | None:
    """The highest mark of a process that runs, so far; None where it cannot be asked."""
    try:
        return _resident(Path(f"/proc/{pid}/status")).get("HWM")
    except OSError:
        return None


def _resident(status: Path = STATUS_FILE) -> dict[str, int]:
    return {name: int(size) * 1024 for name, size in _LINE.findall(status.read_text())}


def cuda_peak_bytes(task: Task) -> int | None:
    """By torch's account of the device."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept: Any = task()
    torch.cuda.synchronize()
    del kept
    return int(torch.cuda.max_memory_allocated() - before)
