"""Latents to pixels, removing the last of the noise on the way where the decoder was trained to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from kadr.kernels import fused
from kadr.models.vae.blocks import DepthToSpaceUpsample, ResnetBlock3D, ResnetStage, compute_scale_shifts, unpatchify
from kadr.models.vae.config import BlockConfig, VAEConfig
from kadr.nn.conv import CausalConv3d
from kadr.nn.modulation import init_scale_shift_table
from kadr.nn.temporal_cache import TemporalCache
from kadr.nn.timestep_embedding import TimestepEmbedding

DecoderStage = Callable[[Tensor, TemporalCache], Tensor]
CHUNK_FRAMES = 4  # frames that a stage hands on at a time, unless told otherwise


def _build_block(block: BlockConfig, channels: int, timestep_conditioning: bool) -> tuple[nn.Module, int]:
    """The module for one entry of the list, and the width it hands on."""
    noise = block.inject_noise
    if block.kind == "res_x":
        stage = ResnetStage(
            channels, block.num_layers, causal=False, timestep_conditioning=timestep_conditioning, inject_noise=noise
        )
        return stage, channels
    narrower = channels // block.multiplier
    if block.kind == "res_x_y":
        return ResnetBlock3D(channels, narrower, causal=False, inject_noise=noise), narrower
    # Only compress_all narrows; the others keep their width whatever the entry says, as the official decoder does.
    multiplier = block.multiplier if block.kind == "compress_all" else 1
    up = DepthToSpaceUpsample(channels, block.strides, multiplier=multiplier, residual=block.residual)
    return up, channels // multiplier


class Decoder(nn.Module):
    """The decoder looks one frame ahead at every convolution; as a stream its frames lag behind its latents."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        width = config.decoder_start_channels
        self.conv_in = CausalConv3d(config.latent_channels, width, causal=False)
        self.blocks = nn.ModuleList()
        for entry in reversed(config.decoder_blocks):
            module, width = _build_block(entry, width, config.timestep_conditioning)
            self.blocks.append(module)
        self.conv_out = CausalConv3d(width, 3 * config.patch_size**2, causal=False)
        self.timestep_conditioning = config.timestep_conditioning
        if self.timestep_conditioning:
            self.timestep_scale_multiplier = nn.Parameter(torch.tensor(1000.0))
            self.time_embed = TimestepEmbedding(2 * width)
            self.scale_shift_table = init_scale_shift_table(2, width)

    def forward(self, latents: Tensor, cache: TemporalCache, timestep: Tensor | None = None) -> Tensor:
        """latents (B, C, f, h, w), level (B) in [0, 1] -> pixels (B, 3, F, H, W), about [-1, 1], not clamped."""
        x = latents
        for stage in self._stages(timestep):
            x = stage(x, cache)
        return x

    def forward_chunks(
        self, latents: Tensor, cache: TemporalCache, timestep: Tensor | None = None, *, chunk_frames: int = CHUNK_FRAMES
    ) -> Iterator[Tensor]:
        """As `forward`, but yields the pixels in pieces of a few frames.

        The decoder looks 22 to 31 latent frames ahead, so the last chunk of a video sets free all the frames still in
        flight, of a usual clip nearly all it has. Each stage therefore hands its output on in slices, and a slice goes
        all the way to pixels before the next is touched.

        Args:
            chunk_frames: frames in a slice. Fewer take less memory and more time; the pixels are the same.
        """
        yield from _run_depth_first(self._stages(timestep), latents, cache, chunk_frames)

    def _stages(self, timestep: Tensor | None) -> list[DecoderStage]:
        if self.timestep_conditioning:
            if timestep is None:
                raise ValueError("this decoder is conditioned on a noise level: give one")
            timestep = timestep * self.timestep_scale_multiplier
        blocks = [_bind_timestep(block, timestep) if isinstance(block, ResnetStage) else block for block in self.blocks]
        return [self.conv_in, *blocks, partial(self._to_pixels, timestep=timestep)]

    def _to_pixels(self, x: Tensor, cache: TemporalCache, timestep: Tensor | None) -> Tensor:
        scale = shift = None
        if self.timestep_conditioning and timestep is not None:
            ((shift, scale),) = compute_scale_shifts(self.scale_shift_table, self.time_embed(timestep, x.dtype))
        return unpatchify(self.conv_out(fused.pixel_norm_modulate_silu(x, scale, shift), cache), self.patch_size)


def _bind_timestep(block: ResnetStage, timestep: Tensor | None) -> DecoderStage:
    return lambda x, stream: block(x, stream, timestep)


def _run_depth_first(
    stages: Sequence[DecoderStage], x: Tensor, cache: TemporalCache, chunk_frames: int
) -> Iterator[Tensor]:
    """Send x through the stages, slice by slice; yields what comes out. Only the very last slice ends the video."""
    if not stages:
        if x.shape[2]:
            yield x
        return
    last, made = cache.is_last_chunk, stages[0](x, cache)
    slices = made.split(chunk_frames, dim=2) if made.shape[2] else (made,)
    for index, part in enumerate(slices):
        cache.is_last_chunk = last and index == len(slices) - 1
        yield from _run_depth_first(stages[1:], part, cache, chunk_frames)
    cache.is_last_chunk = last
