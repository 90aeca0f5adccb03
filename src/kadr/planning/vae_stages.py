"""What the halves of a VAE consist of, stage by stage, from its config alone.

The stages are those of `models.vae`, in the order in which they run. Widths are channels; a place is a position of the
latents' or the pixels' grid at which a stage works.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from kadr.models.vae.config import BlockConfig, Strides, VAEConfig
from kadr.planning.parameters import Weights, level_embedding

IN, OUT = "in", "out"  # the convolutions at both ends; the decoder's last one is bent by the noise level
LAYERS, WIDER = "residual layers", "residual layer that changes the width"
UP, DOWN, STRIDED = "up", "down", "strided"
TAPS = 27  # of a 3 x 3 x 3 convolution


@dataclass(frozen=True, kw_only=True)
class VAEStage:
    """One stage.

    Args:
        in_channels, out_channels: channels before and after.
        layers: residual layers.
        strides: by how much frames, rows and columns grow or shrink.
        level: it is conditioned on the noise level.
        noise: its residual layers add noise.
        adds: an UP adds its input to what it made.
    """

    kind: str
    width_in: int
    width: int
    layers: int = 0
    strides: Strides = (1, 1, 1)
    level: bool = False
    noise: bool = False
    adds: bool = False

    @property
    def convolutions(self) -> list[tuple[int, int]]:
        """Channels in and out of every 3 x 3 x 3 convolution."""
        if self.kind == LAYERS:
            return [(self.width, self.width)] * (2 * self.layers)
        if self.kind == WIDER:
            return [(self.width_in, self.width), (self.width, self.width)]
        if self.kind == UP:
            return [(self.width_in, self.width * prod(self.strides))]
        if self.kind == DOWN:
            return [(self.width_in, self.width // prod(self.strides))]
        return [(self.width_in, self.width)]

    @property
    def parameters(self) -> int:
        """Numbers in its weights."""
        made = sum((TAPS * before + 1) * after for before, after in self.convolutions)
        layers = 1 if self.kind == WIDER else self.layers
        if self.kind == WIDER:  # a norm and a 1 x 1 x 1 convolution beside them
            made += 2 * self.width_in + (self.width_in + 1) * self.width
        if self.noise:
            made += 2 * layers * self.width_in
        if self.level and self.kind == LAYERS:
            made += 4 * layers * self.width + level_embedding(4 * self.width)
        if self.level and self.kind == OUT:  # and the scale of the level itself
            made += 2 * self.width_in + level_embedding(2 * self.width_in) + 1
        return made


def encoder_stages(config: VAEConfig) -> list[VAEStage]:
    """From pixels to latents; 3·p·p channels enter, the latents' and one more leave."""
    width = config.encoder_base_channels
    stages = [VAEStage(kind=IN, width_in=3 * config.patch_size**2, width=width)]
    for block in config.encoder_blocks:
        stages.append(_encoder_stage(block, width))
        width = stages[-1].width
    return [*stages, VAEStage(kind=OUT, width_in=width, width=config.latent_channels + 1)]


def _encoder_stage(block: BlockConfig, width: int) -> VAEStage:
    if block.kind == "res_x":
        return VAEStage(kind=LAYERS, width_in=width, width=width, layers=block.num_layers)
    if block.kind == "res_x_y":
        return VAEStage(kind=WIDER, width_in=width, width=width * block.multiplier)
    if block.kind.endswith("_res"):
        return VAEStage(kind=DOWN, width_in=width, width=width * block.multiplier, strides=block.strides)
    return VAEStage(kind=STRIDED, width_in=width, width=width, strides=block.strides)


def decoder_stages(config: VAEConfig) -> list[VAEStage]:
    """From latents to pixels; 3·p·p channels leave."""
    width, level = config.decoder_start_channels, config.timestep_conditioning
    stages = [VAEStage(kind=IN, width_in=config.latent_channels, width=width)]
    for block in reversed(config.decoder_blocks):
        stages.append(_decoder_stage(block, width, level))
        width = stages[-1].width
    return [*stages, VAEStage(kind=OUT, width_in=width, width=3 * config.patch_size**2, level=level)]


def _decoder_stage(block: BlockConfig, width: int, level: bool) -> VAEStage:
    noise = block.inject_noise
    if block.kind == "res_x":
        return VAEStage(kind=LAYERS, width_in=width, width=width, layers=block.num_layers, level=level, noise=noise)
    if block.kind == "res_x_y":
        return VAEStage(kind=WIDER, width_in=width, width=width // block.multiplier, noise=noise)
    narrower = width // (block.multiplier if block.kind == "compress_all" else 1)
    return VAEStage(kind=UP, width_in=width, width=narrower, strides=block.strides, adds=block.residual)


def encoder_weights(config: VAEConfig) -> Weights:
    """Of the encoder."""
    return Weights(rest=sum(stage.parameters for stage in encoder_stages(config)))


def decoder_weights(config: VAEConfig) -> Weights:
    """Of the decoder."""
    return Weights(rest=sum(stage.parameters for stage in decoder_stages(config)))


def statistics_weights(config: VAEConfig) -> Weights:
    """Of the latents' mean and deviation."""
    return Weights(rest=2 * config.latent_channels)
