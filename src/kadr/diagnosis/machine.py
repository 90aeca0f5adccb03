"""The machine as kadr sees it, read once: versions, device, instruction sets, memory, folders, environment."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

from kadr.bench.machine import describe_machine
from kadr.diagnosis.folders import CacheFolder, read_folders
from kadr.errors import RequestError
from kadr.kernels import mode
from kadr.memory.cpu import usable_cores
from kadr.memory.device import (
    FP32_MAX_PARAMETERS,
    container_limit_bytes,
    explain_cudnn,
    free_bytes,
    has_bfloat16,
    has_fast_int8,
    pick_dtype,
)
from kadr.planning.calibration.storage import load_calibration
from kadr.spec.model_dirs import MODELS_VARIABLE, configured_dirs

LIBRARIES = ("av", "numpy", "safetensors", "gguf", "tokenizers", "sentencepiece", "huggingface_hub", "pillow", "triton")
# Extra -> modules that it installs.
EXTRAS: Mapping[str, tuple[str, ...]] = {
    "control": ("cv2",),
    "depth": ("onnxruntime",),
    "pose": ("rtmlib", "onnxruntime"),
    "heic": ("pi_heif",),
    "amd": ("zentorch",),
    "serve": ("fastapi", "uvicorn", "multipart", "prometheus_client"),
}
# Environment variables that are shown. None of them is a secret: a report is pasted into an issue.
VARIABLES = (
    *(
        "KADR_CACHE",
        MODELS_VARIABLE,
        mode.ENVIRONMENT_VARIABLE,
        mode.ZENTORCH_VARIABLE,
        "KADR_DEBUG",
        "HF_HOME",
        "HF_HUB_CACHE",
    ),
    *("HF_HUB_OFFLINE", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_PROC_BIND", "GOMP_CPU_AFFINITY"),
    *("CUDA_VISIBLE_DEVICES", "CUDA_LAUNCH_BLOCKING", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_NO_CUDA_MEMORY_CACHING"),
    *("TRITON_INTERPRET", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ONEDNN_VERBOSE"),
    *("DNNL_VERBOSE", "MKL_VERBOSE", "TORCH_COMPILE_DISABLE", "PYTORCH_ENABLE_MPS_FALLBACK"),
)
_DRIVER_FILE, _DRIVER_VERSION = Path("/proc/driver/nvidia/version"), re.compile(r"\b(\d{3,}\.\d+(?:\.\d+)?)\b")
_DRIVER_COMMAND = ("--query-gpu=driver_version", "--format=csv,noheader")
_DRIVER_SECONDS = 10  # that the command may take


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The machine, and the software on it. All of it is plain data.

    Args:
        versions: of kadr, Python, torch and the libraries; None for one that is not installed.
        system: name and version of the operating system.
        cpu: its name.
        cores: physical cores; `usable_cores` also counts hyperthreads, and heeds affinity and a container's share.
        threads: that torch computes with on the CPU.
        instruction_sets: those of matrix products; () where the system does not tell.
        has_bfloat16, has_fast_int8: the device computes so itself.
        device: such as "cpu" or "cuda".
        gpu, gpu_driver, cuda: name of the GPU, version of NVIDIA's driver, and of the CUDA that torch was built with.
        cudnn_fault: what its version of cuDNN costs; "" for a good one.
        dtype: that the model is computed in.
        kernels: "auto", or what KADR_KERNELS says.
        is_calibrated: this machine was measured, in that dtype.
        memory_bytes, free_bytes: of the whole machine; free on the device.
        memory_limit_bytes: of the container, if that is less; None without one.
        swap_bytes: of memory that is swapped out.
        load: programs that computed at once over the last minute; None where the system does not tell.
        folders: the caches.
        models_dirs: configured folders of models; `absent_models_dirs`: those that do not exist.
        extras: optional parts of kadr, and whether they are installed.
        environment: those of `VARIABLES` that are set.
    """

    versions: Mapping[str, str | None]
    system: str
    cpu: str
    cores: int
    usable_cores: int
    threads: int
    instruction_sets: tuple[str, ...]
    has_bfloat16: bool
    has_fast_int8: bool
    device: str
    gpu: str | None = None
    gpu_driver: str | None = None
    cuda: str | None = None
    cudnn_fault: str = ""
    dtype: str
    kernels: str = mode.AUTO
    is_calibrated: bool
    memory_bytes: int
    free_bytes: int
    memory_limit_bytes: int | None = None
    swap_bytes: int = 0
    load: float | None = None
    folders: tuple[CacheFolder, ...] = ()
    models_dirs: tuple[str, ...] = ()
    absent_models_dirs: tuple[str, ...] = ()
    extras: Mapping[str, bool] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Returns plain data."""
        return asdict(self)


def read_machine(device: torch.device, dtype: torch.dtype | None = None) -> Machine:
    """Reads the machine. Loads no weight, and uses no network; runs nvidia-smi where there is one.

    Args:
        dtype: of the model that is looked at; None for that of a released one.
    """
    described, models_dirs = describe_machine(device), _models_dirs()
    dtype = dtype or pick_dtype("auto", device, FP32_MAX_PARAMETERS)
    return Machine(
        versions={name: described[name] for name in ("kadr", "python", "torch")} | _library_versions(),
        system=described["system"],
        cpu=described["cpu"],
        cores=described["cores"],
        usable_cores=usable_cores(),
        threads=described["threads"],
        instruction_sets=tuple(described["instruction_sets"]),
        has_bfloat16=has_bfloat16(device),
        has_fast_int8=has_fast_int8(device),
        device=str(device),
        gpu=described.get("gpu"),
        gpu_driver=_gpu_driver(),
        cuda=torch.version.cuda,
        cudnn_fault=explain_cudnn(device),
        dtype=str(dtype).removeprefix("torch."),
        kernels=os.environ.get(mode.ENVIRONMENT_VARIABLE, mode.AUTO),
        is_calibrated=_is_calibrated(dtype, device),
        memory_bytes=described["memory"],
        free_bytes=free_bytes(device),
        memory_limit_bytes=container_limit_bytes(),
        swap_bytes=psutil.swap_memory().used,
        load=described["load"],
        folders=read_folders(),
        models_dirs=models_dirs,
        absent_models_dirs=tuple(path for path in models_dirs if not os.path.exists(path)),
        extras={name: all(map(importlib.util.find_spec, modules)) for name, modules in EXTRAS.items()},
        environment={name: os.environ[name] for name in VARIABLES if name in os.environ},
    )


def _library_versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {}
    for name in LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def _is_calibrated(dtype: torch.dtype, device: torch.device) -> bool:
    try:
        return load_calibration(dtype, device) is not None
    except RequestError:  # KADR_KERNELS names no mode, which is a finding
        return False


def _models_dirs() -> tuple[str, ...]:
    try:
        return tuple(map(str, configured_dirs()))
    except RequestError:  # the config file is broken, which is a finding
        return ()


def _gpu_driver() -> str | None:
    """Returns the version of NVIDIA's driver; None where there is none, or it does not tell."""
    command = shutil.which("nvidia-smi")
    try:
        text = _run(command) if command else _DRIVER_FILE.read_text("utf-8", "replace")
    except (OSError, subprocess.SubprocessError):
        return None
    found = _DRIVER_VERSION.search(text)
    return found[1] if found else None


def _run(command: str) -> str:
    """Returns what nvidia-smi prints about the driver."""
    arguments = [command, *_DRIVER_COMMAND]
    return subprocess.run(
        arguments, capture_output=True, encoding="utf-8", errors="replace", timeout=_DRIVER_SECONDS
    ).stdout
