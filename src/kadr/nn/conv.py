"""Convolution over time and space, as an exact stream."""

from __future__ import annotations

from torch import Tensor, nn

from kadr.nn.temporal_cache import TemporalCache, cat_frames

KERNEL_SIZE = 3


class ChunkedConv3d(nn.Module):
    """A 3 x 3 x 3 convolution: zeros around the picture, the edge frames repeated around the video.

    Causal: the first frame is repeated twice in front, so an output frame sees no later one. Otherwise the first and
    the last frame are repeated once each, and in a stream the output lags one frame behind.
    """

    causal: bool
    stride: tuple[int, ...]
    out_channels: int

    def forward(self, x: Tensor, cache: TemporalCache, *, add_bias: bool = True) -> Tensor:
        """x (B, C, F, H, W) -> (B, C', F', H', W'). Who adds the bias later, with something else, wants it unbiased."""
        # A first frame that is alone sees nothing but itself: the frames before it, and after the last, are its copies.
        still = cache.get(self) is None and x.shape[2] == 1 and (self.causal or cache.is_last_chunk)
        joined = self._pad_frames(x, cache)
        step = self.stride[0]
        made = max(0, (joined.shape[2] - KERNEL_SIZE) // step + 1)
        if x.shape[2]:
            cache.store(self, joined[:, :, made * step :])
        if not made:
            return self._empty_output(x)
        return (self.convolve_repeated_frame if still else self.convolve)(joined, add_bias=add_bias)

    def convolve_repeated_frame(self, padded: Tensor, *, add_bias: bool) -> Tensor:
        """`convolve`, of frames that are one and the same."""
        return self.convolve(padded, add_bias=add_bias)

    def convolve(self, padded: Tensor, *, add_bias: bool) -> Tensor:
        """joined (B, C, F + 2, H, W), with its edges -> (B, C', F', H', W')."""
        raise NotImplementedError

    def _pad_frames(self, x: Tensor, cache: TemporalCache) -> Tensor:
        kept = cache.get(self)
        if kept is None:
            front = 2 if self.causal else 1
            kept = x[:, :, :1].expand(-1, -1, front if x.shape[2] else 0, -1, -1)
        # Where no frame comes any more, what was kept ends the video.
        end = [(x if x.shape[2] else kept)[:, :, -1:]] if cache.is_last_chunk and not self.causal else []
        return cat_frames(kept, x, *end)

    def _empty_output(self, x: Tensor) -> Tensor:
        height, width = (-(-side // step) for side, step in zip(x.shape[3:], self.stride[1:], strict=True))
        return x.new_empty(x.shape[0], self.out_channels, 0, height, width)


class CausalConv3d(ChunkedConv3d, nn.Conv3d):
    """A streamed convolution with plain weights (C', C, 3, 3, 3) and bias (C')."""

    def __init__(
        self, in_channels: int, out_channels: int, *, causal: bool, stride: tuple[int, int, int] = (1, 1, 1)
    ) -> None:
        super().__init__(in_channels, out_channels, KERNEL_SIZE, stride=stride, padding=(0, 1, 1))
        self.causal = causal

    def convolve(self, padded: Tensor, *, add_bias: bool) -> Tensor:
        """See `ChunkedConv3d.convolve`. On CUDA the result lies channels last where the weight does."""
        return self._conv_forward(padded, self.weight, self.bias if add_bias else None)
