"""FLOPs of the VAE encoder and decoder."""

from __future__ import annotations

from collections.abc import Iterator

from kadr.models.vae.config import VAEConfig
from kadr.nn.timestep_embedding import SINUSOID_WIDTH
from kadr.planning.costs.vae_stages import (
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
    """Returns the FLOPs of encoding a video whose latents have `grid`."""
    return sum(stage_flops(*stage) for stage in encoder_stage_positions(config, grid))


def vae_decoder_flops(config: VAEConfig, grid: LatentGrid) -> int:
    """Returns the FLOPs of decoding: 54 times channels in, channels out and positions, and the timestep embeddings.

    See performance.md, B.2.
    """
    return sum(stage_flops(*stage) for stage in decoder_stage_positions(config, grid))


def encoder_stage_positions(config: VAEConfig, grid: LatentGrid) -> Iterator[tuple[VAEStage, int, int, int, int]]:
    """Yields the encoder's stages for a video whose latents have `grid`; see `_stage_positions`."""
    positions = (SPATIAL_COMPRESSION // config.patch_size) ** 2 * grid.height * grid.width
    return _stage_positions(encoder_stages(config), grid.video_frames, positions)


def decoder_stage_positions(config: VAEConfig, grid: LatentGrid) -> Iterator[tuple[VAEStage, int, int, int, int]]:
    """Yields the decoder's stages for latents of `grid`; see `_stage_positions`."""
    return _stage_positions(decoder_stages(config), grid.frames, grid.height * grid.width)


def _stage_positions(
    stages: list[VAEStage], frames: int, positions: int
) -> Iterator[tuple[VAEStage, int, int, int, int]]:
    """Yields each stage with frames and positions per frame of its input, and those of its convolutions' output."""
    for stage in stages:
        time, rows, columns = stage.strides
        if stage.kind == DEPTH_TO_SPACE:
            yield stage, frames, positions, frames, positions
            frames, positions = frames * time - (time - 1), positions * rows * columns
        elif stage.kind == SPACE_TO_DEPTH:  # folds after the convolution, and doubles the first frame before
            frames = frames + time - 1
            yield stage, frames, positions, frames, positions
            frames, positions = frames // time, positions // (rows * columns)
        else:
            output = (frames + time - 1) // time, positions // (rows * columns)
            yield stage, frames, positions, *output
            frames, positions = output


def stage_flops(stage: VAEStage, frames: int, positions: int, frames_out: int, positions_out: int) -> int:
    """Returns the FLOPs of one stage: convolutions, the 1 x 1 x 1 convolution of a skip path, timestep embedding."""
    channel_products = sum(before * after for before, after in stage.conv_channels)
    flops = 2 * TAPS * channel_products * frames_out * positions_out
    if stage.kind == RES_X_Y:
        flops += 2 * stage.in_channels * stage.out_channels * frames * positions
    if stage.timestep_conditioning:
        width = 4 * stage.out_channels if stage.kind == RES_X else 2 * stage.in_channels
        flops += 2 * (SINUSOID_WIDTH + width) * width
    return flops
