"""Convolutions: over time and space, taking a video chunk by chunk, exactly; and torch's, without TF32."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kadr.cancellation import check_cancelled
from kadr.kernels.cuda.run_ahead import limit_run_ahead
from kadr.nn.temporal_cache import TemporalCache, cat_frames

KERNEL_SIZE = 3


class ChunkedConv3d(nn.Module):
    """A 3 x 3 x 3 convolution with zero padding in space and repeated edge frames in time.

    Causal: the first frame is repeated twice in front, so no output frame depends on a later one. Otherwise the first
    and the last frame are repeated once each, and chunk by chunk the output lags one frame behind.
    """

    causal: bool
    stride: tuple[int, ...]
    out_channels: int

    def forward(self, x: Tensor, cache: TemporalCache, *, add_bias: bool = True) -> Tensor:
        """Convolves a chunk (B, C, F, H, W) -> (B, C', F', H', W').

        Args:
            cache: frames of the chunks before.
            add_bias: False where the caller adds the bias itself, fused with another addition.

        Raises:
            Cancelled: the work is cancelled; looked at before every convolution.
        """
        check_cancelled()
        limit_run_ahead(x)
        # Around a single first frame, all padding frames are copies of it.
        is_repeated_frame = cache.get(self) is None and x.shape[2] == 1 and (self.causal or cache.is_last_chunk)
        padded = self._pad_frames(x, cache)
        stride = self.stride[0]
        out_frames = max(0, (padded.shape[2] - KERNEL_SIZE) // stride + 1)
        if x.shape[2]:
            cache.store(self, padded[:, :, out_frames * stride :])
        if not out_frames:
            return self._empty_output(x)
        convolve = self.convolve_repeated_frame if is_repeated_frame else self.convolve
        return convolve(padded, add_bias=add_bias)

    def convolve_repeated_frame(self, padded: Tensor, *, add_bias: bool) -> Tensor:
        """Computes `convolve` for frames that are all equal; a subclass may do it faster."""
        return self.convolve(padded, add_bias=add_bias)

    def convolve(self, padded: Tensor, *, add_bias: bool) -> Tensor:
        """Convolves frames with their padding, (B, C, F + 2, H, W) -> (B, C', F', H', W')."""
        raise NotImplementedError

    def _pad_frames(self, x: Tensor, cache: TemporalCache) -> Tensor:
        cached = cache.get(self)
        if cached is None:
            front = 2 if self.causal else 1
            cached = x[:, :, :1].expand(-1, -1, front if x.shape[2] else 0, -1, -1)
        # If the last chunk has no frames, the last cached frame ends the video.
        end = [(x if x.shape[2] else cached)[:, :, -1:]] if cache.is_last_chunk and not self.causal else []
        return cat_frames(cached, x, *end)

    def _empty_output(self, x: Tensor) -> Tensor:
        height, width = (-(-side // stride) for side, stride in zip(x.shape[3:], self.stride[1:], strict=True))
        return x.new_empty(x.shape[0], self.out_channels, 0, height, width)


class _FullPrecision(nn.modules.conv._ConvNd):
    """Computes a convolution of float32 in float32.

    cuDNN would round its inputs to TF32, with 10 bits for 23, and from 9.10.2 to 9.15 gets 3D ones wrong (pytorch pull
    request 167024). torch's flag for it belongs to the whole process, so every call says it.
    """

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not x.is_cuda or x.dtype != torch.float32:
            return super()._conv_forward(x, weight, bias)  # type: ignore[misc]
        cudnn, no_padding = torch.backends.cudnn, (0,) * len(self.stride)
        return torch._convolution(
            x,
            weight,
            bias,
            self.stride,
            self.padding,  # type: ignore[arg-type]
            self.dilation,
            transposed=False,
            output_padding=no_padding,
            groups=self.groups,
            benchmark=cudnn.benchmark,
            deterministic=cudnn.deterministic or torch.are_deterministic_algorithms_enabled(),
            cudnn_enabled=cudnn.enabled,
            allow_tf32=False,
        )


class Conv2d(_FullPrecision, nn.Conv2d):
    """torch's, with zero padding, and in float32 without TF32."""


class Conv3d(_FullPrecision, nn.Conv3d):
    """torch's, with zero padding, and in float32 without TF32."""


class CausalConv3d(ChunkedConv3d, Conv3d):
    """A chunked convolution with plain weights (C', C, 3, 3, 3) and bias (C')."""

    def __init__(
        self, in_channels: int, out_channels: int, *, causal: bool, stride: tuple[int, int, int] = (1, 1, 1)
    ) -> None:
        super().__init__(in_channels, out_channels, KERNEL_SIZE, stride=stride, padding=(0, 1, 1))
        self.causal = causal

    def convolve(self, padded: Tensor, *, add_bias: bool) -> Tensor:
        """Implements `ChunkedConv3d.convolve`. On CUDA the output is channels last where the weight is."""
        return self._conv_forward(padded, self.weight, self.bias if add_bias else None)
