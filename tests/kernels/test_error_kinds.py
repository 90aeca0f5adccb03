"""Errors are told apart: a kernel that supports its inputs not, a full memory, and a broken process."""

from __future__ import annotations

import pytest
import torch

from kadr.errors import Cancelled, RequestError
from kadr.kernels.error_kinds import is_fatal_cuda_error, is_out_of_memory, is_unsupported

CPU_OOM = "[enforce fail at alloc_cpu.cpp] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
ILLEGAL_ACCESS = "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be asynchronously ..."


@pytest.mark.parametrize(
    "error, is_oom",
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError(CPU_OOM), True),
        (RuntimeError("MPS backend out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), True),
        (RuntimeError("CUDA error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate(handle)`"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasLtMatmul(...)`"), False),
        (RuntimeError("shapes do not match"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_out_of_memory_errors_are_recognised(error: BaseException, is_oom: bool) -> None:
    assert is_out_of_memory(error) is is_oom
    assert not (is_oom and is_unsupported(error))


@pytest.mark.parametrize(
    "message", [ILLEGAL_ACCESS, "CUDA error: unspecified launch failure", "CUDA error: device-side assert triggered"]
)
def test_an_error_that_breaks_the_process_is_fatal(message: str) -> None:
    assert is_fatal_cuda_error(RuntimeError(message))
    assert not is_unsupported(RuntimeError(message))


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: no kernel image is available for execution on the device"),
        RuntimeError("No available kernel. Aborting execution."),
        NotImplementedError("Could not run 'aten::_scaled_mm'"),
        ImportError("undefined symbol"),
        OSError("libcudart.so.12: cannot open shared object file"),
        TypeError("unexpected keyword argument"),
        ValueError("head_dim must be a multiple of 8"),
        AssertionError(),
    ],
)
def test_errors_of_libraries_mean_unsupported(error: Exception) -> None:
    assert is_unsupported(error)
    assert not is_fatal_cuda_error(error)


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), SystemExit(), RequestError("no"), Cancelled("stop"), KeyError("a bug"), IndexError()]
)
def test_other_errors_say_nothing_about_a_kernel(error: BaseException) -> None:
    assert not is_unsupported(error)
