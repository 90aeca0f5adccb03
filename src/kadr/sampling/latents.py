"""What is done to whole latents between passes and before they are decoded."""

from __future__ import annotations

import torch
from torch import Tensor


def adain(latents: Tensor, reference: Tensor, factor: float = 1.0) -> Tensor:
    """Give each channel of `latents` (B, C, f, h, w) the mean and deviation it has in `reference` (B, C, f', h', w').

    Args:
        factor: 0 leaves `latents`, 1 moves them all the way.

    Source: adain_filter_latent of ltx_video/pipelines/pipeline_ltx_video.py, with the unbiased deviation.
    """
    axes = (2, 3, 4)
    deviation, mean = torch.std_mean(latents, axes, keepdim=True)
    wanted_deviation, wanted_mean = torch.std_mean(reference, axes, keepdim=True)
    moved = (latents - mean) / deviation * wanted_deviation + wanted_mean
    return torch.lerp(latents, moved, factor)


def tone_map(latents: Tensor, compression: float) -> Tensor:
    """Press the extremes of normalised latents together.

    x -> x (1 - 0.8 s sigmoid(4 s (|x| - 1))) with s = 0.75 compression.

    Args:
        compression: in [0, 1]; 0 changes nothing.

    Source: tone_map_latents of ltx_video/pipelines/pipeline_ltx_video.py.
    """
    if not compression:
        return latents
    scale = 0.75 * compression
    return latents * (1 - 0.8 * scale * torch.sigmoid(4 * scale * (latents.abs() - 1)))
