"""Trains the demo VAE, first on single frames, then on clips.

Single frames train the spatial layers at a fraction of a clip's cost; clips then train the temporal ones. The decoder
is trained like those of the family: on normalised latents with a little noise mixed in, conditioned on a timestep.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

import torch
from torch import Tensor, nn

from kadr.models.vae import VAE, BlockConfig, VAEConfig
from kadr.nn.timestep_embedding import TimestepEmbedding
from train.checkpointing import EMA, CurveLog, load_state, save_state
from train.optimizer import MuonAdamW, lr_multiplier
from train.scenes import Scene, render


def _block(kind: str, **detail: int | bool) -> BlockConfig:
    return BlockConfig(kind=kind, **detail)  # type: ignore[arg-type]


DEMO_VAE = VAEConfig(
    encoder_blocks=(
        _block("res_x", num_layers=1),
        _block("compress_time_res", multiplier=2),
        _block("res_x", num_layers=1),
        _block("compress_all_res", multiplier=2),
        _block("compress_all_res", multiplier=1),
        _block("res_x", num_layers=1),
    ),
    decoder_blocks=(
        _block("res_x", num_layers=2),
        _block("compress_time"),
        _block("res_x", num_layers=2),
        _block("compress_all", multiplier=2, residual=True),
        _block("res_x", num_layers=2),
        _block("compress_all", multiplier=2, residual=True),
        _block("res_x", num_layers=1),
    ),
    timestep_conditioning=True,
    patch_size=8,
    encoder_base_channels=32,
    decoder_base_channels=32,
)


@dataclass(frozen=True, kw_only=True)
class VAETrainingConfig:
    """Settings of the training of the VAE: `frame_steps` on single frames, then `clip_steps` on clips."""

    frame_steps: int = 600
    frame_batch_size: int = 16
    clip_steps: int = 1200
    clip_batch_size: int = 3
    clip_frames: tuple[int, ...] = (25, 17, 25, 9, 25)
    image_batch_size: int = 6  # single frames beside every batch of clips, so that images stay sharp
    muon_lr: float = 5e-3
    clip_lr_multiplier: float = 0.5  # factor of both learning rates while training on clips
    adamw_lr: float = 2e-3
    kl_weight: float = 1e-6
    max_decode_timestep: float = 0.1
    ema_decay: float = 0.995
    seed: int = 0


def initialise(vae: VAE) -> None:
    """Initialises every modulation to 0: the scale-shift tables and the last layer of each timestep embedding."""
    for module in vae.modules():
        if isinstance(module, TimestepEmbedding):
            nn.init.zeros_(module.linear_2.weight)
            nn.init.zeros_(module.linear_2.bias)
    for name, parameter in vae.named_parameters():
        if name.endswith("scale_shift_table"):
            nn.init.zeros_(parameter)


def draw_clips(rng: Random, batch_size: int, frames: int) -> Tensor:
    """Draws clips (batch_size, 3, frames, 128, 128) that begin at a random frame."""
    scenes = [Scene.sample(rng) for _ in range(batch_size)]
    return render(scenes, frames, first_frame=rng.randrange(25 - frames + 1))


def vae_loss(
    vae: VAE, pixels: Tensor, config: VAETrainingConfig, *, statistics_momentum: float
) -> tuple[Tensor, float]:
    """Returns the loss of one batch, and its PSNR in dB for pixels in [-1, 1]."""
    moments = vae.encode_moments(pixels)
    latents = moments.sample(torch.randn_like(moments.mean))
    _update_statistics(vae, moments.mean.detach().float(), statistics_momentum)
    timestep = torch.rand(len(pixels)) * config.max_decode_timestep
    noise_share = (timestep * torch.rand(len(pixels)))[:, None, None, None, None]
    normalised = vae.statistics.normalise(latents)
    noisy = (1 - noise_share) * normalised + noise_share * torch.randn_like(normalised)
    error = vae.decode(noisy, timestep=timestep) - pixels
    mse = error.square().mean()
    log_variance = moments.log_variance.clamp(-30, 20)
    kl = 0.5 * (moments.mean.square() + log_variance.exp() - 1 - log_variance).mean()
    loss = mse + 0.05 * error.abs().mean() + config.kl_weight * kl
    return loss, 10 * math.log10(4 / mse.item())


@torch.no_grad()
def _update_statistics(vae: VAE, mean: Tensor, momentum: float) -> None:
    """Updates the latent statistics, as moving averages, while the encoder changes."""
    axes = (0, 2, 3, 4)
    vae.statistics.mean.lerp_(mean.mean(axes), momentum)
    vae.statistics.std.lerp_(mean.std(axes), momentum)


def _batches(rng: Random, config: VAETrainingConfig, step: int) -> Iterator[Tensor]:
    if step < config.frame_steps:
        yield draw_clips(rng, config.frame_batch_size, 1)
        return
    frames = config.clip_frames[step % len(config.clip_frames)]
    yield draw_clips(rng, config.clip_batch_size, frames)
    yield draw_clips(rng, config.image_batch_size, 1)


def _lr_multiplier(config: VAETrainingConfig, step: int) -> float:
    if step < config.frame_steps:
        return lr_multiplier(step, config.frame_steps, warmup=20, decay=0.3)
    return config.clip_lr_multiplier * lr_multiplier(step - config.frame_steps, config.clip_steps, warmup=50, decay=0.5)


def _uses_muon(name: str) -> bool:
    return "scale_shift_table" not in name


def train(state_folder: Path, config: VAETrainingConfig = VAETrainingConfig()) -> VAE:
    """Trains, or resumes from `state_folder`/vae.pt; returns the EMA weights."""
    torch.manual_seed(config.seed)
    vae = VAE(DEMO_VAE)
    initialise(vae)
    ema = EMA(vae, config.ema_decay)
    optimizer = MuonAdamW(vae, uses_muon=_uses_muon, muon_lr=config.muon_lr, adamw_lr=config.adamw_lr)
    state_file = state_folder / "vae.pt"
    start_step = load_state(state_file, model=vae, ema=ema.model, optimizer=optimizer)
    log = CurveLog(state_folder / "vae.csv", ("step", "frames", "loss", "psnr", "seconds"))
    total = config.frame_steps + config.clip_steps
    print(f"vae: {sum(p.numel() for p in vae.parameters()) / 1e6:.2f} M parameters, {asdict(config)}", flush=True)
    start_time = time.monotonic()
    for step in range(start_step, total):
        rng = Random(config.seed * 1_000_003 + step)
        torch.manual_seed(config.seed * 1_000_003 + step)
        for pixels in _batches(rng, config, step):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss, psnr = vae_loss(vae, pixels, config, statistics_momentum=0.02 if step < total * 0.9 else 0.002)
            loss.backward()
            log.add(
                step=step, frames=pixels.shape[2], loss=loss.item(), psnr=psnr, seconds=time.monotonic() - start_time
            )
        optimizer.step(_lr_multiplier(config, step))
        ema.update(vae, step)
        if (step + 1) % 100 == 0 or step + 1 == total:
            save_state(state_file, step + 1, model=vae, ema=ema.model, optimizer=optimizer)
    return ema.model


def load_trained_vae(state_folder: Path) -> VAE:
    """Returns the VAE with the EMA weights of a finished training."""
    vae = VAE(DEMO_VAE)
    vae.load_state_dict(torch.load(state_folder / "vae.pt", weights_only=True)["ema"])
    return vae.eval()
