"""What kernels share that hold whole rows of numbers.

They compute in fp32, and count in 64 bits what may pass 2^31: offsets into a tensor. A row whose width is no power of
two is filled up with zeros, which no sum of squares and no largest magnitude notices.
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
# Numbers below 2^22 that are added to it lose their fraction, to the even side of a tie, as all fp32 sums do.
ROUNDING_MAGIC = tl.constexpr(1.5 * 2.0**23)
ELEMENTS_PER_WARP = 512  # 16 for each thread: enough to hide the wait for memory, few enough to stay in registers


@triton.jit
def inverse_rms(x, epsilon, ROW_SIZE: tl.constexpr):
    """1 over the root mean square of x (BLOCK) or of each row of x (ROWS, BLOCK), of which WIDTH numbers count."""
    return tl.rsqrt(tl.sum(x * x, axis=-1, keep_dims=True) / ROW_SIZE + epsilon)


@triton.jit
def quantize_row(x, code_dtype: tl.constexpr, MAX_CODE: tl.constexpr):
    """x (BLOCK) -> its codes, and what they are multiplied with; see `reference.quantize_rows`."""
    largest = tl.maximum(tl.max(tl.abs(x), axis=0), TL_MIN_ABS_MAX)
    largest += tl.sum(x * 0.0, axis=0)  # a maximum passes over what is no number; a scale must not
    scaled = x * tl.div_rn(tl.full((), MAX_CODE, tl.float32), largest)
    if code_dtype == tl.int8:
        scaled = (scaled + ROUNDING_MAGIC) - ROUNDING_MAGIC
    return scaled.to(code_dtype), tl.div_rn(largest, tl.full((), MAX_CODE, tl.float32))


def padded_row_size(width: int) -> int:
    """The power of two that a row of so many numbers is filled up to."""
    return triton.next_power_of_2(width)


def warps_for(elements: int) -> int:
    """How many warps share a program's numbers."""
    return min(16, max(1, elements // ELEMENTS_PER_WARP))


def broadcast_strides(tensor: Tensor | None) -> tuple[int, int]:
    """Numbers from sample to sample and from token to token of (B or 1, N or 1, D); 0 where all have the same."""
    if tensor is None:
        return 0, 0
    samples, tokens, _ = tensor.shape
    return tensor.stride(0) if samples > 1 else 0, tensor.stride(1) if tokens > 1 else 0


@contextmanager
def device_of(x: Tensor) -> Iterator[None]:
    """Kernels run on the current device: make it that of x."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            yield
    else:
        yield
