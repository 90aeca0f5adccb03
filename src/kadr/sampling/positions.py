"""Positions of latent tokens in time and space, as the transformer's rotary embedding (RoPE) takes them."""

from __future__ import annotations

import torch
from torch import Tensor

from kadr.shapes import SPATIAL_COMPRESSION, TEMPORAL_COMPRESSION, LatentGrid


def token_positions(grid: LatentGrid, *, fps: float, causal: bool, first_frame: int = 0) -> Tensor:
    """Returns the positions of a grid's tokens: fp32 (3, N) of seconds, pixels down and pixels right, top left corners.

    Args:
        fps: frames per second; it decides how fast objects move, so it must be the rate the video is shown at.
        causal: latent frame l is at its own first pixel frame, 0, 1, 9, 17, ... (0.9.5 on); else at 8l.
        first_frame: pixel frame at which the grid begins in the video; added after the causal shift.
    """
    frames = torch.arange(grid.frames, dtype=torch.float32) * TEMPORAL_COMPRESSION
    if causal:
        frames = (frames + 1 - TEMPORAL_COMPRESSION).clamp(min=0)
    seconds = (frames + first_frame) * (1.0 / fps)
    down = torch.arange(grid.height, dtype=torch.float32) * SPATIAL_COMPRESSION
    right = torch.arange(grid.width, dtype=torch.float32) * SPATIAL_COMPRESSION
    return torch.stack(torch.meshgrid(seconds, down, right, indexing="ij")).flatten(1)
