"""Which device and which numbers to compute with."""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from pathlib import Path

import psutil
import torch

from kadr.errors import RequestError

DEVICES = ("auto", "cpu", "cuda", "mps")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
# Where a container's limit and its use stand: control groups of version 2, then of version 1.
_CGROUP_FILES = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
FP32_MAX_PARAMETERS = 500_000_000  # parameters: below this, fp32 costs little anywhere


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is the first of cuda, mps, cpu that is there.

    Raises:
        RequestError: no such device here.
    """
    kind = name.partition(":")[0]
    if kind not in DEVICES:
        raise RequestError(f"device is {name!r}; it must be one of {', '.join(DEVICES)}.")
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if kind == "auto":
        return torch.device(next(kind for kind in ("cuda", "mps", "cpu") if there[kind]))
    if not there[kind]:
        raise RequestError(f"device is {name!r}, but torch finds none here. Leave out --device, or give cpu.")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RequestError(f"device is {name!r}; after the colon stands a number, such as cuda:0.") from error
    if kind == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise RequestError(f"device is {name!r}, but there are {count} here, numbered from 0. Leave out the number.")
    return device


def pick_dtype(name: str, device: torch.device, parameters: int) -> torch.dtype:
    """The dtype of that name. "auto" is bfloat16, but float32 for small models and for CPUs without bfloat16 units.

    There bfloat16 products run many times slower than float32 ones (pytorch issue 146508).

    Raises:
        RequestError: no such dtype.
    """
    if name in DTYPES:
        return DTYPES[name]
    if name != "auto":
        raise RequestError(f"dtype is {name!r}; it must be auto, {' or '.join(DTYPES)}.")
    if parameters < FP32_MAX_PARAMETERS or (device.type == "cpu" and not _cpu_has_bfloat16()):
        return torch.float32
    return torch.bfloat16


def _cpu_has_bfloat16() -> bool:
    """Whether products in bfloat16 have units of their own: AVX512-BF16 or AMX on x86, BF16 on Arm."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() or _arm_has("bf16")


def has_fast_int8() -> bool:
    """Whether this CPU has units for products in 8 bits: VNNI or AMX on x86, the dot products of Arm."""
    return torch.cpu._is_vnni_supported() or torch.cpu._is_amx_tile_supported() or _arm_has("asimddp")


def _arm_has(feature: str) -> bool:
    try:
        with open("/proc/cpuinfo") as info:
            return any(feature in line for line in info if line.startswith("Features"))
    except OSError:
        return False


def free_bytes(device: torch.device) -> int:
    """Memory that can be had on the device now; for the CPU, what the system could give without swapping."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min(psutil.virtual_memory().available, _cgroup_free_bytes())


def resident_bytes() -> int:
    """What this process takes of the memory of the host now, by the account of the system."""
    return psutil.Process().memory_info().rss


def trim_heap() -> None:
    """Give the system what is free inside the process: glibc keeps it for itself otherwise."""
    trim = getattr(_libc(), "malloc_trim", None)
    if trim is not None:
        trim(0)


@cache
def _libc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if sys.platform == "linux" else None


def _cgroup_free_bytes() -> int:
    """What a container's limit leaves, on Linux; a great deal where there is none."""
    for limit, used in _CGROUP_FILES:
        try:
            most, now = Path(limit).read_text(), Path(used).read_text()
        except OSError:
            continue
        if most.strip().isdecimal():
            return max(0, int(most) - int(now) + _inactive_file_bytes())
    return sys.maxsize


def _inactive_file_bytes() -> int:
    """Bytes of files in the container's account that go when memory is asked for."""
    for path, word in (
        ("/sys/fs/cgroup/memory.stat", "inactive_file"),
        ("/sys/fs/cgroup/memory/memory.stat", "total_inactive_file"),
    ):
        try:
            lines = Path(path).read_text().splitlines()
        except OSError:
            continue
        return next((int(line.split()[1]) for line in lines if line.startswith(f"{word} ")), 0)
    return 0
