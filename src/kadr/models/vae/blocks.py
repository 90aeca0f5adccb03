"""Blocks of the encoder and the decoder. Tensors are (B, C, F, H, W)."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kadr.kernels import fused
from kadr.models.vae.config import Strides
from kadr.nn.conv import CausalConv3d, Conv3d
from kadr.nn.modulation import init_scale_shift_table
from kadr.nn.norm import ChannelLayerNorm
from kadr.nn.temporal_cache import TemporalCache, cat_frames
from kadr.nn.timestep_embedding import TimestepEmbedding


def patchify(x: Tensor, patch_size: int) -> Tensor:
    """Folds patches, (B, C, F, H, W) -> (B, C·p·p, F, H/p, W/p), in the order (channel, column, row), rows fastest."""
    batch, channels, frames, height, width = x.shape
    x = x.reshape(batch, channels, frames, height // patch_size, patch_size, width // patch_size, patch_size)
    return x.permute(0, 1, 6, 4, 2, 3, 5).reshape(
        batch, channels * patch_size**2, frames, height // patch_size, width // patch_size
    )


def unpatchify(x: Tensor, patch_size: int) -> Tensor:
    """Inverts `patchify`."""
    batch, channels, frames, height, width = x.shape
    channels //= patch_size**2
    x = x.reshape(batch, channels, patch_size, patch_size, frames, height, width)
    return x.permute(0, 1, 4, 5, 3, 6, 2).reshape(batch, channels, frames, height * patch_size, width * patch_size)


def space_to_depth(x: Tensor, strides: Strides) -> Tensor:
    """Folds frames, rows and columns into channels, in the order (channel, frame, row, column), unlike `patchify`.

    On a GPU, a channels-last input gives a channels-last output, which the kernels behind it need.
    """
    batch, channels, *sides = x.shape
    (t, frames), (s, height), (r, width) = (
        (stride, side // stride) for stride, side in zip(strides, sides, strict=True)
    )
    channels_last = x.movedim(1, -1)
    if x.is_cuda and channels_last.is_contiguous():  # on a CPU the encoder's last bits would change
        folded = channels_last.reshape(batch, frames, t, height, s, width, r, channels)
        folded = folded.permute(0, 1, 3, 5, 7, 2, 4, 6)
        return folded.reshape(batch, frames, height, width, channels * t * s * r).movedim(-1, 1)
    x = x.reshape(batch, channels, frames, t, height, s, width, r)
    return x.permute(0, 1, 3, 5, 7, 2, 4, 6).reshape(batch, channels * t * s * r, frames, height, width)


def depth_to_space(x: Tensor, strides: Strides) -> Tensor:
    """Inverts `space_to_depth`. A channels-last input gives a channels-last output, in a sixth of the time."""
    batch, channels, frames, height, width = x.shape
    t, s, r = strides
    channels //= t * s * r
    channels_last = x.movedim(1, -1)
    if channels_last.is_contiguous():
        unfolded = channels_last.reshape(batch, frames, height, width, channels, t, s, r)
        unfolded = unfolded.permute(0, 1, 5, 2, 6, 3, 7, 4)
        return unfolded.reshape(batch, frames * t, height * s, width * r, channels).movedim(-1, 1)
    x = x.reshape(batch, channels, t, s, r, frames, height, width)
    return x.permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(batch, channels, frames * t, height * s, width * r)


class ScaleShift(NamedTuple):
    """Modulation without a gate: a shift and a scale per channel, each (B, C)."""

    shift: Tensor
    scale: Tensor


def compute_scale_shifts(table: Tensor, embedding: Tensor) -> list[ScaleShift]:
    """Adds table (2n, C) to a timestep embedding (B, 2n·C): n pairs from the rows shift, scale, shift, scale, ..."""
    rows = (table[None] + embedding.unflatten(1, table.shape)).unbind(1)
    return [ScaleShift(shift, scale) for shift, scale in zip(rows[::2], rows[1::2], strict=True)]


def adds_bias_to_skip(x: Tensor) -> bool:
    """Tells whether to add a bias together with the skip: on a GPU, a convolution needs another pass for it."""
    return x.is_cuda


class ResnetBlock3D(nn.Module):
    """A residual block of two convolutions, with optional timestep modulation and optional noise injection."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        causal: bool,
        timestep_conditioning: bool = False,
        inject_noise: bool = False,
    ) -> None:
        super().__init__()
        self.conv1 = CausalConv3d(in_channels, out_channels, causal=causal)
        self.conv2 = CausalConv3d(out_channels, out_channels, causal=causal)
        if in_channels != out_channels:
            self.shortcut_norm = ChannelLayerNorm(in_channels, eps=1e-6)
            self.shortcut = Conv3d(in_channels, out_channels, 1)
        if timestep_conditioning:
            self.scale_shift_table = init_scale_shift_table(4, in_channels)
        if inject_noise:
            self.per_channel_scale1 = nn.Parameter(torch.zeros(in_channels, 1, 1))
            self.per_channel_scale2 = nn.Parameter(torch.zeros(in_channels, 1, 1))
        self.timestep_conditioning, self.inject_noise, self.changes_channels = (
            timestep_conditioning,
            inject_noise,
            in_channels != out_channels,
        )

    def forward(self, x: Tensor, cache: TemporalCache, temb: Tensor | None = None) -> Tensor:
        """Computes the block for x (B, C, F, H, W).

        Args:
            temb: (B, 4C) timestep embedding, for blocks with timestep conditioning.
        """
        mod1 = mod2 = None
        if self.timestep_conditioning and temb is not None:
            mod1, mod2 = compute_scale_shifts(self.scale_shift_table, temb)
        main = self._norm_conv(x, cache, self.conv1, mod1, "per_channel_scale1")
        bias_with_skip = adds_bias_to_skip(main)
        main = self._norm_conv(main, cache, self.conv2, mod2, "per_channel_scale2", add_bias=not bias_with_skip)
        skip = cache.delay(self, x, main.shape[2])
        if not main.shape[2]:
            return main  # no frame is ready yet; native convolutions refuse a tensor without frames
        if self.changes_channels:
            skip = self.shortcut(self.shortcut_norm(skip))
        return fused.bias_residual(main, self.conv2.bias, skip) if bias_with_skip else main.add_(skip)

    def _norm_conv(
        self,
        x: Tensor,
        cache: TemporalCache,
        conv: CausalConv3d,
        scale_shift: ScaleShift | None,
        noise_scale_name: str,
        *,
        add_bias: bool = True,
    ) -> Tensor:
        scale, shift = (scale_shift.scale, scale_shift.shift) if scale_shift else (None, None)
        x = conv(fused.pixel_norm_modulate_silu(x, scale, shift), cache, add_bias=add_bias)
        if self.inject_noise:
            x = x + cache.get_noise((self, noise_scale_name), like=x) * getattr(self, noise_scale_name)[None, :, None]
        return x


