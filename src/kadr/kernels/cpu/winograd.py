"""3D convolution by Winograd's algorithm along time (Lavin and Gray, arXiv:1509.09308), with fewer 2D convolutions.

`F23`, F(2, 3): two neighbouring output frames take four 2D convolutions where the direct algorithm takes six. d0 to
d3 are the input frames, g0 to g2 the temporal taps of the kernel, and g d is the 2D convolution of d by g:

    m1 = g0 (d0 - d2)    m2 = (g0 + g1 + g2)/2 (d1 + d2)    m3 = (g0 - g1 + g2)/2 (d2 - d1)    m4 = g2 (d1 - d3)
    first = m1 + m2 + m3    second = m2 - m3 - m4

`F43`, F(4, 3): four output frames take six 2D convolutions where the direct algorithm takes twelve, with interpolation
points 0, plus and minus s, plus and minus t, and infinity. With s t = 1, all factors stay near 1; with s = sqrt(1/2)
the error in bfloat16 is three quarters of that with the usual points 1 and 2 (measured).

    m0 = g0 (d0 - 5/2 d2 + d4)    m5 = g2 (d1 - 5/2 d3 + d5)
    m1, m2 = (g0 +- s g1 + s^2 g2)/(-3/2) ((d4 - 2 d2) +- s (d3 - 2 d1))
    m3, m4 = (g0 +- t g1 + t^2 g2)/6 ((d4 - d2/2) +- t (d3 - d1/2))
    y0 = m0 + (m1 + m2) + (m3 + m4)        y1 = s (m1 - m2) + t (m3 - m4)
    y2 = s^2 (m1 + m2) + t^2 (m3 + m4)     y3 = s^3 (m1 - m2) + t^3 (m3 - m4) + m5

Three output frames: F(4, 3) without y3, five convolutions. One or two output frames use only m0, m1, m2 and m5.

The result is exact up to rounding. A video in channels_last_3d memory is a batch of images in channels_last memory, so
the frames of all groups go through oneDNN at once, with weights in its memory order. oneDNN adds further terms to the
output of a convolution before it rounds the result.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

PADDING = [1, 1]  # of the 2D convolutions
_ONES = [1, 1]  # their stride and dilation
WINOGRAD_SLICE_ELEMENTS = 1_048_576  # of a weight transformed at a time, in float32, so that they stay in the cache
F23, F43 = 2, 4  # output frames at a time
S, T = 0.5**0.5, 2**0.5
# Factors of the three taps in each transformed kernel.
KERNEL_TRANSFORMS = {
    F23: ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, -1.0)),
    F43: (
        (1.0, 0.0, 0.0),
        *((-2 / 3, sign * S / -1.5, -1 / 3) for sign in (1, -1)),
        *((1 / 6, sign * T / 6, 1 / 3) for sign in (1, -1)),
        (0.0, 0.0, 1.0),
    ),
}


def transform_kernel(weight: Tensor, output_frames: int) -> tuple[Tensor, ...]:
    """Transforms weight (O, C, 3, 3, 3) into the 2D kernels for `output_frames` at a time.

    Returns:
        Kernels (O, C, 3, 3) in the weight's dtype, channels last in memory, which is the cheapest for `prepack_kernel`:
        for `F23` those of m1, m2, m3 and -m4, for `F43` those of m0 to m5.
    """
    out_channels, channels, _, *sides = weight.shape
    kernels = tuple(weight.new_empty(out_channels, *sides, channels) for _ in KERNEL_TRANSFORMS[output_frames])
    step = max(1, WINOGRAD_SLICE_ELEMENTS // weight[0].numel())
    for start in range(0, out_channels, step):
        part = slice(start, start + step)
        # Made contiguous first, while the slice is in the cache: sums of strided taps would take four times as long.
        first, middle, last = weight[part].permute(2, 0, 3, 4, 1).contiguous().float().unbind(0)
        for kernel, (of_first, of_middle, of_last) in zip(kernels, KERNEL_TRANSFORMS[output_frames], strict=True):
            if of_middle:
                total = torch.mul(first, of_first).add_(middle, alpha=of_middle).add_(last, alpha=of_last)
            else:
                total = of_first * first if of_first else of_last * last
            kernel[part] = total
    return tuple(kernel.permute(0, 3, 1, 2) for kernel in kernels)


def prepack_kernel(kernel: Tensor, images: int, height: int, width: int) -> Tensor:
    """Reorders a kernel (O, C, 3, 3) into the memory order that oneDNN prefers for images of this count and size."""
    channels_last = kernel.contiguous(memory_format=torch.channels_last)
    shape = [images, kernel.shape[1], height, width]
    prepacked: Tensor = torch.ops.mkldnn._reorder_convolution_weight(channels_last, PADDING, _ONES, _ONES, 1, shape)
    return prepacked


def convolve(x: Tensor, kernels: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    """Convolves by 3 x 3 x 3 with zero padding around the frames, none along time.

    Args:
        x: (B, F + 2, H, W, C), contiguous, on the CPU.
        kernels: the result of `transform_kernel`, each prepacked.
        bias: (O).

    Returns:
        (B, F, H, W, O), contiguous.
    """
    frames, output_frames = x.shape[1] - 2, len(kernels) - 2
    output = torch.empty(x.shape[0], frames, *x.shape[2:4], kernels[0].shape[0], dtype=x.dtype)
    whole = frames // output_frames * output_frames  # frames in full groups
    for begin, end in ((0, whole), (whole, frames)):
        count = min(output_frames, end - begin)
        if not count:
            continue
        inputs = [x[:, begin + index : end + index - count + 1 : output_frames] for index in range(count + 2)]
        run = _conv_f23 if output_frames == F23 else _conv_f43 if count > F23 else _conv_f43_remainder
        run(inputs, kernels, bias, [output[:, begin + index : end : output_frames] for index in range(count)])
    return output


def convolve_repeated_frame(x: Tensor, kernels: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    """Convolves three copies of one frame x (B, 1, H, W, C), as `convolve` does. `F23` takes one 2D convolution."""
    if len(kernels) - 2 == F23:
        return _conv2d(2 * x, kernels[1], bias)
    return convolve(x.expand(-1, 3, -1, -1, -1).contiguous(), kernels, bias)


def _conv_f23(
    inputs: Sequence[Tensor], kernels: Sequence[Tensor], bias: Tensor | None, outputs: Sequence[Tensor]
) -> None:
    """Writes both frames of each pair, or the first only. inputs: the frames that each pair depends on.

    One tensor is reused for the inputs of all convolutions: allocating costs more than the sums.
    """
    m1, m2, m3, m4 = kernels
    before, now, after, *next_after = inputs
    shared = _conv2d(now + after, m2)
    outer = after - now
    inner = _conv2d(outer, m3)
    # Written by copying: to accumulate into its output, oneDNN would round the convolution first.
    outputs[0].copy_(_conv2d(torch.sub(before, after, out=outer), m1, bias, shared + inner))
    if next_after:
        outputs[1].copy_(_conv2d(torch.sub(now, *next_after, out=outer), m4, bias, shared.sub_(inner)))


def _conv_f43(
    inputs: Sequence[Tensor], kernels: Sequence[Tensor], bias: Tensor | None, outputs: Sequence[Tensor]
) -> None:
    """Writes the frames of groups of four, or of three. inputs: the six or five frames that each group depends on."""
    d0, d1, d2, d3, d4, *d5 = inputs
    even, odd = torch.sub(d4, d2, alpha=2), torch.sub(d3, d1, alpha=2)
    near, near_difference = _sum_and_difference(even, odd, S, *kernels[1:3])
    torch.sub(d4, d2, alpha=0.5, out=even)
    torch.sub(d3, d1, alpha=0.5, out=odd)
    far, far_difference = _sum_and_difference(even, odd, T, *kernels[3:5])
    outputs[0].copy_(_conv2d(even.add_(d0).sub_(d2, alpha=2), kernels[0], bias, near + far))
    _scale_and_add_bias(near.add_(far, alpha=4), S**2, bias, outputs[2])
    _scale_and_add_bias(torch.add(near_difference, far_difference, alpha=2, out=far), S, bias, outputs[1])
    if d5:
        torch.sub(d5[0], d3, alpha=2.5, out=odd)
        near_difference.add_(far_difference, alpha=8).mul_(S**3)
        outputs[3].copy_(_conv2d(odd.add_(d1), kernels[5], bias, near_difference))


def _conv_f43_remainder(
    inputs: Sequence[Tensor], kernels: Sequence[Tensor], bias: Tensor | None, outputs: Sequence[Tensor]
) -> None:
    """Writes two frames, or one, by the kernels of `F43`. inputs: the four or three frames that they depend on."""
    d0, d1, d2, *d3 = inputs
    near, difference = _sum_and_difference(d2, d1, S, *kernels[1:3])
    outputs[0].copy_(_conv2d(torch.sub(d0, d2, alpha=2), kernels[0], bias, near.mul_(-1.5)))
    if d3:
        outputs[1].copy_(_conv2d(torch.sub(d3[0], d1, alpha=0.5), kernels[5], bias, difference.mul_(-1.5 * S)))


def _sum_and_difference(even: Tensor, odd: Tensor, point: float, plus: Tensor, minus: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the sum and the difference of the convolutions at an interpolation point and at its negative."""
    transformed = torch.add(even, odd, alpha=point)
    positive = _conv2d(transformed, plus)
    negative = _conv2d(torch.sub(even, odd, alpha=point, out=transformed), minus)
    return positive + negative, positive.sub_(negative)


def _scale_and_add_bias(x: Tensor, factor: float, bias: Tensor | None, out: Tensor) -> None:
    """Writes x * factor + bias into `out`, rounded once."""
    if bias is None:
        torch.mul(x, factor, out=out)
    else:
        torch.addcmul(bias, x, x.new_ones(()), value=factor, out=out)


def _conv2d(x: Tensor, kernel: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """Convolves frames x (B, F, H, W, C) by 3 x 3 -> (B, F, H, W, O), and adds the bias and the residual."""
    images = _frames_as_batch(x)
    if residual is None:
        output = torch.ops.mkldnn._convolution_pointwise(images, kernel, bias, PADDING, _ONES, _ONES, 1, "none", [], "")
    else:
        output = torch.ops.mkldnn._convolution_pointwise.binary(
            images, _frames_as_batch(residual), kernel, bias, PADDING, _ONES, _ONES, 1, "add", 1.0, None, [], None
        )
    return output.permute(0, 2, 3, 1).unflatten(0, x.shape[:2])


def _frames_as_batch(x: Tensor) -> Tensor:
    """Views x (B, F, H, W, C) as (B F, C, H, W) in channels_last memory."""
    return x.flatten(0, 1).permute(0, 3, 1, 2)
