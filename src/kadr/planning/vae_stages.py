"""What the halves of a VAE consist of, stage by stage, from its config alone.

The stages are those of `models.vae`, in the order in which they run. Widths are channels; a place is a position of the
latents' or the pixels' grid at which a stage works.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from kadr.models.vae.config import BlockConfig, Strides, VAEConfig
from kadr.planning.parameters import ParameterCounts, time_embed_parameters

CONV_IN, CONV_OUT = "in", "out"  # the convolutions at both ends; the decoder's last one is bent by the noise level
RES_X, RES_X_Y = "residual layers", "residual layer that changes the width"
DEPTH_TO_SPACE, SPACE_TO_DEPTH, STRIDED_CONV = "up", "down", "strided"
TAPS = 27  # of a 3 x 3 x 3 convolution


@dataclass(frozen=True, kw_only=True)
class VAEStage:
    """One stage.

    Args:
        in_channels, out_channels: channels before and after.
        num_layers: residual layers.
        strides: by how much frames, rows and columns grow or shrink.
        timestep_conditioning: it is conditioned on the noise level.
        inject_noise: its residual layers add noise.
        residual: an UP adds its input to what it made.
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
        """Channels in and out of every 3 x 3 x 3 convolution."""
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
        """Numbers in its weights."""
        made = sum((TAPS * before + 1) * after for before, after in self.conv_channels)
        layers = 1 if self.kind == RES_X_Y else self.num_layers
        if self.kind == RES_X_Y:  # a norm and a 1 x 1 x 1 convolution beside them
            made += 2 * self.in_channels + (self.in_channels + 1) * self.out_channels
        if self.inject_noise:
            made += 2 * layers * self.in_channels
        if self.timestep_conditioning and self.kind == RES_X:
            made += 4 * layers * self.out_channels + time_embed_parameters(4 * self.out_channels)
        if self.timestep_conditioning and self.kind == CONV_OUT:  # and the scale of the level itself
            made += 2 * self.in_channels + time_embed_parameters(2 * self.in_channels) + 1
        return made


def encoder_stages(config: VAEConfig) -> list[VAEStage]:
    """From pixels to latents; 3·p·p channels enter, the latents' and one more leave."""
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
    """From latents to pixels; 3·p·p channels leave."""
    width, level = config.decoder_start_channels, config.timestep_conditioning
    stages = [VAEStage(kind=CONV_IN, in_channels=config.latent_channels, out_channels=width)]
    for block in reversed(config.decoder_blocks):
        stages.append(_decoder_stage(block, width, level))
        width = stages[-1].out_channels
    return [
        *stages,
        VAEStage(kind=CONV_OUT, in_channels=width, out_channels=3 * config.patch_size**2, timestep_conditioning=level),
    ]


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
    narrower = width // (block.multiplier if block.kind == "compress_all" else 1)
    return VAEStage(
        kind=DEPTH_TO_SPACE, in_channels=width, out_channels=narrower, strides=block.strides, residual=block.residual
    )


def vae_encoder_parameters(config: VAEConfig) -> ParameterCounts:
    """Of the encoder."""
    return ParameterCounts(outside_blocks=sum(stage.parameters for stage in encoder_stages(config)))


def vae_decoder_parameters(config: VAEConfig) -> ParameterCounts:
    """Of the decoder."""
    return ParameterCounts(outside_blocks=sum(stage.parameters for stage in decoder_stages(config)))


def latent_statistics_parameters(config: VAEConfig) -> ParameterCounts:
    """Of the latents' mean and deviation."""
    return ParameterCounts(outside_blocks=2 * config.latent_channels)
