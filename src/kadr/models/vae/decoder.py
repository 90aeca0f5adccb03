"""The VAE decoder: latents to pixels. A decoder with timestep conditioning also removes the last of the noise."""

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
CHUNK_FRAMES = 4  # frames that a stage passes on at a time, by default


def _build_block(block: BlockConfig, channels: int, timestep_conditioning: bool) -> tuple[nn.Module, int]:
    """Builds the module for one entry of the block list; returns it and its output channels."""
    noise = block.inject_noise
    if block.kind == "res_x":
        stage = ResnetStage(
            channels, block.num_layers, causal=False, timestep_conditioning=timestep_conditioning, inject_noise=noise
        )
        return stage, channels
    out_channels = channels // block.multiplier
    if block.kind == "res_x_y":
        return ResnetBlock3D(channels, out_channels, causal=False, inject_noise=noise), out_channels
    # Only compress_all reduces channels. The others ignore the entry's multiplier, as in the official decoder.
    multiplier = block.multiplier if block.kind == "compress_all" else 1
    upsample = DepthToSpaceUpsample(channels, block.strides, multiplier=multiplier, residual=block.residual)
    return upsample, channels // multiplier


class Decoder(nn.Module):
    """Decodes latents chunk by chunk. Each convolution needs one later frame, so the output lags behind the latents."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        channels = config.decoder_start_channels
        self.conv_in = CausalConv3d(config.latent_channels, channels, causal=False)
        self.blocks = nn.ModuleList()
        for entry in reversed(config.decoder_blocks):
            module, channels = _build_block(entry, channels, config.timestep_conditioning)
            self.blocks.append(module)
        self.conv_out = CausalConv3d(channels, 3 * config.patch_size**2, causal=False)
        self.timestep_conditioning = config.timestep_conditioning
        if self.timestep_conditioning:
            self.timestep_scale_multiplier = nn.Parameter(torch.tensor(1000.0))
            self.time_embed = TimestepEmbedding(2 * channels)
            self.scale_shift_table = init_scale_shift_table(2, channels)

    def forward(self, latents: Tensor, cache: TemporalCache, timestep: Tensor | None = None) -> Tensor:
        """Decodes latents (B, C, f, h, w) to pixels (B, 3, F, H, W), about [-1, 1], not clamped.

        Args:
            timestep: (B) in [0, 1], for decoders with timestep conditioning.
        """
        x = latents
        for stage in self._stages(timestep):
            x = stage(x, cache)
        return x

    def forward_chunks(
        self, latents: Tensor, cache: TemporalCache, timestep: Tensor | None = None, *, chunk_frames: int = CHUNK_FRAMES
    ) -> Iterator[Tensor]:
        """Decodes like `forward`, but yields the pixels a few frames at a time.

        The decoder looks 22 to 31 latent frames ahead, so the last chunk of a video releases all frames still in
        flight: nearly all frames of a typical video. Each stage therefore passes its output on in small chunks, and a
        chunk goes all the way to pixels before the next one is started.

        Args:
            chunk_frames: frames of those chunks. Fewer take less memory and more time; the pixels are the same.
        """
        yield from _run_depth_first(self._stages(timestep), latents, cache, chunk_frames)

    def _stages(self, timestep: Tensor | None) -> list[DecoderStage]:
        if self.timestep_conditioning:
            if timestep is None:
                raise ValueError("this decoder is conditioned on a timestep: pass one")
            timestep = timestep * self.timestep_scale_multiplier
        blocks = [_bind_timestep(block, timestep) if isinstance(block, ResnetStage) else block for block in self.blocks]
        return [self.conv_in, *blocks, partial(self._to_pixels, timestep=timestep)]

    def _to_pixels(self, x: Tensor, cache: TemporalCache, timestep: Tensor | None) -> Tensor:
        scale = shift = None
        if self.timestep_conditioning and timestep is not None:
            ((shift, scale),) = compute_scale_shifts(self.scale_shift_table, self.time_embed(timestep, x.dtype))
        return unpatchify(self.conv_out(fused.pixel_norm_modulate_silu(x, scale, shift), cache), self.patch_size)


def _bind_timestep(block: ResnetStage, timestep: Tensor | None) -> DecoderStage:
    return lambda x, cache: block(x, cache, timestep)


def _run_depth_first(
    stages: Sequence[DecoderStage], x: Tensor, cache: TemporalCache, chunk_frames: int
) -> Iterator[Tensor]:
    """Runs x through the stages depth first, chunk by chunk; yields the output. Only the last chunk ends the video."""
    if not stages:
        if x.shape[2]:
            yield x
        return
    is_last_chunk, output = cache.is_last_chunk, stages[0](x, cache)
    chunks = output.split(chunk_frames, dim=2) if output.shape[2] else (output,)
    for index, chunk in enumerate(chunks):
        cache.is_last_chunk = is_last_chunk and index == len(chunks) - 1
        yield from _run_depth_first(stages[1:], chunk, cache, chunk_frames)
    cache.is_last_chunk = is_last_chunk
