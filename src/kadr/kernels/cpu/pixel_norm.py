"""Norm, modulation and SiLU before a VAE convolution on CPUs, a few rows of frames at a time, which stay in cache.

Five operations over a whole video are as many passes over memory, and the norm's cast to float32 is two more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kadr.kernels import mode

PIXEL_NORM_SLICE_ELEMENTS = 2_097_152  # worked on at a time; measured
PIXEL_NORM_DTYPES = (torch.float32, torch.bfloat16)


def is_supported(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> bool:
    """Returns whether `pixel_norm_modulate_silu` can replace its definition for these inputs."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or not x.numel():
        return False
    if x.device.type != "cpu" or x.dtype not in PIXEL_NORM_DTYPES or mode.current() == mode.REFERENCE:
        return False
    return x.movedim(1, -1).is_contiguous() and (scale is None) == (shift is None)


def pixel_norm_modulate_silu(
    x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None, epsilon: float = 1e-8
) -> Tensor:
    """See `reference.pixel_norm_modulate_silu`. The mean square is in float32; scale and shift share one rounding."""
    channels_last = x.movedim(1, -1)
    output = torch.empty_like(channels_last)
    for sample, (rows, out) in enumerate(zip(channels_last.flatten(1, 2), output.flatten(1, 2), strict=True)):
        scale_shift = None
        if scale is not None and shift is not None:
            index = sample % len(scale)
            scale_shift = 1 + scale[index], shift[index]
        step = max(1, PIXEL_NORM_SLICE_ELEMENTS // rows[0].numel())
        for start in range(0, len(rows), step):
            _norm_modulate_silu_rows(rows[start : start + step], scale_shift, epsilon, out[start : start + step])
    return output.movedim(-1, 1)


def _norm_modulate_silu_rows(x: Tensor, scale_shift: tuple[Tensor, Tensor] | None, epsilon: float, out: Tensor) -> None:
    """Writes the result for x (rows, columns, C) into `out`."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    factor = norm.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_().to(x.dtype)
    y = torch.mul(x, factor)
    if scale_shift is not None:
        torch.addcmul(scale_shift[1], y, scale_shift[0], out=y)
    torch.ops.aten.silu.out(y, out=out)
