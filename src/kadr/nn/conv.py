"""Convolution over time and space, as an exact stream."""

from __future__ import annotations

from torch import Tensor, nn

from kadr.nn.temporal_cache import Stream, in_turn

KERNEL = 3


class StreamedConv(nn.Module):
    """A 3 x 3 x 3 convolution: zeros around the picture, the edge frames repeated around the video.

    Causal: the first frame is repeated twice in front, so an output frame sees no later one. Otherwise the first and
    the last frame are repeated once each, and in a stream the output lags one frame behind.
    """

    causal: bool
    stride: tuple[int, ...]
    out_channels: int

    def forward(self, x: Tensor, stream: Stream, *, biased: bool = True) -> Tensor:
        """x (B, C, F, H, W) -> (B, C', F', H', W'). Who adds the bias later, with something else, wants it unbiased."""
        # A first frame that is alone sees nothing but itself: the frames before it, and after the last, are its copies.
        still = stream.kept(self) is None and x.shape[2] == 1 and (self.causal or stream.last)
        joined = self._with_edges(x, stream)
        step = self.stride[0]
        made = max(0, (joined.shape[2] - KERNEL) // step + 1)
        if x.shape[2]:
            stream.keep(self, joined[:, :, made * step :])
        if not made:
            return self._nothing(x)
        return (self.convolve_still if still else self.convolve)(joined, biased=biased)

    def convolve_still(self, joined: Tensor, *, biased: bool) -> Tensor:
        """`convolve`, of frames that are one and the same."""
        return self.convolve(joined, biased=biased)

    def convolve(self, joined: Tensor, *, biased: bool) -> Tensor:
        """joined (B, C, F + 2, H, W), with its edges -> (B, C', F', H', W')."""
        raise NotImplementedError

    def _with_edges(self, x: Tensor, stream: Stream) -> Tensor:
        kept = stream.kept(self)
        if kept is None:
            front = 2 if self.causal else 1
            kept = x[:, :, :1].expand(-1, -1, front if x.shape[2] else 0, -1, -1)
        # Where no frame comes any more, what was kept ends the video.
        end = [(x if x.shape[2] else kept)[:, :, -1:]] if stream.last and not self.causal else []
        return in_turn(kept, x, *end)

    def _nothing(self, x: Tensor) -> Tensor:
        height, width = (-(-side // step) for side, step in zip(x.shape[3:], self.stride[1:], strict=True))
        return x.new_empty(x.shape[0], self.out_channels, 0, height, width)


class VideoConv(StreamedConv, nn.Conv3d):
    """A streamed convolution with plain weights (C', C, 3, 3, 3) and bias (C')."""

    def __init__(
        self, channels_in: int, channels_out: int, *, causal: bool, stride: tuple[int, int, int] = (1, 1, 1)
    ) -> None:
        super().__init__(channels_in, channels_out, KERNEL, stride=stride, padding=(0, 1, 1))
        self.causal = causal

    def convolve(self, joined: Tensor, *, biased: bool) -> Tensor:
        """See `StreamedConv.convolve`. On CUDA the result lies channels last where the weight does."""
        return self._conv_forward(joined, self.weight, self.bias if biased else None)