class ResnetStage(nn.Module):
    """The "res_x" block: residual blocks of equal width that share one timestep embedding."""

    def __init__(
        self,
        channels: int,
        num_layers: int,
        *,
        causal: bool,
        timestep_conditioning: bool = False,
        inject_noise: bool = False,
    ) -> None:
        super().__init__()
        options = {"causal": causal, "timestep_conditioning": timestep_conditioning, "inject_noise": inject_noise}
        self.res_blocks = nn.ModuleList(ResnetBlock3D(channels, channels, **options) for _ in range(num_layers))
        self.time_embed = TimestepEmbedding(4 * channels) if timestep_conditioning else None

    def forward(self, x: Tensor, cache: TemporalCache, timestep: Tensor | None = None) -> Tensor:
        """Runs the residual blocks on x (B, C, F, H, W).

        Args:
            timestep: (B), scaled, for stages with timestep conditioning.
        """
        temb = None
        if self.time_embed is not None and timestep is not None:
            temb = self.time_embed(timestep, x.dtype)
        for block in self.res_blocks:
            x = block(x, cache, temb)
        return x


class SpaceToDepthDownsample(nn.Module):
    """The "compress_*_res" block of the encoder: a convolution and `space_to_depth`, with a skip of averaged channels.

    The first frame is doubled before both paths, so an odd number of frames folds in pairs.
    """

    def __init__(self, in_channels: int, out_channels: int, strides: Strides) -> None:
        super().__init__()
        self.conv = CausalConv3d(in_channels, out_channels // prod(strides), causal=True)
        self.strides = strides
        self.group_size = in_channels * prod(strides) // out_channels

    def forward(self, x: Tensor, cache: TemporalCache) -> Tensor:
        if self.strides[0] == 2:
            x = self._pair_frames(x, cache)
        skip = space_to_depth(x, self.strides).unflatten(1, (-1, self.group_size)).mean(dim=2)
        return space_to_depth(self.conv(x, cache), self.strides) + skip

    def _pair_frames(self, x: Tensor, cache: TemporalCache) -> Tensor:
        if cache.is_first((self, "doubled"), x):
            x = cat_frames(x[:, :, :1], x)
        x = cache.prepend(self, x)
        even = x.shape[2] // 2 * 2
        cache.store(self, x[:, :, even:])
        return x[:, :, :even]


class DepthToSpaceUpsample(nn.Module):
    """The "compress_*" block of the decoder: a convolution and `depth_to_space`.

    A temporal stride doubles the frames and drops the first. With `residual`, the unfolded input is added, its channels
    repeated (0..K-1, 0..K-1, ...) to the channels of the output.
    """

    def __init__(self, in_channels: int, strides: Strides, *, multiplier: int, residual: bool) -> None:
        super().__init__()
        factor = prod(strides)
        self.conv = CausalConv3d(in_channels, factor * in_channels // multiplier, causal=False)
        self.strides = strides
        self.skip_repeats = factor // multiplier if residual else 0

    def forward(self, x: Tensor, cache: TemporalCache) -> Tensor:
        out = self.conv(x, cache)
        conv_frames = out.shape[2]
        out = depth_to_space(out, self.strides)
        if self.skip_repeats:
            skip = depth_to_space(cache.delay(self, x, conv_frames), self.strides)
            out = (out.unflatten(1, (self.skip_repeats, -1)) + skip[:, None]).flatten(1, 2)
        if self.strides[0] == 2 and cache.is_first((self, "dropped"), out):
            out = out[:, :, 1:]
        return out
