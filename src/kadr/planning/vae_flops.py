"""Floating-point operations of the VAE's encoder and decoder."""

from __future__ import annotations

from collections.abc import Iterator

from kadr.models.vae.config import VAEConfig
from kadr.nn.timestep_embedding import SINUSOID_WIDTH
from kadr.planning.vae_stages import (
    DEPTH_TO_SPACE,
    RES_X,
    RES_X_Y,
    SPACE_TO_DEPTH,
    TAPS,
    VAEStage,
    decoder_stages,
    encoder_stages,
)
from kadr.shapes import SPATIAL_COMPRESSION, LatentGrid


def vae_encoder_flops(config: VAEConfig, grid: LatentGrid) -> int:
    """To encode a video that becomes `grid`."""
    places = (SPATIAL_COMPRESSION // config.patch_size) ** 2 * grid.height * grid.width
    return sum(_stage_flops(*placed) for placed in _stage_positions(encoder_stages(config), grid.video_frames, places))


def vae_decoder_flops(config: VAEConfig, grid: LatentGrid) -> int:
    """To decode it: 54 times channels in, channels out and places (performance.md, B.2), and what embeds the level."""
    placed = _stage_positions(decoder_stages(config), grid.frames, grid.height * grid.width)
    return sum(_stage_flops(*each) for each in placed)


def _stage_positions(
    stages: list[VAEStage], frames: int, positions: int
) -> Iterator[tuple[VAEStage, int, int, int, int]]:
    """Each stage with the frames and the places per frame at which its convolutions begin, and those where they end."""
    for stage in stages:
        time, rows, columns = stage.strides
        if stage.kind == DEPTH_TO_SPACE:
            yield stage, frames, positions, frames, positions
            frames, positions = frames * time - (time - 1), positions * rows * columns
        elif stage.kind == SPACE_TO_DEPTH:  # it folds after the convolution, and doubles the first frame before
            frames = frames + time - 1
            yield stage, frames, positions, frames, positions
            frames, positions = frames // time, positions // (rows * columns)
        else:
            after = (frames + time - 1) // time, positions // (rows * columns)
            yield stage, frames, positions, *after
            frames, positions = after


def _stage_flops(stage: VAEStage, frames: int, positions: int, frames_out: int, positions_out: int) -> int:
    made = sum(2 * TAPS * before * after for before, after in stage.conv_channels) * frames_out * positions_out
    if stage.kind == RES_X_Y:
        made += 2 * stage.in_channels * stage.out_channels * frames * positions
    if stage.timestep_conditioning:
        width = 4 * stage.out_channels if stage.kind == RES_X else 2 * stage.in_channels
        made += 2 * (SINUSOID_WIDTH + width) * width
    return made
