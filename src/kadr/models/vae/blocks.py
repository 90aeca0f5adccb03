"""The blocks of encoder and decoder. Tensors are (B, C, F, H, W)."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kadr.kernels import fused
from kadr.models.vae.config import Strides
from kadr.nn.conv import VideoConv
from kadr.nn.modulation import learned_table
from kadr.nn.norm import ChannelLayerNorm
from kadr.nn.temporal_cache import Stream, in_turn
from kadr.nn.timestep_embedding import LevelEmbedding


def patchify(x: Tensor, patch: int) -> Tensor:
    """(B, C, F, H, W) -> (B, C·p·p, F, H/p, W/p): channel, then column within the patch, then row (fastest)."""
    batch, channels, frames, height, width = x.shape
    x = x.reshape(batch, channels, frames, height // patch, patch, width // patch, patch)
    return x.permute(0, 1, 6, 4, 2, 3, 5).reshape(batch, channels * patch**2, frames, height // patch, width // patch)


def unpatchify(x: Tensor, patch: int) -> Tensor:
    """The inverse of `patchify`."""
    batch, channels, frames, height, width = x.shape
    channels //= patch**2
    x = x.reshape(batch, channels, patch, patch, frames, height, width)
    return x.permute(0, 1, 4, 5, 3, 6, 2).reshape(batch, channels, frames, height * patch, width * patch)


def space_to_depth(x: Tensor, strides: Strides) -> Tensor:
    """Fold frames, rows and columns into channels, ordered (channel, frame, row, column). Unlike `patchify`."""
    batch, channels, *sides = x.shape
    (t, frames), (s, height), (r, width) = ((step, side // step) for step, side in zip(strides, sides, strict=True))
    x = x.reshape(batch, channels, frames, t, height, s, width, r)
    return x.permute(0, 1, 3, 5, 7, 2, 4, 6).reshape(batch, channels * t * s * r, frames, height, width)


def depth_to_space(x: Tensor, strides: Strides) -> Tensor:
    """The inverse of `space_to_depth`. What lies channels last comes out so, for a sixth of the time."""
    batch, channels, frames, height, width = x.shape
    t, s, r = strides
    channels //= t * s * r
    last = x.movedim(1, -1)
    if last.is_contiguous():
        last = last.reshape(batch, frames, height, width, channels, t, s, r).permute(0, 1, 5, 2, 6, 3, 7, 4)
        return last.reshape(batch, frames * t, height * s, width * r, channels).movedim(-1, 1)
    x = x.reshape(batch, channels, t, s, r, frames, height, width)
    return x.permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(batch, channels, frames * t, height * s, width * r)


class Bend(NamedTuple):
    """A shift and a scale per channel, each (B, C)."""

    shift: Tensor
    scale: Tensor


def bends(table: Tensor, embedding: Tensor) -> list[Bend]:
    """table (2n, C) + embedding (B, 2n·C) -> n bends; the rows are shift, scale, shift, scale, ..."""
    rows = (table[None] + embedding.unflatten(1, table.shape)).unbind(1)
    return [Bend(shift, scale) for shift, scale in zip(rows[::2], rows[1::2], strict=True)]


def adds_bias_to_skip(x: Tensor) -> bool:
    """Whether a bias is better added with the skip: on a GPU, a convolution would take a pass of its own for it."""
    return x.is_cuda


class ResidualLayer(nn.Module):
    """Two convolutions around a residual path; optionally bent by the noise level, optionally with noise added."""

    def __init__(
        self, width_in: int, width: int, *, causal: bool, level_conditioned: bool = False, inject_noise: bool = False
    ) -> None:
        super().__init__()
        self.conv1 = VideoConv(width_in, width, causal=causal)
        self.conv2 = VideoConv(width, width, causal=causal)
        if width_in != width:
            self.shortcut_norm = ChannelLayerNorm(width_in, eps=1e-6)
            self.shortcut = nn.Conv3d(width_in, width, 1)
        if level_conditioned:
            self.modulation = learned_table(4, width_in)
        if inject_noise:
            self.noise1 = nn.Parameter(torch.zeros(width_in, 1, 1))
            self.noise2 = nn.Parameter(torch.zeros(width_in, 1, 1))
        self.level_conditioned, self.inject_noise, self.widens = level_conditioned, inject_noise, width_in != width

    def forward(self, x: Tensor, stream: Stream, level: Tensor | None = None) -> Tensor:
        """x (B, C, F, H, W), level (B, 4C): the embedded noise level, where the layer is conditioned on it."""
        bend1 = bend2 = None
        if self.level_conditioned and level is not None:
            bend1, bend2 = bends(self.modulation, level)
        main = self._half(x, stream, self.conv1, bend1, "noise1")
        together = adds_bias_to_skip(main)
        main = self._half(main, stream, self.conv2, bend2, "noise2", biased=not together)
        skip = stream.delay(self, x, main.shape[2])
        if not main.shape[2]:
            return main  # still waiting; native convolutions refuse a tensor without frames
        if self.widens:
            skip = self.shortcut(self.shortcut_norm(skip))
        return fused.bias_residual(main, self.conv2.bias, skip) if together else main.add_(skip)

    def _half(
        self, x: Tensor, stream: Stream, conv: VideoConv, bend: Bend | None, noise: str, *, biased: bool = True
    ) -> Tensor:
        scale, shift = (bend.scale, bend.shift) if bend else (None, None)
        x = conv(fused.pixel_norm_modulate_silu(x, scale, shift), stream, biased=biased)
        if self.inject_noise:
            x = x + stream.noise((self, noise), like=x) * getattr(self, noise)[None, :, None]
        return x


class ResidualStage(nn.Module):
    """The "res_x" block: residual layers of one width that share one embedding of the noise level."""

    def __init__(
        self, width: int, layers: int, *, causal: bool, level_conditioned: bool = False, inject_noise: bool = False
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            ResidualLayer(width, width, causal=causal, level_conditioned=level_conditioned, inject_noise=inject_noise)
            for _ in range(layers)
        )
        self.level_embedding = LevelEmbedding(4 * width) if level_conditioned else None

    def forward(self, x: Tensor, stream: Stream, level: Tensor | None = None) -> Tensor:
        """level (B): the scaled noise level, where the stage is conditioned on it."""
        embedded = None
        if self.level_embedding is not None and level is not None:
            embedded = self.level_embedding(level, x.dtype)
        for layer in self.layers:
            x = layer(x, stream, embedded)
        return x


class SpaceToDepthDown(nn.Module):
    """The "compress_*_res" block of the encoder: a convolution folded into channels, beside averaged channels.

    The first frame is doubled before both paths, so an odd count of frames folds in pairs.
    """

    def __init__(self, width_in: int, width: int, strides: Strides) -> None:
        super().__init__()
        self.conv = VideoConv(width_in, width // prod(strides), causal=True)
        self.strides = strides
        self.group = width_in * prod(strides) // width

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        if self.strides[0] == 2:
            x = self._paired(x, stream)
        skip = space_to_depth(x, self.strides).unflatten(1, (-1, self.group)).mean(dim=2)
        return space_to_depth(self.conv(x, stream), self.strides) + skip

    def _paired(self, x: Tensor, stream: Stream) -> Tensor:
        if stream.is_first((self, "doubled"), x):
            x = in_turn(x[:, :, :1], x)
        x = stream.join(self, x)
        even = x.shape[2] // 2 * 2
        stream.keep(self, x[:, :, even:])
        return x[:, :, :even]


class DepthToSpaceUp(nn.Module):
    """The "compress_*" block of the decoder: a convolution unfolded into frames, rows and columns.

    Twice as many frames come out, less the first. With `residual`, the unfolded input is added, its channels
    tiled (0..K-1, 0..K-1, ...) to the width of the output.
    """

    def __init__(self, width_in: int, strides: Strides, *, multiplier: int, residual: bool) -> None:
        super().__init__()
        factor = prod(strides)
        self.conv = VideoConv(width_in, factor * width_in // multiplier, causal=False)
        self.strides = strides
        self.tiles = factor // multiplier if residual else 0

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        out = self.conv(x, stream)
        made = out.shape[2]
        out = depth_to_space(out, self.strides)
        if self.tiles:
            skip = depth_to_space(stream.delay(self, x, made), self.strides)
            out = (out.unflatten(1, (self.tiles, -1)) + skip[:, None]).flatten(1, 2)
        if self.strides[0] == 2 and stream.is_first((self, "dropped"), out):
            out = out[:, :, 1:]
        return out
