"""Seconds of the VAE encoder and decoder, and of the upscalers."""

from __future__ import annotations

from kadr.models.upscaler import UpscalerConfig
from kadr.models.vae.config import VAEConfig
from kadr.planning.calibration.calibration import PLAIN_CONV, Calibration
from kadr.planning.costs.flops import upscaler_flops
from kadr.planning.costs.vae_flops import decoder_stage_positions, encoder_stage_positions, stage_flops
from kadr.planning.costs.vae_stages import STRIDED_CONV, VAEStage
from kadr.shapes import LatentGrid


def vae_encode_seconds(calibration: Calibration, config: VAEConfig, grid: LatentGrid, kernel: str) -> float:
    """Returns the seconds of encoding a video whose latents have `grid`.

    Args:
        kernel: of convolutions of stride 1; see `planning.calibration`.
    """
    return sum(_stage_seconds(calibration, kernel, *stage) for stage in encoder_stage_positions(config, grid))


def vae_decode_seconds(calibration: Calibration, config: VAEConfig, grid: LatentGrid, kernel: str) -> float:
    """Returns the seconds of decoding latents of `grid`. Arguments as for `vae_encode_seconds`."""
    return sum(_stage_seconds(calibration, kernel, *stage) for stage in decoder_stage_positions(config, grid))


def upscale_seconds(calibration: Calibration, config: UpscalerConfig, grid: LatentGrid) -> float:
    """Returns the seconds of upscaling latents of `grid`."""
    positions = grid.height * grid.width * config.scale_factors[1] ** 2
    flops = upscaler_flops(config, grid)
    return calibration.conv_seconds(flops, kernel=PLAIN_CONV, channels=config.mid_channels, positions=positions)


def _stage_seconds(
    calibration: Calibration,
    kernel: str,
    stage: VAEStage,
    frames: int,
    positions: int,
    frames_out: int,
    positions_out: int,
) -> float:
    flops = stage_flops(stage, frames, positions, frames_out, positions_out)
    channels = round(max((before * after) ** 0.5 for before, after in stage.conv_channels))
    kernel = PLAIN_CONV if stage.kind == STRIDED_CONV else kernel
    return calibration.conv_seconds(flops, kernel=kernel, channels=channels, positions=positions_out)
