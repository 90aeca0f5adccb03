"""The VAE's operations around its convolutions, on channels that lie next to each other (channels_last_3d)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kadr.kernels.triton.common import device_of, inverse_rms, padded_row_size, warps_for

ELEMENTS_PER_PROGRAM = 4096  # of all positions that a program takes


@triton.jit
def _norm_modulate_silu(
    out,  # (B, F * H * W, C)
    x,
    scale,  # (B, C), None where nothing is bent
    shift,
    positions,
    x_sample,  # numbers from one sample, or from one position, to the next
    x_position,
    scale_sample,
    shift_sample,
    epsilon,
    ROW_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """A few positions of one sample."""
    sample = tl.program_id(1).to(tl.int64)
    position = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    channel = tl.arange(0, BLOCK)[None]
    inside = (position < positions) & (channel < ROW_SIZE)
    numbers = tl.load(x + sample * x_sample + position * x_position + channel, inside, 0.0).to(tl.float32)
    numbers *= inverse_rms(numbers, epsilon, ROW_SIZE)
    if scale is not None:
        bend = channel < ROW_SIZE
        numbers *= 1.0 + tl.load(scale + sample * scale_sample + channel, bend, 0.0).to(tl.float32)
        numbers += tl.load(shift + sample * shift_sample + channel, bend, 0.0).to(tl.float32)
    numbers *= tl.sigmoid(numbers)
    place = (sample * positions + position) * ROW_SIZE + channel
    tl.store(out + place, numbers.to(out.dtype.element_ty), inside)


@triton.jit
def _bias_residual(
    out,  # (B, F * H * W, C)
    x,
    bias,  # (C), or None
    skip,
    positions,
    x_sample,  # numbers from one sample, or from one position, to the next
    x_position,
    skip_sample,
    skip_position,
    ROW_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """A few positions of one sample."""
    sample = tl.program_id(1).to(tl.int64)
    position = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    channel = tl.arange(0, BLOCK)[None]
    inside = (position < positions) & (channel < ROW_SIZE)
    numbers = tl.load(x + sample * x_sample + position * x_position + channel, inside, 0.0).to(tl.float32)
    if bias is not None:
        numbers += tl.load(bias + channel, channel < ROW_SIZE, 0.0).to(tl.float32)
    numbers += tl.load(skip + sample * skip_sample + position * skip_position + channel, inside, 0.0).to(tl.float32)
    place = (sample * positions + position) * ROW_SIZE + channel
    tl.store(out + place, numbers.to(out.dtype.element_ty), inside)


def pixel_norm_modulate_silu(
    x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None, epsilon: float = 1e-8
) -> Tensor:
    """See `reference.pixel_norm_modulate_silu`. x must be laid out as `by_position` says."""
    made = torch.empty_like(x, memory_format=torch.channels_last_3d)
    bends = [0 if bend is None or len(bend) == 1 else bend.stride(0) for bend in (scale, shift)]
    grid, sizes = _launch_sizes(x)
    with device_of(x):
        _norm_modulate_silu[grid](made, x, scale, shift, x[0, 0].numel(), *_strides(x), *bends, epsilon, **sizes)
    return made


def bias_residual(x: Tensor, bias: Tensor | None, skip: Tensor) -> Tensor:
    """See `reference.bias_residual`. x and skip must be laid out as `by_position` says."""
    made = torch.empty_like(x, memory_format=torch.channels_last_3d)
    grid, sizes = _launch_sizes(x)
    with device_of(x):
        _bias_residual[grid](made, x, bias, skip, x[0, 0].numel(), *_strides(x), *_strides(skip), **sizes)
    return made


def _strides(x: Tensor) -> tuple[int, int]:
    """Numbers from sample to sample and from position to position of x (B, C, F, H, W)."""
    step = next((x.stride(axis) for axis in (4, 3, 2) if x.shape[axis] > 1), x.shape[1])
    return x.stride(0), step


def _launch_sizes(x: Tensor) -> tuple[tuple[int, int], dict[str, int]]:
    """The grid, and what the kernels must know when they are compiled."""
    samples, width = x.shape[:2]
    block = padded_row_size(width)
    rows = max(1, ELEMENTS_PER_PROGRAM // block)
    grid = (triton.cdiv(x[0, 0].numel(), rows), samples)
    return grid, {"ROW_SIZE": width, "BLOCK": block, "ROWS": rows, "num_warps": warps_for(rows * block)}
