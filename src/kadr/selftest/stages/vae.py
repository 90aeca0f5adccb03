"""VAE: round trip of drawn clips, statistics of their latents, spectrum of what is decoded."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kadr.selftest import figures
from kadr.selftest.result import Check, at_least, at_most
from kadr.selftest.scene import COLOURS, draw_circle_clip
from kadr.selftest.subject import MAX_TEST_FRAMES, Subject
from kadr.shapes import Size

# The same for all models, and small: in a larger circle edges, where errors show, have a smaller share.
CLIP_SIZE = Size(128, 128)

# The demo's weak VAE leaves 0.07 to 0.09 of the variance of the clip (29 dB), LTX's about 0.01 (over 35 dB on plain
# shapes; 29 to 31 dB on films); a decoder with transposed pixel blocks leaves 0.2, with scrambled channels over 1.
MAX_RESIDUAL, MIN_PSNR = 0.15, 22.0
# A decoder may blur edges, not sharpen them: transposed pixel blocks have 4 times the clip's share of high frequencies,
# noise 100 times. Plain shapes alone have a share of 0.006.
MAX_SHARPENING, SHARPNESS_FLOOR = 3.0, 0.001
MAX_GRID = 3e-4  # white noise has 1e-3, scrambled channels 8e-3, the demo's clips 1e-6
# Over the training set normalised latents have mean 0 and std 1 in each channel. Drawn clips are not of that set: the
# demo's (which are) have a mean of 0.08 and stds of 0.8 to 1.3. Latents that are not normalised have, in the demo, a
# mean of 3 and stds of 8; with the statistics of other channels, of 2 and more.
MAX_MEAN_RMS, MIN_CHANNEL_STD, MAX_CHANNEL_STD = 1.0, 0.4, 2.0


def check_vae(subject: Subject) -> Iterator[Check]:
    """Encodes and decodes the drawn clip, and encodes it in other colours."""
    statistics = subject.engine.loader.load_latent_statistics().statistics
    yield at_least("smallest std of the statistics", float(statistics.std.min()), 1e-6)
    clips = [draw_circle_clip(CLIP_SIZE, MAX_TEST_FRAMES, colours) for colours in COLOURS]
    with subject.vae_encoder() as vae:
        latents = torch.cat([subject.encode(vae, clip) for clip in clips])
    means, stds = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))
    yield at_most("rms of the latents' channel means", float(means.square().mean().sqrt()), MAX_MEAN_RMS)
    yield Check("median std of the latents' channels", float(stds.median()), MIN_CHANNEL_STD, MAX_CHANNEL_STD)
    with subject.vae_decoder() as vae:
        decoded = subject.decode(vae, latents[:1])
    clip = clips[0]
    yield at_least("PSNR of the round trip in dB", figures.psnr(decoded, clip), MIN_PSNR)
    yield at_most("share of the variance lost", figures.residual_variance(decoded, clip), MAX_RESIDUAL)
    frames, drawn = decoded[0].transpose(0, 1), clip[0].transpose(0, 1)
    sharpness = max(SHARPNESS_FLOOR, figures.high_frequency_share(drawn))
    yield at_most(
        "high frequencies over those of the clip", figures.high_frequency_share(frames) / sharpness, MAX_SHARPENING
    )
    yield at_most("power on a grid of 2, 4 and 8 pixels", figures.grid_share(frames), MAX_GRID)
