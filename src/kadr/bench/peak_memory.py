"""Measures the peak memory of a task, above what was in use before it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from kadr.bench.runner import PeakMemory, Task
from kadr.memory.device import trim_heap

STATUS_FILE, RESET_FILE = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_FORGET_PEAK = "5"  # see proc(5): sets the peak back to the resident size of now
_LINE = re.compile(r"^Vm(HWM|RSS):\s+(\d+) kB$", re.MULTILINE)


def peak_memory_for(device: torch.device) -> PeakMemory:
    return cuda_peak_bytes if device.type == "cuda" else host_peak_bytes


def host_peak_bytes(task: Task) -> int | None:
    """Returns the growth of this process's resident set, file pages included; None where the system cannot tell.

    The peak is reset before the task, so memory of other contenders does not count.
    """
    trim_heap()
    try:
        RESET_FILE.write_text(_FORGET_PEAK, "utf-8")
        before = _resident()["RSS"]
    except OSError:
        return None
    result: Any = task()
    after = _resident()["HWM"]
    del result  # alive until here: it is part of what the task takes
    return max(0, after - before)


def process_peak_bytes(pid: int) -> int | None:
    """Returns the peak resident set of a running process so far; None where the system cannot tell."""
    try:
        return _resident(Path(f"/proc/{pid}/status")).get("HWM")
    except OSError:
        return None


def _resident(status: Path = STATUS_FILE) -> dict[str, int]:
    return {name: int(size) * 1024 for name, size in _LINE.findall(status.read_text("utf-8", "replace"))}


def cuda_peak_bytes(task: Task) -> int | None:
    """Returns the growth of what torch has allocated on the device."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result: Any = task()
    torch.cuda.synchronize()
    del result
    return int(torch.cuda.max_memory_allocated() - before)
