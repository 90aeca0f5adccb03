"""What a figure was measured on, and what it is measured against."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch

from kadr.bench.runner import Contender
from kadr.version import __version__

# Those that products are made with, as Linux calls them.
INSTRUCTION_SETS = (
    ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8", "avx_vnni")
    + ("asimddp", "bf16", "i8mm", "sve")
)  # fmt: skip
MATMUL_SIDES = {"cpu": 4096, "cuda": 8192}


def describe_machine(device: torch.device) -> dict[str, Any]:
    """The machine and the programs, as plain data."""
    made: dict[str, Any] = {
        "cpu": _cpuinfo_value("model name") or platform.processor() or platform.machine(),
        "cores": psutil.cpu_count(logical=False) or psutil.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": [name for name in INSTRUCTION_SETS if name in _cpuinfo_value("flags", "Features").split()],
        "memory": psutil.virtual_memory().total,
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,  # of the last minute, ours or others'
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "kadr": __version__,
        "revision": revision(),
        "device": device.type,
    }
    if device.type == "cuda":
        made |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
        made["cudnn"] = torch.backends.cudnn.version()
    return made


def _cpuinfo_value(*names: str) -> str:
    """What Linux says of the first core under one of these names; "" elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    found = (line.partition(":") for line in lines)
    return next((value.strip() for name, _, value in found if name.strip() in names), "")


def revision() -> str | None:
    """The commit that this package is of, with "+" where it was changed since; None outside of a repository."""
    ask = partial(subprocess.run, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True)
    try:
        commit = ask(["git", "rev-parse", "--short=12", "HEAD"]).stdout.strip()
        return commit + ("+" if ask(["git", "status", "--porcelain", "."]).stdout.strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def matmul_yardstick(dtype: str, device: torch.device, side: int | None = None) -> Contender:
    """A product of two square matrices of random numbers: zeros would be faster than any real work."""
    side = side or MATMUL_SIDES.get(device.type, MATMUL_SIDES["cpu"])
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(side, side, generator=generator).to(device, getattr(torch, dtype)) for _ in range(2))
    return Contender(name=f"matmul {side}", run=lambda: a @ b, dtype=dtype, is_yardstick=True)


def yardstick_flops(side: int) -> int:
    return 2 * side**3
