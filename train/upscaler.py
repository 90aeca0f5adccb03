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
from train.checkpointing import EMA, CurveLog, load_state, save_state
from train.optimizer import MuonAdamW, lr_multiplier
from train.scenes import CLIP_FRAMES
from train.tuning import TuningConfig as Tuning
from train.tuning import encode_scenes, load_or_encode

DEMO_UPSCALER = UpscalerConfig(
    in_channels=128, mid_channels=96, num_blocks_per_stage=1, spatial_upsample=True, temporal_upsample=False
)


@dataclass(frozen=True, kw_only=True)
class UpscalerTrainingConfig:
    """What one training of the upscaler is."""

    steps: int = 700
    batch_size: int = 24
    muon_lr: float = 4e-3
    adamw_lr: float = 2e-3
    ema_decay: float = 0.99
    seed: int = 3


@torch.no_grad()
def _load_or_encode_pairs(state_folder: Path, vae: VAE, config: Tuning) -> tuple[Tensor, Tensor]:
    """Normalised latents of the same scenes at both sizes, (N, C, 4, 4, 4) and (N, C, 4, 8, 8), float16."""
    large_scenes, large = load_or_encode(state_folder, vae, config)[-2:]
    path = state_folder / "small.pt"
    if not path.exists():
        torch.save(encode_scenes(vae, large_scenes, CLIP_FRAMES, [0] * len(large_scenes)), path)
    return torch.load(path, weights_only=True), large


def train(state_folder: Path, vae: VAE, config: UpscalerTrainingConfig = UpscalerTrainingConfig()) -> LatentUpscaler:
    """Train, or go on from `state_folder`/upsampler.pt; returns the averaged weights."""
    torch.manual_seed(config.seed)
    small, large = _load_or_encode_pairs(state_folder, vae, Tuning())
    model = LatentUpscaler(DEMO_UPSCALER)
    average = EMA(model, config.ema_decay)
    optimizer = MuonAdamW(model, uses_muon=_uses_muon, muon_lr=config.muon_lr, adamw_lr=config.adamw_lr)
    parts = {"model": model, "average": average.model, "optimizer": optimizer}
    state = state_folder / "upsampler.pt"
    start = load_state(state, **parts)
    log = CurveLog(state_folder / "upsampler.csv", ("step", "loss", "seconds"), every=20)
    print(f"upsampler: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M, {asdict(config)}", flush=True)
    began = time.monotonic()
    for step in range(start, config.steps):
        rng = Random(config.seed * 1_000_003 + step)
        chosen = [rng.randrange(len(small)) for _ in range(config.batch_size)]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            made = model(vae.statistics.denormalise(small[chosen].float()))
        loss = (vae.statistics.normalise(made.float()) - large[chosen].float()).square().mean()
        loss.backward()
        optimizer.step(lr_multiplier(step, config.steps, warmup=20, decay=0.6))
        average.update(model, step)
        log.add(step=step, loss=loss.item(), seconds=time.monotonic() - began)
        if (step + 1) % 100 == 0 or step + 1 == config.steps:
            save_state(state, step + 1, **parts)
    return average.model


def _uses_muon(name: str) -> bool:
    return "norm" not in name
