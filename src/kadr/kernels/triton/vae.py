"""The VAE's operations around its convolutions, for tensors with contiguous channels (channels_last_3d)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kadr.kernels.triton.common import device_of, inverse_rms, padded_row_size, warps_for

VAE_ELEMENTS_PER_PROGRAM = 4096


@triton.jit
def _norm_modulate_silu(
    out,  # (B, F * H * W, C)
    x,
    scale,  # (B, C), None without modulation
    shift,
    positions,
    x_sample,  # strides in elements, from sample to sample and from position to position
    x_position,
    scale_sample,
    shift_sample,
    epsilon,
    ROW_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Computes a few positions of one sample."""
    sample = tl.program_id(1).to(tl.int64)
    position = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    channel = tl.arange(0, BLOCK)[None]
    inside = (position < positions) & (channel < ROW_SIZE)
    values = tl.load(x + sample * x_sample + position * x_position + channel, inside, 0.0).to(tl.float32)
    values *= inverse_rms(values, epsilon, ROW_SIZE)
    if scale is not None:
        is_channel = channel < ROW_SIZE
        values *= 1.0 + tl.load(scale + sample * scale_sample + channel, is_channel, 0.0).to(tl.float32)
        values += tl.load(shift + sample * shift_sample + channel, is_channel, 0.0).to(tl.float32)
    values *= tl.sigmoid(values)
    offset = (sample * positions + position) * ROW_SIZE + channel
    tl.store(out + offset, values.to(out.dtype.element_ty), inside)


@triton.jit
def _bias_residual(
    out,  # (B, F * H * W, C)
    x,
    bias,  # (C), or None
    skip,
    positions,
    x_sample,  # strides in elements, from sample to sample and from position to position
    x_position,
    skip_sample,
    skip_position,
    ROW_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Computes a few positions of one sample."""
    sample = tl.program_id(1).to(tl.int64)
    position = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    channel = tl.arange(0, BLOCK)[None]
    inside = (position < positions) & (channel < ROW_SIZE)
    values = tl.load(x + sample * x_sample + position * x_position + channel, inside, 0.0).to(tl.float32)
    if bias is not None:
        values += tl.load(bias + channel, channel < ROW_SIZE, 0.0).to(tl.float32)
    values += tl.load(skip + sample * skip_sample + position * skip_position + channel, inside, 0.0).to(tl.float32)
    offset = (sample * positions + position) * ROW_SIZE + channel
    tl.store(out + offset, values.to(out.dtype.element_ty), inside)


def pixel_norm_modulate_silu(
    x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None, epsilon: float = 1e-8
) -> Tensor:
    """See `reference.pixel_norm_modulate_silu`. x needs contiguous channels and evenly spaced positions."""
    output = torch.empty_like(x, memory_format=torch.channels_last_3d)
    sample_strides = [0 if tensor is None or len(tensor) == 1 else tensor.stride(0) for tensor in (scale, shift)]
    grid, sizes = _launch_sizes(x)
    with device_of(x):
        _norm_modulate_silu[grid](
            output, x, scale, shift, x[0, 0].numel(), *_strides(x), *sample_strides, epsilon, **sizes
        )
    return output


def bias_residual(x: Tensor, bias: Tensor | None, skip: Tensor) -> Tensor:
    """See `reference.bias_residual`. x and skip: contiguous channels, evenly spaced positions."""
    output = torch.empty_like(x, memory_format=torch.channels_last_3d)
    grid, sizes = _launch_sizes(x)
    with device_of(x):
        _bias_residual[grid](output, x, bias, skip, x[0, 0].numel(), *_strides(x), *_strides(skip), **sizes)
    return output


def _strides(x: Tensor) -> tuple[int, int]:
    """Returns the strides of samples and of positions of x (B, C, F, H, W)."""
    position_stride = next((x.stride(axis) for axis in (4, 3, 2) if x.shape[axis] > 1), x.shape[1])
    return x.stride(0), position_stride


def _launch_sizes(x: Tensor) -> tuple[tuple[int, int], dict[str, int]]:
    """Returns the grid, and the compile-time constants of the kernels."""
    samples, width = x.shape[:2]
    block = padded_row_size(width)
    rows = max(1, VAE_ELEMENTS_PER_PROGRAM // block)
    grid = (triton.cdiv(x[0, 0].numel(), rows), samples)
    return grid, {"ROW_SIZE": width, "BLOCK": block, "ROWS": rows, "num_warps": warps_for(rows * block)}
