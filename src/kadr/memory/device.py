"""Which device and which numbers to compute with."""

from __future__ import annotations

import os

import torch

from kadr.errors import RequestError

DEVICES = ("auto", "cpu", "cuda", "mps")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
SMALL = 500_000_000  # parameters: below this, fp32 costs little anywhere


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
    if parameters < SMALL or (device.type == "cpu" and not _cpu_has_bfloat16()):
        return torch.float32
    return torch.bfloat16


def _cpu_has_bfloat16() -> bool:
    """Whether products in bfloat16 have units of their own: AVX512-BF16 or AMX on x86, BF16 on Arm."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() or _arm_bfloat16()


def _arm_bfloat16() -> bool:
    try:
        with open("/proc/cpuinfo") as info:
            return any("bf16" in line for line in info if line.startswith("Features"))
    except OSError:
        return False


def free_bytes(device: torch.device) -> int:
    """Memory that is free on the device now; for the CPU, what the system could give."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
