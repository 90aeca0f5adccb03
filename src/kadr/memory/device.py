"""Devices and dtypes: picking them by name, and memory that is free or in use."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress
from functools import cache
from typing import TypeVar

import psutil
import torch
from torch import nn

from kadr.cancellation import check_cancelled
from kadr.errors import RequestError
from kadr.memory import cgroup
from kadr.quoting import quote

M = TypeVar("M", bound=nn.Module)
DEVICES = ("auto", "cpu", "cuda", "mps")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
BF16_MIN_CAPABILITY = (8, 0)  # Ampere, the first NVIDIA GPUs with bfloat16
INT8_MIN_CAPABILITY = (7, 5)  # Turing, the first with int8 matmuls
BF16_MIN_MACOS = (14, 0)
# cuDNN from the first up to the second computes large 3D convolutions in bfloat16 wrong on some GPUs (pytorch issue
# 163539). torch 2.9 avoids cuDNN's for those, and then takes up to 17 times the memory (issue 166643).
BROKEN_CUDNN, MENDED_CUDNN = 90800, 91501
FP32_MAX_PARAMETERS = 500_000_000  # a model of fewer parameters runs in fp32: that costs little anywhere


def pick_device(name: str) -> torch.device:
    """Returns the device of that name; "auto" is the first available of cuda, mps and cpu.

    Raises:
        RequestError: unknown or unavailable device.
    """
    kind = str(name).partition(":")[0]
    if kind not in DEVICES:
        raise RequestError(f"device is {quote(name)}; it must be one of {', '.join(DEVICES)}.")
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if kind == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if available[kind])
    elif not available[kind]:
        raise RequestError(f"device is {quote(name)}, but torch finds none here. Leave out --device, or give cpu.")
    return with_index(_parse_device(name))


def with_index(device: torch.device) -> torch.device:
    """Returns a CUDA device with its number, as tensors name theirs; without one it is the current device."""
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", torch.cuda.current_device() if torch.cuda.is_initialized() else 0)


def _parse_device(name: str) -> torch.device:
    """Parses the name of a device of an available kind, and refuses a number that no GPU has."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RequestError(f"device is {quote(name)}; after the colon stands a number, such as cuda:0.") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise RequestError(
            f"device is {quote(name)}, but there are {count} here, numbered from 0. Leave out the number."
        )
    return device


def pick_dtype(name: str, device: torch.device, parameters: int) -> torch.dtype:
    """Returns the dtype of that name. "auto" is bfloat16, but float32 for small models and devices without bfloat16.

    On such CPUs bfloat16 products run many times slower than float32 ones (pytorch issue 146508).

    Args:
        parameters: parameter count of the model.

    Raises:
        RequestError: unknown dtype, or one that the device does not have at all.
    """
    if name == "bfloat16" and device.type == "mps" and not has_bfloat16(device):
        raise RequestError("dtype is 'bfloat16', which this Mac has from macOS 14 on. Leave out --dtype.")
    if name in DTYPES:
        return DTYPES[name]
    if name != "auto":
        raise RequestError(f"dtype is {quote(name)}; it must be auto, {' or '.join(DTYPES)}.")
    return torch.bfloat16 if parameters >= FP32_MAX_PARAMETERS and has_bfloat16(device) else torch.float32


def explain_dtype(name: str, device: torch.device, parameters: int) -> str:
    """Returns why a GPU computes a large model in float32, or slowly in bfloat16; "" where it does neither."""
    if device.type == "cpu" or parameters < FP32_MAX_PARAMETERS or has_bfloat16(device):
        return ""
    remedy = "Ampere and later GPUs have it" if device.type == "cuda" else "it needs macOS 14"
    fact = f"{device} has no bfloat16 ({remedy})"
    if name == "auto":
        return f"{fact}: float32 is used, which takes twice the memory."
    return "" if name == "float32" else f"{fact} and emulates it slowly. Leave out --dtype."


def explain_cudnn(device: torch.device) -> str:
    """Returns what this version of cuDNN costs the VAE on an NVIDIA GPU; "" where it is a good one."""
    if device.type != "cuda" or torch.version.hip is not None:
        return ""
    version = torch.backends.cudnn.version() or 0
    if not BROKEN_CUDNN <= version < MENDED_CUDNN:
        return ""
    package = f"nvidia-cudnn-cu{str(torch.version.cuda).partition('.')[0]}"
    return (
        f"cuDNN {_cudnn_name(version)} computes large 3D convolutions in bfloat16 wrong on some GPUs, and some "
        "versions of torch take many times the memory to avoid that: "
        f"pip install '{package}>={_cudnn_name(MENDED_CUDNN)}'."
    )


