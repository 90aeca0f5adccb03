"""How a window is put behind the video that there is, without a jump of colours or of motion."""

from __future__ import annotations

import torch
from torch import Tensor

from kadr.sampling.latents import adain


def blend_window(
    window: Tensor, previous: Tensor, first_window: Tensor, *, overlap: int, adain_factor: float
) -> Tensor:
    """What a window adds to a video: latents (1, C, n - 1, h, w); the first `overlap` - 1 replace the video's last.

    Args:
        window: (1, C, n, h, w), the window as it was sampled. Its first latent stands for one frame, and is dropped.
        previous: the video so far, or as much of its end as overlaps: (1, C, `overlap` or more, h, w).
        first_window: the first window as it was sampled, whose means and deviations count.
        overlap: latent frames that the window has in common with the video, its first one among them.
        adain_factor: how far means and deviations are moved to those of the first window.

    Source: the extending sampler of ComfyUI-LTXVideo, by diffusers' LTXI2VLongMultiPromptPipeline.
    """
    added = window[:, :, 1:]
    if adain_factor:
        added = adain(added, first_window, adain_factor)
    shared = overlap - 1
    if not shared:
        return added
    old = torch.linspace(1, 0, shared + 2)[1:-1].to(added)[:, None, None]
    mixed = old * previous[:, :, -shared:] + (1 - old) * added[:, :, :shared]
    return torch.cat([mixed, added[:, :, shared:]], dim=2)
