"""Tells errors that mean "this kernel does not support these inputs" from errors that say nothing about a kernel.

Does not load torch: the command line asks it of any error.
"""

from __future__ import annotations

from kadr.errors import KadrError

_TORCH_OOM = "OutOfMemoryError"
# Of torch, on CPUs, on Apple GPUs and on a GPU's libraries: cuBLAS, cuDNN and AMD's allocate memory besides torch.
_OOM_MESSAGES = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "STATUS_ALLOC_FAILED",
    "_ALLOCATION_FAILED",
    "rocblas_status_memory_error",
    "miopenStatusAllocFailed",
)
# CUDA errors after which every later call of the process fails too, whichever kernel caused them: cudaError_t 214, 220,
# 700, 702, 710 and 714 to 719. CUDA reports them late, at a call that may have nothing to do with them.
_FATAL_CUDA_MESSAGES = (
    "uncorrectable ECC error",
    "uncorrectable NVLink error",
    "illegal memory access",
    "launch timed out",
    "device-side assert",
    "hardware stack error",
    "illegal instruction",
    "misaligned address",
    "operation not supported on global/shared address space",
    "invalid program counter",
    "unspecified launch failure",
)
# OSError: a library that cannot be loaded. The rest are failed checks of arguments, by library.
_UNSUPPORTED_TYPES = (RuntimeError, ImportError, OSError, TypeError, ValueError, AssertionError)


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether an error says that memory ran out."""
    if isinstance(error, MemoryError) or any(kind.__name__ == _TORCH_OOM for kind in type(error).__mro__):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in _OOM_MESSAGES)


def is_fatal_cuda_error(error: BaseException) -> bool:
    """Returns whether a CUDA error left the process unable to use the GPU, so that no other kernel would help."""
    return isinstance(error, RuntimeError) and any(message in str(error) for message in _FATAL_CUDA_MESSAGES)


def is_unsupported(error: BaseException) -> bool:
    """Returns whether an error says that a kernel does not support its inputs, this GPU or this machine."""
    if isinstance(error, KadrError) or is_out_of_memory(error) or is_fatal_cuda_error(error):
        return False
    return isinstance(error, _UNSUPPORTED_TYPES)
