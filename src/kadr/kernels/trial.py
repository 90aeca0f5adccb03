"""Whether a kernel may stand in for its definition: asked of every kernel once, with the first numbers it is given.

A kernel is compiled on the machine it runs on, for a GPU its author may not have seen. So the first time, its
definition runs beside it. One that fails or differs is left alone from then on, with a warning.
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

from kadr.errors import KadrWarning
from kadr.kernels import mode

Result = TypeVar("Result")
Capability = tuple[int, int]
TRITON_MIN_CAPABILITY: Capability = (8, 0)  # the first with bfloat16, Ampere
TRIAL_MAX_RELATIVE_ERROR = (
    0.05  # relative; rounding to bfloat16 on the way moves a twentieth of fp8's codes by a step, 0.015 in all
)
CORNER_SIZE = 8  # from the end of each axis; the numbers that lie furthest in memory are the ones to compare

_verdicts: dict[Hashable, Callable[..., Any] | None] = {}  # the kernel, or None where it is not to be trusted


def run(module_name: str, definition: Callable[..., Result], *arguments: Any) -> Result:
    """What `definition` computes, by the kernel of the same name if that can be trusted.

    Args:
        module_name: the module of `kernels.triton` that has it.
        arguments: a tensor, and whatever else the definition takes, in its order.
    """
    x, name = arguments[0], definition.__name__
    width = x.shape[1] if x.dim() == 5 else x.shape[-1]
    kinds = tuple(argument.dtype if isinstance(argument, Tensor) else argument for argument in arguments)
    question = (name, x.device, width, kinds)
    if question in _verdicts:
        return (_verdicts[question] or definition)(*arguments)
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return definition(*arguments)  # a capture can compare nothing
    return _try_kernel(module_name, definition, arguments, question)


def should_use_kernel(tensors: Iterable[Tensor | None], min_capability: Capability = TRITON_MIN_CAPABILITY) -> bool:
    """Whether a kernel is to run on these: the switch allows it, their device can, and nobody asks for gradients.

    Code that is being compiled keeps the definitions, which the compiler fuses by itself.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    if mode.current() == mode.REFERENCE or torch.compiler.is_compiling():
        return False
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
        return False
    if any(tensor.device != given[0].device for tensor in given):
        return False
    return mode.current() == mode.EVERYWHERE or is_supported(given[0].device, min_capability)


def may_use_kernel(x: Tensor) -> bool:
    """Whether a kernel could run on x at all: asked first, for it is soon answered."""
    return x.is_cuda or mode.current() == mode.EVERYWHERE


def is_supported(device: torch.device, min_capability: Capability = TRITON_MIN_CAPABILITY) -> bool:
    """Whether a device is one that kernels are written for."""
    return device.type == "cuda" and _capability(device) >= min_capability


def reset() -> None:
    """Ask again of every kernel."""
    _verdicts.clear()


@cache
def _capability(device: torch.device) -> Capability:
    """Of a CUDA device; (0, 0) where triton is not installed, which stands for none."""
    return torch.cuda.get_device_capability(device) if importlib.util.find_spec("triton") else (0, 0)


def _try_kernel(
    module_name: str, definition: Callable[..., Result], arguments: tuple[Any, ...], key: Hashable
) -> Result:
    right = definition(*arguments)
    if any(right is argument for argument in arguments):  # it was told where to write; so will the kernel be
        right = right.clone()  # type: ignore[attr-defined]
    try:
        kernel = getattr(import_module(f"kadr.kernels.triton.{module_name}"), definition.__name__)
        made = kernel(*arguments)
        apart = _relative_error(made, right)
    except torch.OutOfMemoryError:
        return right  # both did not fit side by side: says nothing about the kernel
    except Exception as error:  # compilers, linkers and drivers fail in their own ways
        return _reject_kernel(key, definition, arguments, f"it fails with {type(error).__name__}: {error}")
    if apart is None:
        return right
    if apart > TRIAL_MAX_RELATIVE_ERROR:
        return _reject_kernel(key, definition, arguments, f"its result is {100 * apart:.1f} % off")
    _verdicts[key] = kernel
    return made


def _reject_kernel(key: Hashable, definition: Callable[..., Result], arguments: tuple[Any, ...], reason: str) -> Result:
    _verdicts[key] = None
    warnings.warn(
        f"the kernel {definition.__name__} is not used on {arguments[0].device}: {reason}. Plain torch computes the "
        f"same, only slower. {mode.ENVIRONMENT_VARIABLE}={mode.REFERENCE} leaves out all kernels, and this warning.",
        KadrWarning,
        stacklevel=4,
    )
    return definition(*arguments)


def _relative_error(output: Any, expected: Any) -> float | None:
    """The largest relative error of the tensors that came out; None where the right ones are no numbers themselves."""
    pairs = [(output, expected)] if isinstance(expected, Tensor) else list(zip(output, expected, strict=True))
    if any(one.shape != other.shape or one.dtype != other.dtype for one, other in pairs):
        return float("inf")
    errors = []
    for one, other in ((_corner(one), _corner(other)) for one, other in pairs):
        if not bool(other.isfinite().all()):
            return None
        error = float((one - other).norm() / other.norm().clamp_min(1e-30))
        errors.append(float("inf") if error != error else error)
    return max(errors)


def _corner(x: Tensor) -> Tensor:
    """The end of x along every axis but that of its rows, in fp32."""
    along = 1 if x.dim() == 5 else x.dim() - 1
    return x[tuple(slice(None) if axis == along else slice(-CORNER_SIZE, None) for axis in range(x.dim()))].float()
