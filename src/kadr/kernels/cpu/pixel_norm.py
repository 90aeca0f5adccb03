"""What comes before a convolution of the VAE, on a CPU: a few rows of pictures at a time, which stay in the cache.

Five passes over a video are as many trips to memory, and the norm's cast of all of it to float32 is two more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kadr.kernels import mode

PIXEL_NORM_SLICE_ELEMENTS = 2_097_152  # numbers at a time; measured
PIXEL_NORM_DTYPES = (torch.float32, torch.bfloat16)


def is_supported(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> bool:
    """Whether `pixel_norm_modulate_silu` may take the place of its definition."""
    if x.device.type != "cpu" or x.dtype not in PIXEL_NORM_DTYPES or mode.current() == mode.REFERENCE:
        return False
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not x.numel():
        return False
    return x.movedim(1, -1).is_contiguous() and (scale is None) == (shift is None)


def pixel_norm_modulate_silu(
    x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None, epsilon: float = 1e-8
) -> Tensor:
    """See `reference.pixel_norm_modulate_silu`. The mean of squares is in float32, and scale and shift one rounding."""
    last = x.movedim(1, -1)
    made = torch.empty_like(last)
    for sample, (given, out) in enumerate(zip(last.flatten(1, 2), made.flatten(1, 2), strict=True)):
        bend = None
        if scale is not None and shift is not None:
            row = sample % len(scale)
            bend = 1 + scale[row], shift[row]
        step = max(1, PIXEL_NORM_SLICE_ELEMENTS // given[0].numel())
        for start in range(0, len(given), step):
            _norm_modulate_silu_rows(given[start : start + step], bend, epsilon, out[start : start + step])
    return made.movedim(-1, 1)


def _norm_modulate_silu_rows(x: Tensor, scale_shift: tuple[Tensor, Tensor] | None, epsilon: float, out: Tensor) -> None:
    """x (rows, columns, C) -> out."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    factor = norm.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_().to(x.dtype)
    y = torch.mul(x, factor)
    if scale_shift is not None:
        torch.addcmul(scale_shift[1], y, scale_shift[0], out=y)
    torch.ops.aten.silu.out(y, out=out)
