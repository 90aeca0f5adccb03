"""From the decoder's numbers to frames one can look at."""

from __future__ import annotations

import torch

from kadr.errors import MediaError
from kadr.shapes import Size


def to_uint8(pixels: torch.Tensor) -> torch.Tensor:
    """Turn decoded pixels into frames.

    Args:
        pixels: float (3, F, H, W) in [-1, 1]; values outside are clamped.

    Returns:
        uint8 (F, H, W, 3) on the same device: RGB, full range.

    Source: VaeImageProcessor.postprocess and the end of ltx_video/inference.py. As there, the shift to [0, 1] happens
    in the dtype of `pixels` and the scaling to 255 in float32, so bfloat16 pixels round twice.
    """
    unit = (pixels * 0.5 + 0.5).clamp(0, 1)
    # The cast truncates: 254.9 becomes 254. Rounding would be kinder and would not match the official frames.
    return (unit.float() * 255).to(torch.uint8).permute(1, 2, 3, 0).contiguous()


def crop_margins(pixels: torch.Tensor, size: Size) -> torch.Tensor:
    """Cut what was added to make both sides multiples of 32.

    Args:
        pixels: (..., H, W) of any dtype, made at `size.snapped()`.
        size: what was asked for.

    Returns:
        A view (..., size.height, size.width).

    Raises:
        MediaError: `pixels` were not made at `size.snapped()`.
    """
    height, width = pixels.shape[-2:]
    made = size.snapped()
    if (width, height) != (made.width, made.height):
        raise MediaError(f"frames are {width}x{height}; a video of {size} is made at {made} and then cropped.")
    left, _, top, _ = size.margins()
    return pixels[..., top : top + size.height, left : left + size.width]
