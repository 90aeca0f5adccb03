"""Converts the decoder's output to frames: denormalize, resize, crop, uint8."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kadr.errors import MediaError
from kadr.shapes import Size


def denormalize(pixels: torch.Tensor) -> torch.Tensor:
    """Maps decoded pixels in [-1, 1], of any shape, to [0, 1]; values outside are clamped.

    Source: VaeImageProcessor.postprocess of diffusers, in the dtype of `pixels` as there.
    """
    return (pixels * 0.5 + 0.5).clamp(0, 1)


def resize_frames(pixels: torch.Tensor, size: Size) -> torch.Tensor:
    """Resizes frames (3, F, H, W) to `size` by bilinear interpolation; frames of that size stay unchanged.

    Source: the end of LTXMultiScalePipeline.__call__ of the official package, whose second pass seldom has the
    requested size. It resizes after the clamp.
    """
    if pixels.shape[-2:] == (size.height, size.width):
        return pixels
    frames = pixels.transpose(0, 1)
    resized = F.interpolate(frames, size=(size.height, size.width), mode="bilinear", align_corners=False)
    return resized.transpose(0, 1)


def to_uint8(pixels: torch.Tensor) -> torch.Tensor:
    """Converts float (3, F, H, W) in [0, 1] to uint8 (F, H, W, 3) on the same device: RGB, full range.

    Source: the end of ltx_video/inference.py. As there, the scaling to 255 happens in float32, so bfloat16 pixels round
    twice.
    """
    # The cast truncates: 254.9 becomes 254. Rounding would be kinder and would not match the official frames.
    return (pixels.float() * 255).to(torch.uint8).permute(1, 2, 3, 0).contiguous()


def to_float(pixels: torch.Tensor) -> torch.Tensor:
    """Converts float (3, F, H, W) in [0, 1] to float32 (F, H, W, 3) on the same device."""
    return pixels.float().permute(1, 2, 3, 0).contiguous()


def crop_margins(pixels: torch.Tensor, size: Size) -> torch.Tensor:
    """Crops the padding that made both sides multiples of 32.

    Args:
        pixels: (..., H, W) of any dtype, made at `size.snap()`.
        size: as requested.

    Returns:
        A view (..., size.height, size.width).

    Raises:
        MediaError: `pixels` were not made at `size.snap()`.
    """
    height, width = pixels.shape[-2:]
    padded_size = size.snap()
    if (width, height) != (padded_size.width, padded_size.height):
        raise MediaError(f"frames are {width}x{height}; a video of {size} is made at {padded_size} and then cropped.")
    left, _, top, _ = size.padding()
    return pixels[..., top : top + size.height, left : left + size.width]
