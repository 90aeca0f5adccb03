"""Helpers of the kernels that keep whole rows in registers.

They compute in fp32, and use 64 bits for offsets into a tensor, which may exceed 2^31. A row whose width is not a power
of two is padded with zeros, which change neither a sum of squares nor the abs_max magnitude.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import triton
import triton.language as tl
from torch import Tensor

from kadr.kernels import reference

TL_MIN_ABS_MAX = tl.constexpr(reference.MIN_ABS_MAX)
# Adding it to a value below 2^22 rounds away the fraction, ties to even, as every fp32 sum rounds.
ROUNDING_MAGIC = tl.constexpr(1.5 * 2.0**23)
ELEMENTS_PER_WARP = 512  # 16 per thread: enough to hide memory latency, few enough to stay in registers


@triton.jit
def inverse_rms(x, epsilon, ROW_SIZE: tl.constexpr):
    """Returns 1 / rms of x (BLOCK), or of each row of x (ROWS, BLOCK), over its ROW_SIZE elements."""
    return tl.rsqrt(tl.sum(x * x, axis=-1, keep_dims=True) / ROW_SIZE + epsilon)


@triton.jit
def quantize_row(x, code_dtype: tl.constexpr, MAX_CODE: tl.constexpr):
    """Quantizes x (BLOCK) to codes and their scale; see `reference.quantize_rows`."""
    abs_max = tl.maximum(tl.max(tl.abs(x), axis=0), TL_MIN_ABS_MAX)
    abs_max += tl.sum(x * 0.0, axis=0)  # a maximum ignores NaN; a scale must not
    scaled = x * tl.div_rn(tl.full((), MAX_CODE, tl.float32), abs_max)
    if code_dtype == tl.int8:
        scaled = (scaled + ROUNDING_MAGIC) - ROUNDING_MAGIC
    return scaled.to(code_dtype), tl.div_rn(abs_max, tl.full((), MAX_CODE, tl.float32))


def padded_row_size(width: int) -> int:
    """Returns the power of two that a row of `width` elements is padded to."""
    return triton.next_power_of_2(width)


def warps_for(elements: int) -> int:
    """Returns the number of warps for a program of that many elements."""
    return min(16, max(1, elements // ELEMENTS_PER_WARP))


def broadcast_strides(tensor: Tensor | None) -> tuple[int, int]:
    """Returns the strides of samples and tokens of (B or 1, N or 1, D); 0 for an axis that is broadcast."""
    if tensor is None:
        return 0, 0
    samples, tokens, _ = tensor.shape
    return tensor.stride(0) if samples > 1 else 0, tensor.stride(1) if tokens > 1 else 0


@contextmanager
def device_of(x: Tensor) -> Iterator[None]:
    """Makes the device of x the current one, on which kernels run."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            yield
    else:
        yield
