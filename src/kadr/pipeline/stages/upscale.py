"""Upscale stage between two passes: doubles the sides of the latents, or their frame rate."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from kadr.pipeline.finite_check import FiniteCheck
from kadr.pipeline.modules import Modules
from kadr.pipeline.progress import StageProgress, Watch
from kadr.pipeline.retry import retry_in_fp32, retry_on_oom
from kadr.sampling.latents import adain


def upscale_latents(modules: Modules, latents: Tensor, watch: Watch) -> Tensor:
    """Upscales latents for the second pass; AdaIN restores their statistics. Always in float32.

    Raises:
        PlanError: memory runs out; an upscaler has a single placement.
        NonFiniteError: an upscaler produced NaN or infinity.
    """
    upscale = retry_on_oom(modules, "upscale", partial(_upscale, modules, latents, watch))
    return retry_in_fp32(modules, "upscale", upscale)


def _upscale(modules: Modules, latents: Tensor, watch: Watch, _: torch.dtype | None) -> Tensor:
    with modules.latent_statistics() as vae:
        statistics = vae.statistics
        upscaled = statistics.denormalise(latents.float())
        kinds = modules.spec.upscalers(has_two_passes=True)
        progress, finite_check = StageProgress("upscale", len(kinds), watch), FiniteCheck.for_device(modules.device)
        for step, kind in enumerate(kinds, 1):
            with modules.upscaler(kind) as upscaler:
                upscaled = upscaler(upscaled)
            finite_check.check(upscaled, f"{kind} upscaler")
            progress.report(step)
        finite_check.synchronize()
        return adain(statistics.normalise(upscaled), latents)
