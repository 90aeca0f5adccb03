"""Transforms of whole latents: AdaIN between passes, tone mapping before decoding."""

from __future__ import annotations

import torch
from torch import Tensor


def adain(latents: Tensor, reference: Tensor, factor: float = 1.0) -> Tensor:
    """Gives each channel of `latents` (B, C, f, h, w) the mean and std that it has in `reference` (B, C, f', h', w').

    Args:
        factor: 0 returns `latents`, 1 takes the statistics of `reference`; linear in between.

    Source: adain_filter_latent of ltx_video/pipelines/pipeline_ltx_video.py, with the unbiased standard deviation.
    """
    axes = (2, 3, 4)
    std, mean = torch.std_mean(latents, axes, keepdim=True)
    reference_std, reference_mean = torch.std_mean(reference, axes, keepdim=True)
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
