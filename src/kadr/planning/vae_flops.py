"""Floating-point operations of the VAE's encoder and decoder."""

from __future__ import annotations

from collections.abc import Iterator

from kadr.models.vae.config import VAEConfig
from kadr.nn.timestep_embedding import SINUSOID_WIDTH
from kadr.planning.vae_stages import DOWN, LAYERS, TAPS, UP, WIDER, VAEStage, decoder_stages, encoder_stages
from kadr.shapes import SPATIAL_COMPRESSION, LatentGrid


def encoder_flops(config: VAEConfig, grid: LatentGrid) -> int:
    """To encode a video that becomes `grid`."""
    places = (SPATIAL_COMPRESSION // config.patch_size) ** 2 * grid.height * grid.width
    return sum(_stage_flops(*placed) for placed in _placed(encoder_stages(config), grid.video_frames, places))


def decoder_flops(config: VAEConfig, grid: LatentGrid) -> int:
    """To decode it: 54 times channels in, channels out and places (performance.md, B.2), and what embeds the level."""
    placed = _placed(decoder_stages(config), grid.frames, grid.height * grid.width)
    return sum(_stage_flops(*each) for each in placed)


def _placed(stages: list[VAEStage], frames: int, places: int) -> Iterator[tuple[VAEStage, int, int, int, int]]:
    """Each stage with the frames and the places per frame at which its convolutions begin, and those where they end."""
    for stage in stages:
        time, rows, columns = stage.strides
        if stage.kind == UP:
            yield stage, frames, places, frames, places
            frames, places = frames * time - (time - 1), places * rows * columns
        elif stage.kind == DOWN:  # it folds after the convolution, and doubles the first frame before
            frames = frames + time - 1
            yield stage, frames, places, frames, places
            frames, places = frames // time, places // (rows * columns)
        else:
            after = (frames + time - 1) // time, places // (rows * columns)
            yield stage, frames, places, *after
            frames, places = after


def _stage_flops(stage: VAEStage, frames: int, places: int, frames_out: int, places_out: int) -> int:
    made = sum(2 * TAPS * before * after for before, after in stage.convolutions) * frames_out * places_out
    if stage.kind == WIDER:
        made += 2 * stage.width_in * stage.width * frames * places
    if stage.level:
        width = 4 * stage.width if stage.kind == LAYERS else 2 * stage.width_in
        made += 2 * (SINUSOID_WIDTH + width) * width
    return made
