"""Blends a window of a long video into the video before it, without a jump in colour or motion."""

from __future__ import annotations

import torch
from torch import Tensor

from kadr.sampling.latents import adain


def blend_window(
    window: Tensor, previous: Tensor, first_window: Tensor, *, overlap: int, adain_factor: float
) -> Tensor:
    """Returns the latents (1, C, n - 1, h, w) that a window adds; the first `overlap` - 1 replace the video's last.

    Args:
        window: (1, C, n, h, w), the window as it was sampled. Its first latent stands for one frame, and is dropped.
        previous: the video so far, or at least the overlapping part of its end: (1, C, `overlap` or more, h, w).
        first_window: the first window as it was sampled, the reference of AdaIN.
        overlap: latent frames that the window shares with the video, its first one among them.
        adain_factor: 0 keeps the window's channel statistics, 1 gives it those of the first window.

    Source: the extending sampler of ComfyUI-LTXVideo, by diffusers' LTXI2VLongMultiPromptPipeline.
    """
    added = window[:, :, 1:]
    if adain_factor:
        added = adain(added, first_window, adain_factor)
    return _cross_fade(previous, added, overlap - 1)


def _cross_fade(previous: Tensor, added: Tensor, shared: int) -> Tensor:
    """Fades from the last `shared` latents of `previous` to the first of `added`, and returns all of `added`."""
    if not shared:
        return added
    previous_weight = torch.linspace(1, 0, shared + 2)[1:-1].to(added)[:, None, None]
    blended = previous_weight * previous[:, :, -shared:] + (1 - previous_weight) * added[:, :, :shared]
    return torch.cat([blended, added[:, :, shared:]], dim=2)
