"""The demo VAE: first single frames, then clips.

Frames teach the spatial layers at a fraction of a clip's cost; clips then teach time. The decoder is trained as the
family's: it is given latents with a little noise mixed in, in normalised space, and told how much.
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
from train.checkpointing import Average, Log, resume, save
from train.optimizer import Optimizer, share_of_rate
from train.scenes import Scene, render


def _block(kind: str, **detail: int | bool) -> BlockConfig:
    return BlockConfig(kind=kind, **detail)  # type: ignore[arg-type]


DEMO_VAE = VAEConfig(
    encoder_blocks=(
        _block("res_x", layers=1),
        _block("compress_time_res", multiplier=2),
        _block("res_x", layers=1),
        _block("compress_all_res", multiplier=2),
        _block("compress_all_res", multiplier=1),
        _block("res_x", layers=1),
    ),
    decoder_blocks=(
        _block("res_x", layers=2),
        _block("compress_time"),
        _block("res_x", layers=2),
        _block("compress_all", multiplier=2, residual=True),
        _block("res_x", layers=2),
        _block("compress_all", multiplier=2, residual=True),
        _block("res_x", layers=1),
    ),
    timestep_conditioning=True,
    patch_size=8,
    encoder_base_channels=32,
    decoder_base_channels=32,
)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What one training of the VAE is: `frame_steps` on single frames, then `clip_steps` on clips."""

    frame_steps: int = 600
    frame_batch: int = 16
    clip_steps: int = 1200
    clip_batch: int = 3
    clip_frames: tuple[int, ...] = (25, 17, 25, 9, 25)
    image_batch: int = 6  # single frames beside every clip batch, so that pictures stay sharp
    matrix_rate: float = 5e-3
    clip_rate: float = 0.5  # share of the rates in the clip stage
    other_rate: float = 2e-3
    kl_weight: float = 1e-6
    highest_level: float = 0.1
    average: float = 0.995
    seed: int = 0


def initialise(vae: VAE) -> None:
    """Start every modulation at nothing: tables and the last layer of each level embedding at zero."""
    for module in vae.modules():
        if isinstance(module, TimestepEmbedding):
            nn.init.zeros_(module.linear_2.weight)
            nn.init.zeros_(module.linear_2.bias)
    for name, parameter in vae.named_parameters():
        if name.endswith("modulation"):
            nn.init.zeros_(parameter)


def clips(rng: Random, batch: int, frames: int) -> Tensor:
    """(batch, 3, frames, 128, 128); single frames come from anywhere in their clip."""
    scenes = [Scene.sample(rng) for _ in range(batch)]
    return render(scenes, frames, first_frame=rng.randrange(25 - frames + 1))


def loss_of(vae: VAE, pixels: Tensor, recipe: Recipe, *, statistics_rate: float) -> tuple[Tensor, float]:
    """The loss of one batch, and its PSNR in dB against pixels in [-1, 1]."""
    moments = vae.encode_moments(pixels)
    latents = moments.sample(torch.randn_like(moments.mean))
    _follow(vae, moments.mean.detach().float(), statistics_rate)
    level = torch.rand(len(pixels)) * recipe.highest_level
    share = (level * torch.rand(len(pixels)))[:, None, None, None, None]
    normal = vae.statistics.normalise(latents)
    restored = vae.decode((1 - share) * normal + share * torch.randn_like(normal), timestep=level)
    error = restored - pixels
    squared = error.square().mean()
    variance = moments.log_variance.clamp(-30, 20)
    kl = 0.5 * (moments.mean.square() + variance.exp() - 1 - variance).mean()
    loss = squared + 0.05 * error.abs().mean() + recipe.kl_weight * kl
    return loss, 10 * math.log10(4 / squared.item())


@torch.no_grad()
def _follow(vae: VAE, mean: Tensor, rate: float) -> None:
    """Let the latent statistics follow the encoder while it changes."""
    axes = (0, 2, 3, 4)
    vae.statistics.mean.lerp_(mean.mean(axes), rate)
    vae.statistics.std.lerp_(mean.std(axes), rate)


def _batches(rng: Random, recipe: Recipe, step: int) -> Iterator[Tensor]:
    if step < recipe.frame_steps:
        yield clips(rng, recipe.frame_batch, 1)
        return
    frames = recipe.clip_frames[step % len(recipe.clip_frames)]
    yield clips(rng, recipe.clip_batch, frames)
    yield clips(rng, recipe.image_batch, 1)


def _share(recipe: Recipe, step: int) -> float:
    if step < recipe.frame_steps:
        return share_of_rate(step, recipe.frame_steps, warmup=20, decay=0.3)
    return recipe.clip_rate * share_of_rate(step - recipe.frame_steps, recipe.clip_steps, warmup=50, decay=0.5)


def _is_matrix(name: str) -> bool:
    return "modulation" not in name


def train(folder: Path, recipe: Recipe = Recipe()) -> VAE:
    """Train, or go on from `folder`/vae.pt; returns the averaged weights."""
    torch.manual_seed(recipe.seed)
    vae = VAE(DEMO_VAE)
    initialise(vae)
    average = Average(vae, recipe.average)
    optimizer = Optimizer(vae, is_matrix=_is_matrix, matrix_rate=recipe.matrix_rate, other_rate=recipe.other_rate)
    state = folder / "vae.pt"
    start = resume(state, model=vae, average=average.model, optimizer=optimizer)
    log = Log(folder / "vae.csv", ("step", "frames", "loss", "psnr", "seconds"))
    total = recipe.frame_steps + recipe.clip_steps
    print(f"vae: {sum(p.numel() for p in vae.parameters()) / 1e6:.2f} M parameters, {asdict(recipe)}", flush=True)
    began = time.monotonic()
    for step in range(start, total):
        rng = Random(recipe.seed * 1_000_003 + step)
        torch.manual_seed(recipe.seed * 1_000_003 + step)
        for pixels in _batches(rng, recipe, step):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss, psnr = loss_of(vae, pixels, recipe, statistics_rate=0.02 if step < total * 0.9 else 0.002)
            loss.backward()
            log.add(step=step, frames=pixels.shape[2], loss=loss.item(), psnr=psnr, seconds=time.monotonic() - began)
        optimizer.step(_share(recipe, step))
        average.update(vae, step)
        if (step + 1) % 100 == 0 or step + 1 == total:
            save(state, step + 1, model=vae, average=average.model, optimizer=optimizer)
    return average.model


def trained(folder: Path) -> VAE:
    """The averaged weights of a finished training."""
    vae = VAE(DEMO_VAE)
    vae.load_state_dict(torch.load(folder / "vae.pt", weights_only=True)["average"])
    return vae.eval()
