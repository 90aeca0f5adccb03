"""Upscale stage between two passes: doubles the sides of the latents, or their frame rate."""

from __future__ import annotations

import torch
from torch import Tensor

from kadr.pipeline.components import Components
from kadr.pipeline.finite_check import FiniteCheck
from kadr.pipeline.progress import StageProgress, Watch
from kadr.sampling.latents import adain


def upscale_latents(components: Components, latents: Tensor, watch: Watch, _: torch.dtype | None) -> Tensor:
    """Upscales latents for the second pass; AdaIN restores their statistics. Always in float32."""
    with components.latent_statistics() as vae:
        statistics = vae.statistics
        upscaled = statistics.denormalise(latents.float())
        kinds = components.upscaler_checkpoints
        progress, finite_check = StageProgress("upscale", len(kinds), watch), FiniteCheck.for_device(components.device)
        for step, kind in enumerate(kinds, 1):
            with components.upscaler(kind) as upscaler:
                upscaled = upscaler(upscaled)
            finite_check.check(upscaled, f"{kind} upscaler")
            progress.report(step)
        finite_check.synchronize()
        return adain(statistics.normalise(upscaled), latents)
