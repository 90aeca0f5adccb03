"""The demo spatial upscaler: latents of a scene at 128 x 128 to those at 256 x 256.

Single latent frames and whole clips of the same scenes, encoded at both sizes. It works on latents as the encoder gives
them, not normalised, as the released upscalers do; the loss is counted in normalised ones.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

import torch
from torch import Tensor

from kadr.models.upscaler import LatentUpscaler, UpscalerConfig
from kadr.models.vae import VAE
from train.checkpointing import Average, Log, resume, save
from train.optimizer import Optimizer, share_of_rate
from train.scenes import CLIP_FRAMES
from train.tuning import Recipe as Tuning
from train.tuning import encoded, worlds

DEMO_UPSAMPLER = UpscalerConfig(
    in_channels=128, mid_channels=96, num_blocks_per_stage=1, spatial_upsample=True, temporal_upsample=False
)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What one training of the upscaler is."""

    steps: int = 700
    batch: int = 24
    matrix_rate: float = 4e-3
    other_rate: float = 2e-3
    average: float = 0.99
    seed: int = 3


@torch.no_grad()
def _pairs(folder: Path, vae: VAE, recipe: Tuning) -> tuple[Tensor, Tensor]:
    """Normalised latents of the same scenes at both sizes, (N, C, 4, 4, 4) and (N, C, 4, 8, 8), float16."""
    large_scenes, large = worlds(folder, vae, recipe)[-2:]
    path = folder / "small.pt"
    if not path.exists():
        torch.save(encoded(vae, large_scenes, CLIP_FRAMES, [0] * len(large_scenes)), path)
    return torch.load(path, weights_only=True), large


def train(folder: Path, vae: VAE, recipe: Recipe = Recipe()) -> LatentUpscaler:
    """Train, or go on from `folder`/upsampler.pt; returns the averaged weights."""
    torch.manual_seed(recipe.seed)
    small, large = _pairs(folder, vae, Tuning())
    model = LatentUpscaler(DEMO_UPSAMPLER)
    average = Average(model, recipe.average)
    optimizer = Optimizer(model, is_matrix=_is_matrix, matrix_rate=recipe.matrix_rate, other_rate=recipe.other_rate)
    parts = {"model": model, "average": average.model, "optimizer": optimizer}
    state = folder / "upsampler.pt"
    start = resume(state, **parts)
    log = Log(folder / "upsampler.csv", ("step", "loss", "seconds"), every=20)
    print(f"upsampler: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M, {asdict(recipe)}", flush=True)
    began = time.monotonic()
    for step in range(start, recipe.steps):
        rng = Random(recipe.seed * 1_000_003 + step)
        chosen = [rng.randrange(len(small)) for _ in range(recipe.batch)]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            made = model(vae.statistics.denormalise(small[chosen].float()))
        loss = (vae.statistics.normalise(made.float()) - large[chosen].float()).square().mean()
        loss.backward()
        optimizer.step(share_of_rate(step, recipe.steps, warmup=20, decay=0.6))
        average.update(model, step)
        log.add(step=step, loss=loss.item(), seconds=time.monotonic() - began)
        if (step + 1) % 100 == 0 or step + 1 == recipe.steps:
            save(state, step + 1, **parts)
    return average.model


def _is_matrix(name: str) -> bool:
    return "norm" not in name
