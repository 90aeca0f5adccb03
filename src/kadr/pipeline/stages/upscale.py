"""The stage between two passes: latents to twice their sides, or twice their rate."""

from __future__ import annotations

import torch
from torch import Tensor

from kadr.pipeline.components import Components
from kadr.pipeline.finite_check import FiniteCheck
from kadr.pipeline.progress import StageProgress, Watch
from kadr.sampling.latents import adain


def upscaled(components: Components, latents: Tensor, watch: Watch, _: torch.dtype | None) -> Tensor:
    """The latents at the size of the second pass, with the statistics they had before; in float32, always."""
    with components.latent_statistics() as vae:
        statistics = vae.statistics
        made = statistics.denormalise(latents.float())
        kinds = components.upscaler_checkpoints
        stage, watchman = StageProgress("upscale", len(kinds), watch), FiniteCheck.for_device(components.device)
        for done, kind in enumerate(kinds, 1):
            with components.upscaler(kind) as upscaler:
                made = upscaler(made)
            watchman.check(made, f"{kind} upscaler")
            stage.report(done)
        watchman.synchronize()
        return adain(statistics.normalise(made), latents)
