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

SMALLEST = tl.constexpr(reference.SMALLEST)
# Numbers below 2^22 that are added to it lose their fraction, to the even side of a tie, as all fp32 sums do.
ROUNDER = tl.constexpr(1.5 * 2.0**23)
NUMBERS_PER_WARP = 512  # 16 for each thread: enough to hide the wait for memory, few enough to stay in registers


@triton.jit
def inverse_rms(x, epsilon, WIDTH: tl.constexpr):
    """1 over the root mean square of x (BLOCK) or of each row of x (ROWS, BLOCK), of which WIDTH numbers count."""
    return tl.rsqrt(tl.sum(x * x, axis=-1, keep_dims=True) / WIDTH + epsilon)


@triton.jit
def in_eight_bits(x, kind: tl.constexpr, LARGEST: tl.constexpr):
    """x (BLOCK) -> its codes, and what they are multiplied with; see `reference.quantize_rows`."""
    largest = tl.maximum(tl.max(tl.abs(x), axis=0), SMALLEST)
    largest += tl.sum(x * 0.0, axis=0)  # a maximum passes over what is no number; a scale must not
    scaled = x * tl.div_rn(tl.full((), LARGEST, tl.float32), largest)
    if kind == tl.int8:
        scaled = (scaled + ROUNDER) - ROUNDER
    return scaled.to(kind), tl.div_rn(largest, tl.full((), LARGEST, tl.float32))


def block_of(width: int) -> int:
    """The power of two that a row of so many numbers is filled up to."""
    return triton.next_power_of_2(width)


def warps_for(numbers: int) -> int:
    """How many warps share a program's numbers."""
    return min(16, max(1, numbers // NUMBERS_PER_WARP))


def steps(shared: Tensor | None) -> tuple[int, int]:
    """Numbers from sample to sample and from token to token of (B or 1, N or 1, D); 0 where all have the same."""
    if shared is None:
        return 0, 0
    samples, tokens, _ = shared.shape
    return shared.stride(0) if samples > 1 else 0, shared.stride(1) if tokens > 1 else 0


@contextmanager
def device_of(x: Tensor) -> Iterator[None]:
    """Kernels run on the current device: make it that of x."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            yield
    else:
        yield
