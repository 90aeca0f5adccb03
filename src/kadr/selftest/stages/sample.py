"""Sample: a short video by few steps is finite, not black, not flat, not noise, and its frames belong together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from kadr.request.request import Request
from kadr.selftest import figures
from kadr.selftest.result import Check, at_least, at_most
from kadr.selftest.subject import Subject

STEPS = 8  # for a recipe without sigmas of its own: enough for frames, if not for good ones
MIN_SAMPLE_STD, MAX_SAMPLE_STD = 0.3, 2.0  # of the normalised latents
MIN_CONTRAST = 0.02  # std of the pixels in [0, 1] within a frame; a flat colour has 0
MIN_BRIGHTNESS = 0.02  # mean of the brightest tenth of the pixels
MAX_HIGH_FREQUENCIES = 0.3  # white noise has 0.75, films under 0.1
MIN_FRAME_CORRELATION = 0.5  # of neighbouring frames: of noise 0, of films above 0.9


def check_sample(subject: Subject) -> Iterator[Check]:
    """Samples and decodes the fixed request."""
    request = _few_steps(subject)
    with subject.engine.start(request) as generation:
        latents = generation.denoise()
        frames = torch.cat(list(generation.decode(latents)))
    yield Check("std of the latents", float(latents.std()), MIN_SAMPLE_STD, MAX_SAMPLE_STD)
    pixels = frames.float().div(255).permute(0, 3, 1, 2)  # (F, 3, H, W)
    brightest = pixels.flatten().sort().values[-pixels.numel() // 10 :]
    yield at_least("brightness of the brightest tenth", float(brightest.mean()), MIN_BRIGHTNESS)
    yield at_least("contrast within a frame", float(pixels.std((1, 2, 3)).min()), MIN_CONTRAST)
    yield at_most("share of high frequencies", figures.high_frequency_share(pixels), MAX_HIGH_FREQUENCIES)
    yield at_least("correlation of neighbouring frames", _frame_correlation(pixels), MIN_FRAME_CORRELATION)


def _few_steps(subject: Subject) -> Request:
    recipe = subject.spec.recipe
    first = recipe.single_pass or recipe.first_pass
    return subject.request if first.sigmas else replace(subject.request, steps=STEPS)


def _frame_correlation(pixels: Tensor) -> float:
    """Returns the lowest correlation of two neighbouring frames, (F, C, H, W)."""
    return min(figures.correlation(a, b) for a, b in pairwise(pixels))
