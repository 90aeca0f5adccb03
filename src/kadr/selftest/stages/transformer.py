"""Transformer: its velocity of noise, and of the drawn clip at several sigmas, beside the true one.

A rectified flow is trained to predict v = noise - x0 (reference: ltx-video.md, 12), so on a clip that the VAE encoded
the true velocity is known, and errors can be stated over its mean square: 1 is what predicting zero gives.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from kadr.quant.rotation import MIN_NOISE_CORRELATION
from kadr.quant.weight_formats import BITS_PER_WEIGHT
from kadr.selftest import figures
from kadr.selftest.result import Check, at_least, at_most
from kadr.selftest.subject import ClipDenoiser, Subject
from kadr.spec.weights import count_stored_types

# Largest error by sigma. With x0 of variance 1 the best multiple of the noisy latents gives 0.8 at 0.75 and 0.25, and
# 1 at 0.5. The demo has 0.03 to 0.07 and distilled 0.09 to 0.15. The losses published for models of this kind are 0.2
# to 0.4 on films, and plain shapes are easier; at 0.25 the noise must be told from detail, which is hard for any.
MAX_VELOCITY_ERRORS = {0.75: 0.5, 0.5: 0.5, 0.25: 0.7}
# Of the velocity of pure noise without a prompt: v = noise - x0 and x0 about as varied as the noise, or less.
MIN_VELOCITY_STD, MAX_VELOCITY_STD = 0.7, 2.5
MIN_SLOPE, MAX_SLOPE = 0.6, 1.4  # 1 for a base model; the distilled demo has 0.9
MIN_PROMPT_EFFECT = 0.005  # |v(prompt) - v(none)| over |v(none)|: bfloat16 alone gives less
MAX_PROMPT_RATIO = 1.05  # error with the prompt of the clip over that with another one, at `PROMPT_SIGMA`
PROMPT_SIGMA = 0.9
# Errors at sigma 0.5 of released weights, as recorded on a CPU in float32, and how far they may grow: weights in Q5_K
# have 1.09 times the demo's; those in fewer bits have 1.1 to 1.8 times, and are not compared. The errors of Lightricks'
# releases are unknown until somebody sends a report.
KNOWN_ERRORS: Mapping[str, float] = {"demo": 0.0405, "demo-distilled": 0.093}
MAX_GROWTH, MIN_BITS = 1.25, 5.4


def check_transformer(subject: Subject) -> Iterator[Check]:
    """Evaluates the transformer on noise and on the drawn clip, mixed with noise."""
    prompt, other, empty = subject.embeddings
    latents = subject.latents
    with subject.clip_denoiser() as model:
        yield from _check_noise(model, model.noise(latents), prompt, empty)
        for sigma, limit in MAX_VELOCITY_ERRORS.items():
            predicted, actual = model.predict_clip(sigma, prompt, latents)
            error = figures.error_ratio(predicted, actual)
            yield at_most(f"error at sigma {sigma}", error, limit)
            if sigma == 0.5:
                slope = figures.calibration_slope(predicted, actual)
                yield Check("slope of true over predicted velocity", slope, MIN_SLOPE, MAX_SLOPE)
                yield from _check_known_error(subject, error)
        matching, mismatched = (
            figures.error_ratio(*model.predict_clip(PROMPT_SIGMA, text, latents)) for text in (prompt, other)
        )
        yield at_most("error with its prompt over that with another", matching / mismatched, MAX_PROMPT_RATIO)


def _check_noise(model: ClipDenoiser, noise: Tensor, prompt: Tensor, empty: Tensor) -> Iterator[Check]:
    unconditional = model.predict(noise, 1.0, empty)
    tokens = noise[0].flatten(1).T
    yield at_least(
        "correlation of velocity and noise", figures.correlation(unconditional, tokens), MIN_NOISE_CORRELATION
    )
    yield Check("std of the velocity of noise", float(unconditional.std()), MIN_VELOCITY_STD, MAX_VELOCITY_STD)
    conditional = model.predict(noise, 1.0, prompt)
    effect = float((conditional - unconditional).norm() / unconditional.norm())
    yield at_least("effect of the prompt", effect, MIN_PROMPT_EFFECT)


def _check_known_error(subject: Subject, error: float) -> Iterator[Check]:
    release = subject.spec.release
    known = KNOWN_ERRORS.get(release.name) if release is not None else None
    formats = (subject.spec.quant, *count_stored_types(subject.spec.checkpoint.sources["transformer"]))
    bits = min(BITS_PER_WEIGHT.get(name, 32.0) for name in formats)
    if known is not None and release is not None and bits >= MIN_BITS:
        yield at_most(f"error over that recorded of {release.name}", error / known, MAX_GROWTH)
