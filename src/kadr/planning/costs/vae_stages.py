"""Stages of the VAE encoder and decoder, and their parameter counts, from the config alone.

The stages are those of `models.vae`, in the order in which they run. Widths are channels; a position is one element of
the latent or pixel grid at which a stage works.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from kadr.models.vae.config import BlockConfig, Strides, VAEConfig
from kadr.planning.costs.parameters import ParameterCounts, time_embed_parameters

CONV_IN, CONV_OUT = "conv_in", "conv_out"  # first and last convolution; adaLN modulates the decoder's last one
RES_X, RES_X_Y = "res_x", "res_x_y"  # residual blocks; one residual block that changes the width
DEPTH_TO_SPACE, SPACE_TO_DEPTH, STRIDED_CONV = "depth_to_space", "space_to_depth", "strided_conv"
TAPS = 27  # kernel size of a 3 x 3 x 3 convolution


@dataclass(frozen=True, kw_only=True)
class VAEStage:
    """A stage of the VAE encoder or decoder.

    Args:
        kind: CONV_IN, RES_X, RES_X_Y, DEPTH_TO_SPACE, SPACE_TO_DEPTH, STRIDED_CONV or CONV_OUT.
        in_channels, out_channels: channels before and after.
        num_layers: residual blocks of a RES_X.
        strides: factors by which frames, rows and columns grow or shrink.
        timestep_conditioning: adaLN modulates the stage by the decode timestep.
        inject_noise: its residual blocks add noise.
        residual: a DEPTH_TO_SPACE adds its rearranged input to its output.
    """

    kind: str
    in_channels: int
    out_channels: int
    num_layers: int = 0
    strides: Strides = (1, 1, 1)
    timestep_conditioning: bool = False
    inject_noise: bool = False
    residual: bool = False

    @property
    def conv_channels(self) -> list[tuple[int, int]]:
        """Channels before and after every 3 x 3 x 3 convolution."""
        if self.kind == RES_X:
            return [(self.out_channels, self.out_channels)] * (2 * self.num_layers)
        if self.kind == RES_X_Y:
            return [(self.in_channels, self.out_channels), (self.out_channels, self.out_channels)]
        if self.kind == DEPTH_TO_SPACE:
            return [(self.in_channels, self.out_channels * prod(self.strides))]
        if self.kind == SPACE_TO_DEPTH:
            return [(self.in_channels, self.out_channels // prod(self.strides))]
        return [(self.in_channels, self.out_channels)]

    @property
    def parameters(self) -> int:
        """Parameter count of the stage."""
        count = sum((TAPS * before + 1) * after for before, after in self.conv_channels)
        blocks = 1 if self.kind == RES_X_Y else self.num_layers
        if self.kind == RES_X_Y:  # norm and 1 x 1 x 1 convolution of the skip path
            count += 2 * self.in_channels + (self.in_channels + 1) * self.out_channels
        if self.inject_noise:
            count += 2 * blocks * self.in_channels
        if self.timestep_conditioning and self.kind == RES_X:
            count += 4 * blocks * self.out_channels + time_embed_parameters(4 * self.out_channels)
        if self.timestep_conditioning and self.kind == CONV_OUT:  # and the scale of the timestep
            count += 2 * self.in_channels + time_embed_parameters(2 * self.in_channels) + 1
        return count


def encoder_stages(config: VAEConfig) -> list[VAEStage]:
    """Returns the encoder's stages: 3·p·p channels in, the latents' and one more out."""
    width = config.encoder_base_channels
    stages = [VAEStage(kind=CONV_IN, in_channels=3 * config.patch_size**2, out_channels=width)]
    for block in config.encoder_blocks:
        stages.append(_encoder_stage(block, width))
        width = stages[-1].out_channels
    return [*stages, VAEStage(kind=CONV_OUT, in_channels=width, out_channels=config.latent_channels + 1)]


def _encoder_stage(block: BlockConfig, width: int) -> VAEStage:
    if block.kind == "res_x":
        return VAEStage(kind=RES_X, in_channels=width, out_channels=width, num_layers=block.num_layers)
    if block.kind == "res_x_y":
        return VAEStage(kind=RES_X_Y, in_channels=width, out_channels=width * block.multiplier)
    if block.kind.endswith("_res"):
        return VAEStage(
            kind=SPACE_TO_DEPTH, in_channels=width, out_channels=width * block.multiplier, strides=block.strides
        )
    return VAEStage(kind=STRIDED_CONV, in_channels=width, out_channels=width, strides=block.strides)


def decoder_stages(config: VAEConfig) -> list[VAEStage]:
    """Returns the decoder's stages: 3·p·p channels out."""
    width, timestep_conditioning = config.decoder_start_channels, config.timestep_conditioning
    stages = [VAEStage(kind=CONV_IN, in_channels=config.latent_channels, out_channels=width)]
    for block in reversed(config.decoder_blocks):
        stages.append(_decoder_stage(block, width, timestep_conditioning))
        width = stages[-1].out_channels
    last = VAEStage(
        kind=CONV_OUT,
        in_channels=width,
        out_channels=3 * config.patch_size**2,
        timestep_conditioning=timestep_conditioning,
    )
    return [*stages, last]


def _decoder_stage(block: BlockConfig, width: int, timestep_conditioning: bool) -> VAEStage:
    noise = block.inject_noise
    if block.kind == "res_x":
        return VAEStage(
            kind=RES_X,
            in_channels=width,
            out_channels=width,
            num_layers=block.num_layers,
            timestep_conditioning=timestep_conditioning,
            inject_noise=noise,
        )
    if block.kind == "res_x_y":
        return VAEStage(kind=RES_X_Y, in_channels=width, out_channels=width // block.multiplier, inject_noise=noise)
    return _upsampling_stage(block, width)


def _upsampling_stage(block: BlockConfig, width: int) -> VAEStage:
    out_channels = width // (block.multiplier if block.kind == "compress_all" else 1)
    return VAEStage(
        kind=DEPTH_TO_SPACE,
        in_channels=width,
        out_channels=out_channels,
        strides=block.strides,
        residual=block.residual,
    )


def vae_encoder_parameters(config: VAEConfig) -> ParameterCounts:
    """Counts the VAE encoder."""
    return ParameterCounts(outside_blocks=sum(stage.parameters for stage in encoder_stages(config)))


def vae_decoder_parameters(config: VAEConfig) -> ParameterCounts:
    """Counts the VAE decoder."""
    return ParameterCounts(outside_blocks=sum(stage.parameters for stage in decoder_stages(config)))


def latent_statistics_parameters(config: VAEConfig) -> ParameterCounts:
    """Counts the latents' mean and standard deviation."""
    return ParameterCounts(outside_blocks=2 * config.latent_channels)
