"""Transforms of whole latents: AdaIN between passes, tone mapping before decoding."""

from __future__ import annotations

import torch
from torch import Tensor

_POSITIONS = (2, 3, 4)  # axes of latents (B, C, f, h, w)


def adain(latents: Tensor, reference: Tensor, factor: float = 1.0) -> Tensor:
    """Gives each channel of `latents` (B, C, f, h, w) the mean and std that it has in `reference` (B, C, f', h', w').

    Where either has one position, f = h = w = 1, or a channel of `latents` is constant, there is no deviation to scale
    by, and the channel takes the mean alone.

    Args:
        factor: 0 returns `latents`, 1 takes the statistics of `reference`; linear in between.

    Source: adain_filter_latent of ltx_video/pipelines/pipeline_ltx_video.py, with the unbiased standard deviation. It
    divides by zero where kadr takes the mean alone.
    """
    if min(latents[0, 0].numel(), reference[0, 0].numel()) == 1:
        shifted = latents - latents.mean(_POSITIONS, keepdim=True) + reference.mean(_POSITIONS, keepdim=True)
        return torch.lerp(latents, shifted, factor)
    std, mean = torch.std_mean(latents, _POSITIONS, keepdim=True)
    reference_std, reference_mean = torch.std_mean(reference, _POSITIONS, keepdim=True)
    std = torch.where(std > 0, std, 1.0)  # of a constant channel, which stays constant
    normalized = (latents - mean) / std * reference_std + reference_mean
    return torch.lerp(latents, normalized, factor)


def tone_map(latents: Tensor, compression: float) -> Tensor:
    """Compresses the extremes of normalized latents.

    x -> x (1 - 0.8 s sigmoid(4 s (|x| - 1))) with s = 0.75 compression.

    Args:
        compression: in [0, 1]; 0 changes nothing.

    Source: tone_map_latents of ltx_video/pipelines/pipeline_ltx_video.py.
    """
    if not compression:
        return latents
    scale = 0.75 * compression
    return latents * (1 - 0.8 * scale * torch.sigmoid(4 * scale * (latents.abs() - 1)))
