"""Latents to pixels, removing the last of the noise on the way where the decoder was trained to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from kadr.kernels import fused
from kadr.models.vae.blocks import DepthToSpaceUp, ResidualLayer, ResidualStage, bends, unpatchify
from kadr.models.vae.config import Block, VAEConfig
from kadr.nn.conv import VideoConv
from kadr.nn.modulation import learned_table
from kadr.nn.temporal_cache import Stream
from kadr.nn.timestep_embedding import LevelEmbedding

Stage = Callable[[Tensor, Stream], Tensor]
SLICE = 4  # frames that a stage hands on at a time, unless told otherwise


def _block(block: Block, width: int, level_conditioned: bool) -> tuple[nn.Module, int]:
    """The module for one entry of the list, and the width it hands on."""
    noise = block.inject_noise
    if block.kind == "res_x":
        stage = ResidualStage(
            width, block.layers, causal=False, level_conditioned=level_conditioned, inject_noise=noise
        )
        return stage, width
    narrower = width // block.multiplier
    if block.kind == "res_x_y":
        return ResidualLayer(width, narrower, causal=False, inject_noise=noise), narrower
    # Only compress_all narrows; the others keep their width whatever the entry says, as the official decoder does.
    multiplier = block.multiplier if block.kind == "compress_all" else 1
    up = DepthToSpaceUp(width, block.strides, multiplier=multiplier, residual=block.residual)
    return up, width // multiplier


class Decoder(nn.Module):
    """The decoder looks one frame ahead at every convolution; as a stream its frames lag behind its latents."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.patch = config.patch
        width = config.decoder_start_width
        self.conv_in = VideoConv(config.latent_channels, width, causal=False)
        self.blocks = nn.ModuleList()
        for entry in reversed(config.decoder_blocks):
            module, width = _block(entry, width, config.timestep_conditioning)
            self.blocks.append(module)
        self.conv_out = VideoConv(width, 3 * config.patch**2, causal=False)
        self.level_conditioned = config.timestep_conditioning
        if self.level_conditioned:
            self.level_scale = nn.Parameter(torch.tensor(1000.0))
            self.level_embedding = LevelEmbedding(2 * width)
            self.modulation = learned_table(2, width)

    def forward(self, latents: Tensor, stream: Stream, level: Tensor | None = None) -> Tensor:
        """latents (B, C, f, h, w), level (B) in [0, 1] -> pixels (B, 3, F, H, W), about [-1, 1], not clamped."""
        x = latents
        for stage in self._stages(level):
            x = stage(x, stream)
        return x

    def pieces(
        self, latents: Tensor, stream: Stream, level: Tensor | None = None, *, handed: int = SLICE
    ) -> Iterator[Tensor]:
        """As `forward`, but yields the pixels in pieces of a few frames.

        The decoder looks 22 to 31 latent frames ahead, so the last chunk of a video sets free all the frames still in
        flight, of a usual clip nearly all it has. Each stage therefore hands its output on in slices, and a slice goes
        all the way to pixels before the next is touched.

        Args:
            handed: frames in a slice. Fewer take less memory and more time; the pixels are the same.
        """
        yield from _depth_first(self._stages(level), latents, stream, handed)

    def _stages(self, level: Tensor | None) -> list[Stage]:
        if self.level_conditioned:
            if level is None:
                raise ValueError("this decoder is conditioned on a noise level: give one")
            level = level * self.level_scale
        blocks = [_given(block, level) if isinstance(block, ResidualStage) else block for block in self.blocks]
        return [self.conv_in, *blocks, partial(self._to_pixels, level=level)]

    def _to_pixels(self, x: Tensor, stream: Stream, level: Tensor | None) -> Tensor:
        scale = shift = None
        if self.level_conditioned and level is not None:
            ((shift, scale),) = bends(self.modulation, self.level_embedding(level, x.dtype))
        return unpatchify(self.conv_out(fused.pixel_norm_modulate_silu(x, scale, shift), stream), self.patch)


def _given(block: ResidualStage, level: Tensor | None) -> Stage:
    return lambda x, stream: block(x, stream, level)


def _depth_first(stages: Sequence[Stage], x: Tensor, stream: Stream, handed: int) -> Iterator[Tensor]:
    """Send x through the stages, slice by slice; yields what comes out. Only the very last slice ends the video."""
    if not stages:
        if x.shape[2]:
            yield x
        return
    last, made = stream.last, stages[0](x, stream)
    slices = made.split(handed, dim=2) if made.shape[2] else (made,)
    for index, part in enumerate(slices):
        stream.last = last and index == len(slices) - 1
        yield from _depth_first(stages[1:], part, stream, handed)
    stream.last = last
