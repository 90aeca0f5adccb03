"""The CPU of this machine, by name."""

from __future__ import annotations

from pathlib import Path


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