def _cudnn_name(version: int) -> str:
    return f"{version // 10000}.{version // 100 % 100}.{version % 100}"


def has_bfloat16(device: torch.device) -> bool:
    """Returns whether a device computes in bfloat16 itself."""
    if device.type == "cpu":
        return _cpu_has_bfloat16()
    if device.type == "mps":
        return torch.backends.mps.is_macos_or_newer(*BF16_MIN_MACOS)
    return _has_capability(device, BF16_MIN_CAPABILITY)


def can_hold(device: torch.device, dtype: torch.dtype) -> bool:
    """Returns whether a device has tensors of a dtype: MPS has no float64 and no 8-bit floats."""
    return device.type != "mps" or not (dtype == torch.float64 or (dtype.is_floating_point and dtype.itemsize == 1))


def _has_capability(device: torch.device, minimum: tuple[int, int]) -> bool:
    """Returns whether a CUDA device has this compute capability; true on ROCm, which counts differently."""
    if device.type != "cuda" or torch.version.hip is not None or not torch.cuda.is_available():
        return device.type == "cuda"
    return torch.cuda.get_device_capability(device) >= minimum


def _cpu_has_bfloat16() -> bool:
    """Returns whether the CPU has bfloat16 units: AVX512-BF16 or AMX on x86, BF16 on Arm."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() or _arm_has("bf16")


def has_fast_int8(device: torch.device) -> bool:
    """Returns whether a device has int8 matmuls: a CPU with VNNI, AMX or Arm's dot products, a GPU from Turing on."""
    if device.type != "cpu":
        return _has_capability(device, INT8_MIN_CAPABILITY)
    return torch.cpu._is_vnni_supported() or torch.cpu._is_amx_tile_supported() or _arm_has("asimddp")


def _arm_has(feature: str) -> bool:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as info:
            return any(feature in line for line in info if line.startswith("Features"))
    except OSError:
        return False


def move_module(module: M, device: torch.device) -> M:
    """Moves a module to a device, one layer after the other, and returns it.

    Raises:
        Cancelled: the work is cancelled; looked at before each layer.
    """
    for child in module.modules():
        check_cancelled()
        if not any(child.children()):
            child.to(device)
    return module.to(device)  # the parameters of modules that have children


def free_bytes(device: torch.device) -> int:
    """Returns the free memory of a device; for the CPU, what the system can give without swapping.

    On a GPU, memory that torch keeps for reuse in this process is free too.
    """
    if device.type == "cuda":
        reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + reusable)
    return min(psutil.virtual_memory().available, cgroup.free_memory_bytes())


def total_bytes(device: torch.device) -> int:
    """Returns the memory of a device; for the CPU, no more than a container's limit."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return container_limit_bytes() or psutil.virtual_memory().total


def used_bytes(device: torch.device) -> int:
    """Returns the memory of a GPU that is in use, by any program; else the resident bytes of this process tree.

    Pages that several of its processes share count for each.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return int(total - free)
    used = 0
    for process in (own := psutil.Process(), *own.children(recursive=True)):
        with suppress(psutil.Error):  # it has ended meanwhile
            used += process.memory_info().rss
    return used


def resident_bytes() -> int:
    """Returns the resident set size of this process."""
    return psutil.Process().memory_info().rss


def private_bytes(device: torch.device) -> int:
    """Returns the bytes of a device that are free once this process is; pages of files count as free already."""
    if device.type == "cuda":
        return int(torch.cuda.memory_reserved(device))
    memory = psutil.Process().memory_info()
    return int(memory.rss - getattr(memory, "shared", 0))  # only Linux tells what is shared


def trim_heap() -> None:
    """Returns freed heap memory to the system, which glibc would keep otherwise."""
    trim = getattr(_libc(), "malloc_trim", None)
    if trim is not None:
        trim(0)


@cache
def _libc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if sys.platform == "linux" else None


def container_limit_bytes() -> int | None:
    """Returns the limit on memory of a container or a systemd unit, on Linux; None without one."""
    limit = cgroup.memory_limit_bytes()
    return limit if limit < psutil.virtual_memory().total else None
