"""Describes the machine of a measurement, and the matmul that stages are compared with."""

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
from kadr.memory.cpu import cpu_model, instruction_sets
from kadr.version import __version__

MATMUL_SIDES = {"cpu": 4096, "cuda": 8192}


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Returns the machine and the versions of the software as plain data."""
    description: dict[str, Any] = {
        "cpu": cpu_model() or platform.processor() or platform.machine(),
        "cores": psutil.cpu_count(logical=False) or psutil.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_sets": instruction_sets(),
        "memory": psutil.virtual_memory().total,
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,  # over the last minute, by all programs
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "kadr": __version__,
        "revision": revision(),
        "device": device.type,
    }
    if device.type == "cuda":
        description |= _describe_gpu(device)
    return description


def _describe_gpu(device: torch.device) -> dict[str, Any]:
    gpu, cudnn = torch.cuda.get_device_name(device), torch.backends.cudnn.version()
    return {"gpu": gpu, "cuda": torch.version.cuda, "cudnn": cudnn}


def revision() -> str | None:
    """Returns the commit of this package, with "+" for uncommitted changes; None outside a repository."""
    run_git = partial(subprocess.run, cwd=Path(__file__).parents[1], capture_output=True, encoding="utf-8", check=True)
    try:
        commit = run_git(["git", "rev-parse", "--short=12", "HEAD"]).stdout.strip()
        return commit + ("+" if run_git(["git", "status", "--porcelain", "."]).stdout.strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def matmul_yardstick(dtype: str, device: torch.device, side: int | None = None, *, is_peak: bool = False) -> Contender:
    """Returns a product of two square random matrices: with zeros hardware is faster than in any real work."""
    side = side or MATMUL_SIDES.get(device.type, MATMUL_SIDES["cpu"])
    generator = torch.Generator().manual_seed(0)
    a, b = (_random_matrix(side, getattr(torch, dtype), generator).to(device) for _ in range(2))
    multiply = torch._int_mm if dtype == "int8" else torch.matmul
    return Contender(
        name=f"matmul {side}",
        run=partial(multiply, a, b),
        dtype=dtype,
        is_yardstick=True,
        is_peak=is_peak,
        yardstick_flops=2 * side**3,
    )


def _random_matrix(side: int, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    if dtype == torch.int8:
        return torch.randint(-127, 128, (side, side), generator=generator, dtype=torch.int8)
    return torch.randn(side, side, generator=generator).to(dtype)
