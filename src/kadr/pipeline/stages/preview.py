"""Previews: a linear map from latents to small frames, fitted once per VAE, and applied to what a step predicts.

A latent cell becomes 8x8 pixels of a frame, one frame for each latent one: 704x480 is previewed at 176x120. The map is
the least-squares solution for clips that are drawn here and encoded by the VAE. Its decoder would not do: on random
latents it draws what no video looks like, and a map fitted to that is no better than a grey frame on the demo (13 dB,
where this one has 18 to 25).
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from kadr.cache_home import cache_home
from kadr.checkpoints.save import write_tensors
from kadr.checkpoints.source import Source
from kadr.errors import CheckpointError
from kadr.models.vae import VAE
from kadr.pipeline.loading.module_loader import ModuleLoader
from kadr.pipeline.progress import PREVIEW_STAGE, StageProgress, Watch, ignore_progress
from kadr.schema import PREVIEW_CACHE_NUMBER
from kadr.shapes import TEMPORAL_COMPRESSION, LatentGrid
from kadr.validation import expand_home

CELL = 8  # pixels of a preview for each latent cell, each way
PREVIEWS_FOLDER = "previews"
_NUM_CLIPS, _SIDE, _FRAMES = 24, 192, TEMPORAL_COMPRESSION + 1
_BATCH = 6  # clips at a time: oneDNN's convolutions want more than one
_RIDGE = 1e-2  # of the mean square of the inputs
_WEIGHTS_KEY = "weights"
_MIDDLE = 5  # of the 8 frames of a latent one, the one that a preview has


class PreviewMap:
    """A linear map from normalised latents to RGB.

    Args:
        weights: (C + 1, 8 * 8 * 3) fp32, on the CPU; the last row is for a constant 1.
    """

    def __init__(self, weights: Tensor) -> None:
        self.weights = weights

    def render(self, tokens: Tensor, grid: LatentGrid) -> np.ndarray:
        """Returns frames, uint8 (f, 8h, 8w, 3), from the tokens (N, C) of normalised latents (C, f, h, w)."""
        weights = self.weights.to(tokens.device)
        pixels = torch.addmm(weights[-1], tokens.float(), weights[:-1]).clamp(0, 1).mul(255).round().byte().cpu()
        blocks = pixels.view(grid.frames, grid.height, grid.width, CELL, CELL, 3).permute(0, 1, 3, 2, 4, 5)
        frames: np.ndarray = blocks.reshape(grid.frames, grid.height * CELL, grid.width * CELL, 3).numpy()
        return frames

    @classmethod
    @torch.no_grad()
    def fit(cls, vae: VAE, watch: Watch = ignore_progress) -> PreviewMap:
        """Fits the map to a VAE with its encoder, on the CPU in fp32: the same on every machine, up to rounding."""
        generator, inputs, targets = torch.Generator().manual_seed(0), [], []
        progress = StageProgress(PREVIEW_STAGE, _NUM_CLIPS, watch)
        for num_clips in range(_BATCH, _NUM_CLIPS + 1, _BATCH):
            clips = torch.stack([draw_clip(_SIDE, _FRAMES, generator) for _ in range(_BATCH)])
            latents = vae.encode(clips * 2 - 1)
            frames = clips[:, :, [0, *range(_MIDDLE, _FRAMES, TEMPORAL_COMPRESSION)]].transpose(1, 2).flatten(0, 1)
            small = adaptive_avg_pool2d(frames, tuple(side * CELL for side in latents.shape[3:]))
            blocks = small.unflatten(3, (-1, CELL)).unflatten(2, (-1, CELL)).permute(0, 2, 4, 3, 5, 1)
            inputs.append(latents.transpose(0, 1).flatten(1).T)  # (clips * f * h * w, C)
            targets.append(blocks.reshape(-1, CELL * CELL * 3))
            progress.report(num_clips)
        rows = torch.cat(inputs).double()
        rows = torch.cat([rows, torch.ones_like(rows[:, :1])], 1)
        gram = rows.T @ rows
        gram += _RIDGE * len(rows) * torch.eye(len(gram), dtype=gram.dtype)
        return cls(torch.linalg.solve(gram, rows.T @ torch.cat(targets).double()).float())


def draw_clip(side: int, frames: int, generator: torch.Generator) -> Tensor:
    """Draws a clip (3, F, side, side) in [0, 1]: shapes in plain colours over a cloudy texture, all panning slowly."""

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    down, right = torch.fft.fftfreq(side)[:, None], torch.fft.rfftfreq(side)[None]
    spectrum = torch.randn(3, side, side // 2 + 1, 2, generator=generator)
    falloff = ((down**2 + right**2).sqrt() + 1 / side) ** -1.5  # about that of photographs
    clouds = torch.fft.irfft2(torch.view_as_complex(spectrum) * falloff, s=(side, side))
    image = uniform(3, 1, 1) + 0.25 * float(uniform(1)) * clouds / clouds.std()
    y, x = torch.arange(side)[:, None], torch.arange(side)[None]
    for _ in range(int(6 * uniform(1))):
        top, left, radius = (float(value) * side for value in uniform(3))
        radius = 4 + 0.3 * radius
        is_disc = float(uniform(1)) < 0.5
        down_by, right_by = (y - top).abs(), (x - left).abs()
        distance = (down_by**2 + right_by**2).sqrt() if is_disc else down_by.maximum(right_by)
        inside = distance < radius
        image = torch.where(inside, uniform(3, 1, 1), image)
    speed = (int(7 * uniform(1)) - 3, int(7 * uniform(1)) - 3)
    pans = [image.roll((speed[0] * frame, speed[1] * frame), (1, 2)) for frame in range(frames)]
    return torch.stack(pans, 1).clamp(0, 1)


def open_preview_map(loader: ModuleLoader, location: bool | Path, watch: Watch = ignore_progress) -> PreviewMap:
    """Returns the map of a model's VAE, from the cache on disk, or fitted and stored there.

    Args:
        location: as `prompt_cache` of `Engine.open`: a folder; True for the usual one, False for none.
        watch: called with the progress of a fit.

    Raises:
        CheckpointError: the VAE cannot be read, or has no encoder.
    """
    path = _path(loader, location)
    if path is not None:
        shape = (loader.spec.transformer_config.in_channels + 1, CELL * CELL * 3)
        with suppress(OSError, CheckpointError, KeyError):
            weights = Source.open(path).read(_WEIGHTS_KEY).clone()
            if weights.shape == shape:
                return PreviewMap(weights)
    preview_map = PreviewMap.fit(loader.load_vae_encoder(torch.float32, keep_storage_dtype=False), watch)
    if path is not None:
        with suppress(OSError, CheckpointError):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_tensors(path, {_WEIGHTS_KEY: preview_map.weights}, dtype=torch.float32)
    return preview_map


def _path(loader: ModuleLoader, location: bool | Path) -> Path | None:
    """Returns the file of a VAE's map: its name depends on the files of the VAE, so that it is never out of date."""
    if location is False:
        return None
    try:
        folder = cache_home() if location is True else expand_home(location)
    except RuntimeError:  # no home directory
        return None
    source = loader.spec.vae_checkpoint.sources["vae"]
    stats = [(file.name, file.stat()) for file in sorted({info.file for info in source.infos.values()})]
    identity = [PREVIEW_CACHE_NUMBER, [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]]
    return folder / PREVIEWS_FOLDER / f"{hashlib.sha256(json.dumps(identity).encode()).hexdigest()}.safetensors"
