"""Trains the demo spatial upscaler, from latents of a scene at 128 x 128 to those at 256 x 256.

Clips of the same scenes are encoded at both sizes. The upscaler works on latents that are not normalised, as the
released upscalers do; the loss is computed on normalised latents.
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
from train.tuning import TuningConfig, encode_scenes, load_or_encode

DEMO_UPSCALER = UpscalerConfig(
    in_channels=128, mid_channels=96, num_blocks_per_stage=1, spatial_upsample=True, temporal_upsample=False
)


@dataclass(frozen=True, kw_only=True)
class UpscalerTrainingConfig:
    """Settings of the training of the upscaler."""

    steps: int = 700
    batch_size: int = 24
    muon_lr: float = 4e-3
    adamw_lr: float = 2e-3
    ema_decay: float = 0.99
    seed: int = 3


@torch.no_grad()
def _load_or_encode_pairs(state_folder: Path, vae: VAE, config: TuningConfig) -> tuple[Tensor, Tensor]:
    """Returns normalised latents of the same scenes at both sizes, (N, C, 4, 4, 4) and (N, C, 4, 8, 8), float16."""
    large_scenes, large = load_or_encode(state_folder, vae, config)[-2:]
    path = state_folder / "small.pt"
    if not path.exists():
        torch.save(encode_scenes(vae, large_scenes, CLIP_FRAMES, [0] * len(large_scenes)), path)
    return torch.load(path, weights_only=True), large


def train(state_folder: Path, vae: VAE, config: UpscalerTrainingConfig = UpscalerTrainingConfig()) -> LatentUpscaler:
    """Trains, or resumes from `state_folder`/upscaler.pt; returns the EMA weights."""
    torch.manual_seed(config.seed)
    small, large = _load_or_encode_pairs(state_folder, vae, TuningConfig())
    model = LatentUpscaler(DEMO_UPSCALER)
    ema = EMA(model, config.ema_decay)
    optimizer = MuonAdamW(model, uses_muon=_uses_muon, muon_lr=config.muon_lr, adamw_lr=config.adamw_lr)
    checkpoint = {"model": model, "ema": ema.model, "optimizer": optimizer}
    state_file = state_folder / "upscaler.pt"
    start_step = load_state(state_file, **checkpoint)
    log = CurveLog(state_folder / "upscaler.csv", ("step", "loss", "seconds"), every=20)
    print(f"upscaler: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M, {asdict(config)}", flush=True)
    start_time = time.monotonic()
    for step in range(start_step, config.steps):
        rng = Random(config.seed * 1_000_003 + step)
        scene_indices = [rng.randrange(len(small)) for _ in range(config.batch_size)]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            upscaled = model(vae.statistics.denormalise(small[scene_indices].float()))
        loss = (vae.statistics.normalise(upscaled.float()) - large[scene_indices].float()).square().mean()
        loss.backward()
        optimizer.step(lr_multiplier(step, config.steps, warmup=20, decay=0.6))
        ema.update(model, step)
        log.add(step=step, loss=loss.item(), seconds=time.monotonic() - start_time)
        if (step + 1) % 100 == 0 or step + 1 == config.steps:
            save_state(state_file, step + 1, **checkpoint)
    return ema.model


def _uses_muon(name: str) -> bool:
    return "norm" not in name
