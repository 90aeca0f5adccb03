"""Checks of a machine: what makes it slower than it could be, and what is worth knowing about it."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping

from kadr.diagnosis.finding import ERROR, NOTE, QUALITY, SPEED, Finding
from kadr.diagnosis.machine import Machine
from kadr.kernels import mode
from kadr.kernels.cpu import zen

GIB = 1 << 30
SMALL_LIMIT = 0.9  # of the machine's memory: a smaller limit of a container is said
SWAP_SHARE, BUSY_LOAD = 0.05, 1.5  # of the memory; load for each core, over which other programs take time
MIN_DISK_BYTES = 5 * GIB
# Environment variable -> what it does, for those that are for finding bugs and cost time.
DEBUG_VARIABLES: Mapping[str, str] = {
    "CUDA_LAUNCH_BLOCKING": "makes the CPU wait for every kernel of the GPU",
    "PYTORCH_NO_CUDA_MEMORY_CACHING": "makes torch ask the driver for every tensor's memory",
    "TRITON_INTERPRET": "runs the GPU's kernels in Python, thousands of times more slowly",
    "ATEN_CPU_CAPABILITY": "can keep torch from using this CPU's vector instructions",
    "ONEDNN_MAX_CPU_ISA": "can keep oneDNN from using this CPU's instructions",
    "DNNL_MAX_CPU_ISA": "can keep oneDNN from using this CPU's instructions",
    "ONEDNN_VERBOSE": "prints a line for every product",
    "DNNL_VERBOSE": "prints a line for every product",
    "MKL_VERBOSE": "prints a line for every product",
}
_OFF = ("", "0", "none")  # values with which they do nothing


def check_machine(machine: Machine) -> Iterator[Finding]:
    """Yields the findings about a machine."""
    for check in _CHECKS:
        yield from check(machine)


def _check_kernels(machine: Machine) -> Iterator[Finding]:
    name = mode.ENVIRONMENT_VARIABLE
    if machine.kernels not in mode.MODES:
        message = f"{name} is {machine.kernels}; it must be one of {', '.join(mode.MODES)}. No video can be made."
        yield Finding(ERROR, "kernels", message, f"unset {name}")
    elif machine.kernels != mode.AUTO:
        message = f"{name}={machine.kernels} is set: {mode.MODES[machine.kernels]}. Videos take longer."
        yield Finding(SPEED, "kernels", message, f"unset {name}")


def _check_debug_variables(machine: Machine) -> Iterator[Finding]:
    for name, effect in DEBUG_VARIABLES.items():
        value = machine.environment.get(name, "")
        if value.lower() not in _OFF:
            yield Finding(SPEED, "environment", f"{name}={value} is set, which {effect}.", f"unset {name}")


def _check_threads(machine: Machine) -> Iterator[Finding]:
    if machine.device != "cpu":
        return
    best = min(machine.cores, machine.usable_cores)
    variables = [name for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if name in machine.environment]
    if machine.threads < best:
        fix = f"unset {' '.join(variables)}" if variables else f"export OMP_NUM_THREADS={best}"
        message = f"torch computes with {machine.threads} of {best} cores."
        yield Finding(SPEED, "threads", message, fix)
    elif machine.threads > machine.usable_cores:
        message = (
            f"torch computes with {machine.threads} threads, but this process may use {machine.usable_cores} cores: "
            "the threads wait for each other."
        )
        yield Finding(SPEED, "threads", message, f"export OMP_NUM_THREADS={best}")


def _check_load(machine: Machine) -> Iterator[Finding]:
    if machine.load is not None and machine.load > BUSY_LOAD * machine.usable_cores:
        message = (
            f"other programs are busy: {machine.load:.1f} ran at once over the last minute, on "
            f"{machine.usable_cores} cores. Close them, or wait."
        )
        yield Finding(SPEED, "load", message)


def _check_gpu(machine: Machine) -> Iterator[Finding]:
    if machine.device != "cpu" or machine.gpu_driver is None:
        return
    driver = f"there is an NVIDIA GPU with driver {machine.gpu_driver}"
    if machine.cuda is None:
        message = f"{driver}, but torch {machine.versions.get('torch')} was built without CUDA, so the CPU computes."
        yield Finding(SPEED, "GPU", message, "pip install --force-reinstall torch")
    else:
        message = (
            f"{driver}, but torch does not see it: the driver may be too old for CUDA {machine.cuda}, or "
            "CUDA_VISIBLE_DEVICES hides it. The CPU computes."
        )
        yield Finding(SPEED, "GPU", message, "python -c 'import torch; torch.cuda.init()'")


def _check_cudnn(machine: Machine) -> Iterator[Finding]:
    message, _, fix = machine.cudnn_fault.partition(": ")
    if message:
        yield Finding(QUALITY, "cuDNN", f"{message}.", fix.rstrip("."))


def _check_units(machine: Machine) -> Iterator[Finding]:
    if not machine.has_bfloat16:
        message = (
            f"{machine.device} does not compute in bfloat16 itself: released models run in float32, in twice the "
            "memory and time."
        )
        yield Finding(SPEED, "dtype", message, "--quant int8" if machine.has_fast_int8 else "")
    if machine.device == "cpu" and machine.has_bfloat16 and zen.is_recommended(machine.cpu):
        message = f"attention takes about {zen.TIME_SHARE} of the time with AMD's zentorch, which is not installed."
        yield Finding(SPEED, "attention", message, f"pip install 'kadr[{zen.EXTRA}]'")
    if not machine.has_fast_int8:
        units = "VNNI" if machine.device == "cpu" else "int8 matmuls"
        message = f"{machine.device} has no {units}: --quant int8 saves memory here, and no time."
        yield Finding(NOTE, "int8", message)


def _check_memory(machine: Machine) -> Iterator[Finding]:
    limit = machine.memory_limit_bytes
    if limit is not None and limit < SMALL_LIMIT * machine.memory_bytes:
        message = (
            f"the container may use {limit / GIB:.1f} GiB of the machine's {machine.memory_bytes / GIB:.1f}: blocks "
            "may be streamed that would fit."
        )
        yield Finding(SPEED, "memory", message, f"docker run --memory {int(machine.memory_bytes * SMALL_LIMIT / GIB)}g")
    if machine.swap_bytes > SWAP_SHARE * machine.memory_bytes:
        message = (
            f"{machine.swap_bytes / GIB:.1f} GiB are swapped out: memory was full, and weights in swap are read from "
            "the disk again and again. Close other programs."
        )
        yield Finding(SPEED, "memory", message, "--offload blocks")


def _check_disks(machine: Machine) -> Iterator[Finding]:
    for folder in machine.folders:
        if folder.free_bytes < MIN_DISK_BYTES:
            message = f"the disk of {folder.path} has {folder.free_bytes / GIB:.1f} GiB free: a download may not fit."
            variable = "KADR_CACHE" if folder.name.startswith("kadr") else "HF_HOME"
            yield Finding(NOTE, "disk", message, f"export {variable}=/a/larger/disk")


def _check_models_dirs(machine: Machine) -> Iterator[Finding]:
    for path in machine.absent_models_dirs:
        message = f"the folder of models {path} does not exist: nothing is found in it."
        yield Finding(NOTE, "model folders", message, f"mkdir -p {shlex.quote(path)}")


def _check_calibration(machine: Machine) -> Iterator[Finding]:
    if not machine.is_calibrated:
        message = "this machine was not measured, so the times of plans are rough. Measuring takes about a minute."
        yield Finding(NOTE, "calibration", message, 'kadr plan "a prompt" --calibrate')


_CHECKS: tuple[Callable[[Machine], Iterator[Finding]], ...] = (
    _check_kernels,
    _check_debug_variables,
    _check_threads,
    _check_load,
    _check_gpu,
    _check_cudnn,
    _check_units,
    _check_memory,
    _check_disks,
    _check_models_dirs,
    _check_calibration,
)
