"""Checks every kernel once against its definition, on the first inputs that it gets.

A kernel is compiled on the machine that it runs on, for a GPU that its author may never have had. So its definition
computes a corner of its first result too. A kernel that fails or differs is not used from then on, and gives a warning.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Hashable, Iterable
from functools import cache
from importlib import import_module
from typing import Any, TypeVar

import torch
from torch import Tensor

from kadr.errors import KadrError, KadrWarning
from kadr.kernels import mode
from kadr.kernels.error_kinds import is_fatal_cuda_error, is_out_of_memory

Result = TypeVar("Result")
Capability = tuple[int, int]
TRITON_MIN_CAPABILITY: Capability = (8, 0)  # Ampere, the first with bfloat16
NO_TRITON: Capability = (0, 0)
# The definition's roundings to bfloat16 move a twentieth of the fp8 codes by one step, which is an error of 0.015.
TRIAL_MAX_RELATIVE_ERROR = 0.05
CORNER_SIZE = 8  # elements compared at the end of each axis: errors in offsets show furthest in memory

_verdicts: dict[Hashable, Callable[..., Any] | None] = {}  # the kernel, or None where it was rejected


def run(module_name: str, definition: Callable[..., Result], *arguments: Any) -> Result:
    """Computes `definition` by the kernel of the same name, or by itself where that kernel was rejected.

    Args:
        module_name: the module of `kernels.triton` that has the kernel.
        arguments: a tensor first, then the other arguments of the definition, in order.
    """
    x, name = arguments[0], definition.__name__
    width = x.shape[1] if x.dim() == 5 else x.shape[-1]
    dtypes_or_values = tuple(argument.dtype if isinstance(argument, Tensor) else argument for argument in arguments)
    key = (name, x.device, width, dtypes_or_values)
    if key in _verdicts:
        return (_verdicts[key] or definition)(*arguments)
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return definition(*arguments)  # nothing can be compared during a capture
    return _try_kernel(module_name, definition, arguments, key)


def should_use_kernel(tensors: Iterable[Tensor | None], min_capability: Capability = TRITON_MIN_CAPABILITY) -> bool:
    """Returns whether a kernel should run on these: the mode and their device allow it and no gradient is needed.

    Code under torch.compile keeps the definitions, which the compiler fuses by itself.
    """
    present = [tensor for tensor in tensors if tensor is not None]
    if torch.compiler.is_compiling() or mode.current() == mode.REFERENCE:
        return False
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in present):
        return False
    if any(tensor.device != present[0].device for tensor in present):
        return False
    return mode.current() == mode.EVERYWHERE or is_supported(present[0].device, min_capability)


def may_use_kernel(x: Tensor) -> bool:
    """Returns whether a kernel could run on x at all: a cheap first check."""
    return not torch.compiler.is_compiling() and (x.is_cuda or mode.current() == mode.EVERYWHERE)


def is_supported(device: torch.device, min_capability: Capability = TRITON_MIN_CAPABILITY) -> bool:
    """Returns whether kernels of this capability support a device.

    The numbers of AMD's GPUs mean other things than NVIDIA's: there, kernels run that need no more than the first
    capability, and none in 8-bit floats, which few of them have in this encoding.
    """
    if device.type != "cuda":
        return False
    if torch.version.hip is not None:
        return min_capability <= TRITON_MIN_CAPABILITY and _capability(device) > NO_TRITON
    return _capability(device) >= min_capability


def reset() -> None:
    """Clears the verdicts, so that every kernel is checked again."""
    _verdicts.clear()


@cache
def _capability(device: torch.device) -> Capability:
    """Returns the compute capability of a CUDA device; `NO_TRITON` where triton is not installed."""
    return torch.cuda.get_device_capability(device) if importlib.util.find_spec("triton") else NO_TRITON


def _try_kernel(
    module_name: str, definition: Callable[..., Result], arguments: tuple[Any, ...], key: Hashable
) -> Result:
    """Runs a kernel for the first time, and its definition beside it on a corner of the inputs.

    The whole definition may take many times the memory of the kernel, which is all that was planned for.
    """
    try:
        kernel = getattr(import_module(f"kadr.kernels.triton.{module_name}"), definition.__name__)
        output = kernel(*arguments)
        corner = (_corner(value).clone() if isinstance(value, Tensor) else value for value in arguments)
        error = _relative_error(output, definition(*corner), arguments[0].shape)
    except Exception as failure:  # compilers, linkers and drivers raise their own types
        if isinstance(failure, KadrError) or is_fatal_cuda_error(failure):
            raise
        if not is_out_of_memory(failure):
            return _reject_kernel(key, definition, arguments, f"it fails with {type(failure).__name__}: {failure}")
        error = None  # which says nothing about the kernel
    if error is None:
        return definition(*arguments)
    if error > TRIAL_MAX_RELATIVE_ERROR:
        return _reject_kernel(key, definition, arguments, f"its result is {100 * error:.1f} % off")
    _verdicts[key] = kernel
    return output


def _reject_kernel(key: Hashable, definition: Callable[..., Result], arguments: tuple[Any, ...], reason: str) -> Result:
    _verdicts[key] = None
    warnings.warn(
        f"the kernel {definition.__name__} is not used on {arguments[0].device}: {reason}. Plain torch computes the "
        f"same, only slower. {mode.ENVIRONMENT_VARIABLE}={mode.REFERENCE} turns off all kernels, and this warning.",
        KadrWarning,
        stacklevel=4,
    )
    return definition(*arguments)


def _relative_error(output: Any, expected: Any, shape: torch.Size) -> float | None:
    """Returns the largest relative error of a kernel's output tensors; None where an expected one is not finite.

    Args:
        output: tensor or tensors of the whole, from inputs of this shape. One axis, that of the rows, may differ.
        expected: the corner of each, by the definition.
    """
    errors = []
    for actual, correct in zip(*map(_as_tuple, (output, expected)), strict=True):
        axis, wide = _row_axis(correct), correct.float()
        whole_shape = (*shape[:axis], correct.shape[axis], *shape[axis + 1 :])
        if actual.dtype != correct.dtype or actual.shape != whole_shape:
            return float("inf")
        if not bool(wide.isfinite().all()):
            return None
        error = float((_corner(actual).float() - wide).norm() / wide.norm().clamp_min(1e-30))
        errors.append(float("inf") if error != error else error)
    return max(errors)


def _as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else outputs


def _corner(x: Tensor) -> Tensor:
    """Returns the end of x along every axis but those of its rows."""
    row_axes = (2, 3) if x.dim() == 4 else (_row_axis(x),)  # of RoPE's rotations (B, N, D / 2, 2)
    return x[tuple(slice(None) if axis in row_axes else slice(-CORNER_SIZE, None) for axis in range(x.dim()))]


def _row_axis(x: Tensor) -> int:
    """Returns the axis of channels of a video (B, C, F, H, W), and the last of anything else."""
    return 1 if x.dim() == 5 else x.dim() - 1
