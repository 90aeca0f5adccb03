"""The CPU of this machine: its name, its instruction sets, and the cores that this process may use."""

from __future__ import annotations

from pathlib import Path

import psutil

from kadr.memory.cgroup import cpu_share

# The instruction sets of matrix products, by their names in Linux.
INSTRUCTION_SETS = (
    ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8", "avx_vnni")
    + ("asimddp", "bf16", "i8mm", "sve")
)  # fmt: skip


def cpu_model() -> str:
    """Returns the name of the CPU; "" where the system does not tell."""
    return cpuinfo_value("model name")


def cpuinfo_value(*names: str) -> str:
    """Returns what Linux says of the first core under one of these names; "" on other systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        return ""
    fields = (line.partition(":") for line in lines)
    return next((value.strip() for name, _, value in fields if name.strip() in names), "")


def instruction_sets() -> list[str]:
    """Returns those of `INSTRUCTION_SETS` that the CPU has; [] on systems other than Linux."""
    flags = cpuinfo_value("flags", "Features").split()
    return [name for name in INSTRUCTION_SETS if name in flags]


def usable_cores() -> int:
    """Returns the cores, hyperthreads included, that this process may use: by its affinity and a container's share."""
    process = psutil.Process()
    affinity = process.cpu_affinity() if hasattr(process, "cpu_affinity") else None  # not on macOS
    return max(1, min(len(affinity) if affinity else psutil.cpu_count() or 1, cpu_share()))
