"""Upscaler: the upscaled latents of a clip look like those of the clip drawn larger."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from kadr.memory.device import move_module
from kadr.selftest import figures
from kadr.selftest.result import Check, NotRun, at_least, none_of
from kadr.selftest.stages.weights import released_upscalers
from kadr.selftest.subject import Subject
from kadr.spec.model import SPATIAL_UPSCALER

# The demo's has 0.9; random weights have 0.
MIN_CORRELATION = 0.5


def check_upscaler(subject: Subject) -> Iterator[Check]:
    """Upscales the latents of the drawn clip and compares them, reduced again, with those that went in."""
    kinds = released_upscalers(subject)
    if not kinds:
        raise NotRun("the model has no upscaler, or it is not on disk")
    statistics = subject.engine.loader.load_latent_statistics().to(subject.device).statistics
    latents = subject.latents.to(subject.device)
    for kind in kinds:
        upscaler = move_module(subject.engine.loader.load_upscaler(kind), subject.device)
        upscaled = statistics.normalise(upscaler(statistics.denormalise(latents)))
        yield none_of(
            f"{kind} upscaler: latents that are not finite", [] if bool(upscaled.isfinite().all()) else ["all"]
        )
        if kind == SPATIAL_UPSCALER:
            reduced = F.avg_pool3d(upscaled, (1, 2, 2))
        else:
            reduced = upscaled[:, :, ::2]
        similar = figures.correlation(reduced.cpu(), latents.cpu()) if torch.isfinite(reduced).all() else 0.0
        yield at_least(f"{kind} upscaler: correlation with its input", similar, MIN_CORRELATION)
