"""Convolution over three frames by fewer products: Winograd's along time (Lavin and Gray, arXiv:1509.09308).

`F23`, F(2, 3): two frames next to each other are made of four products of pictures where the plain way takes six.
With frames d0 to d3 that they see, and the three taps g0 to g2 of the kernel, each a convolution over single pictures:

    m1 = g0 (d0 - d2)    m2 = (g0 + g1 + g2)/2 (d1 + d2)    m3 = (g0 - g1 + g2)/2 (d2 - d1)    m4 = g2 (d1 - d3)
    first = m1 + m2 + m3    second = m2 - m3 - m4

`F43`, F(4, 3): four frames of six products where the plain way takes twelve, by the polynomials through 0, plus and
minus s, plus and minus t, and infinity. With s t = 1, none of their factors is far from 1; with s = sqrt(1/2) the error
in bfloat16 is three quarters of what it is with the usual 1 and 2 (measured).

    m0 = g0 (d0 - 5/2 d2 + d4)    m5 = g2 (d1 - 5/2 d3 + d5)
    m1, m2 = (g0 +- s g1 + s^2 g2)/(-3/2) ((d4 - 2 d2) +- s (d3 - 2 d1))
    m3, m4 = (g0 +- t g1 + t^2 g2)/6 ((d4 - d2/2) +- t (d3 - d1/2))
    y0 = m0 + (m1 + m2) + (m3 + m4)        y1 = s (m1 - m2) + t (m3 - m4)
    y2 = s^2 (m1 + m2) + t^2 (m3 + m4)     y3 = s^3 (m1 - m2) + t^3 (m3 - m4) + m5

Three frames are four without the last, for five products. Of the same kernels, m0, m1, m2 and m5 make one or two.

All exact but for rounding. A video in channels_last_3d memory is a batch of pictures in channels_last memory, so the
pictures of all groups go through oneDNN at once, with weights that lie in its order; what is added after a product is
added before the sums are rounded.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

PADDING = [1, 1]  # padding, and with that stride and dilation, of a picture
_ONES = [1, 1]
WINOGRAD_SLICE_ELEMENTS = (
    1_048_576  # numbers of a weight that are worked on at a time, in float32: what stays in the cache
)
F23, F43 = 2, 4  # frames at a time
S, T = 0.5**0.5, 2**0.5
# Of each kernel, how much of the three taps it has.
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
    """weight (O, C, 3, 3, 3) -> the kernels for so many frames at a time, each (O, C, 3, 3) in the weight's dtype and
    channels last in memory, where `prepack_kernel` has the least to do.

    Of `F23` they are those of m1, m2, m3 and -m4; of `F43`, of m0 to m5.
    """
    outputs, channels, _, *sides = weight.shape
    made = tuple(weight.new_empty(outputs, *sides, channels) for _ in KERNEL_TRANSFORMS[output_frames])
    step = max(1, WINOGRAD_SLICE_ELEMENTS // weight[0].numel())
    for start in range(0, outputs, step):
        piece = slice(start, start + step)
        # Sorted first, while the piece is in the cache: sums of what lies apart would take four times as long.
        first, middle, last = weight[piece].permute(2, 0, 3, 4, 1).contiguous().float().unbind(0)
        for kernel, (of_first, of_middle, of_last) in zip(made, KERNEL_TRANSFORMS[output_frames], strict=True):
            if of_middle:
                total = torch.mul(first, of_first).add_(middle, alpha=of_middle).add_(last, alpha=of_last)
            else:
                total = of_first * first if of_first else of_last * last
            kernel[piece] = total
    return tuple(kernel.permute(0, 3, 1, 2) for kernel in made)


def prepack_kernel(kernel: Tensor, images: int, height: int, width: int) -> Tensor:
    """A kernel (O, C, 3, 3) in the order that oneDNN reads it best in, for pictures of such a size."""
    lying = kernel.contiguous(memory_format=torch.channels_last)
    shape = [images, kernel.shape[1], height, width]
    packed: Tensor = torch.ops.mkldnn._reorder_convolution_weight(lying, PADDING, _ONES, _ONES, 1, shape)
    return packed


def convolve(x: Tensor, kernels: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    """A 3 x 3 x 3 convolution with zeros around the pictures.

    Args:
        x: (B, F + 2, H, W, C), contiguous, on the CPU.
        kernels: of `transform_kernel`, each packed.
        bias: (O).

    Returns:
        (B, F, H, W, O), contiguous.
    """
    frames, together = x.shape[1] - 2, len(kernels) - 2
    made = torch.empty(x.shape[0], frames, *x.shape[2:4], kernels[0].shape[0], dtype=x.dtype)
    whole = frames // together * together
    for begin, end in ((0, whole), (whole, frames)):
        count = min(together, end - begin)
        if not count:
            continue
        seen = [x[:, begin + place : end + place - count + 1 : together] for place in range(count + 2)]
        run = _conv_f23 if together == F23 else _conv_f43 if count > F23 else _conv_f43_remainder
        run(seen, kernels, bias, [made[:, begin + place : end : together] for place in range(count)])
    return made


def convolve_repeated_frame(x: Tensor, kernels: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    """`convolve` of three frames that are one and the same, x: (B, 1, H, W, C). `F23` do it by a single product."""
    if len(kernels) - 2 == F23:
        return _conv2d(2 * x, kernels[1], bias)
    return convolve(x.expand(-1, 3, -1, -1, -1).contiguous(), kernels, bias)


def _conv_f23(
    inputs: Sequence[Tensor], kernels: Sequence[Tensor], bias: Tensor | None, outputs: Sequence[Tensor]
) -> None:
    """Write the first and the second frames of pairs, or first ones alone. seen: the frames that each pair sees.

    One tensor is used again for all that goes into the products: fresh memory costs more than the sums do.
    """
    m1, m2, m3, m4 = kernels
    before, now, after, *beyond = inputs
    shared = _conv2d(now + after, m2)
    outer = after - now
    inner = _conv2d(outer, m3)
    # Written through copies: to add to what is there, oneDNN would round the product first.
    outputs[0].copy_(_conv2d(torch.sub(before, after, out=outer), m1, bias, shared + inner))
    if beyond:
        outputs[1].copy_(_conv2d(torch.sub(now, *beyond, out=outer), m4, bias, shared.sub_(inner)))


def _conv_f43(
    inputs: Sequence[Tensor], kernels: Sequence[Tensor], bias: Tensor | None, outputs: Sequence[Tensor]
) -> None:
    """Write the frames of groups of four, or of three. seen: the six or five frames that each group sees."""
    d0, d1, d2, d3, d4, *beyond = inputs
    even, odd = torch.sub(d4, d2, alpha=2), torch.sub(d3, d1, alpha=2)
    near, near_apart = _sum_and_difference(even, odd, S, *kernels[1:3])
    torch.sub(d4, d2, alpha=0.5, out=even)
    torch.sub(d3, d1, alpha=0.5, out=odd)
    far, far_apart = _sum_and_difference(even, odd, T, *kernels[3:5])
    outputs[0].copy_(_conv2d(even.add_(d0).sub_(d2, alpha=2), kernels[0], bias, near + far))
    _scale_and_add_bias(near.add_(far, alpha=4), S**2, bias, outputs[2])
    _scale_and_add_bias(torch.add(near_apart, far_apart, alpha=2, out=far), S, bias, outputs[1])
    if beyond:
        torch.sub(beyond[0], d3, alpha=2.5, out=odd)
        near_apart.add_(far_apart, alpha=8).mul_(S**3)
        outputs[3].copy_(_conv2d(odd.add_(d1), kernels[5], bias, near_apart))


def _conv_f43_remainder(
    inputs: Sequence[Tensor], kernels: Sequence[Tensor], bias: Tensor | None, outputs: Sequence[Tensor]
) -> None:
    """Write two frames, or one, by the kernels of four. seen: the four or three frames that they see."""
    d0, d1, d2, *beyond = inputs
    near, apart = _sum_and_difference(d2, d1, S, *kernels[1:3])
    outputs[0].copy_(_conv2d(torch.sub(d0, d2, alpha=2), kernels[0], bias, near.mul_(-1.5)))
    if beyond:
        outputs[1].copy_(_conv2d(torch.sub(beyond[0], d1, alpha=0.5), kernels[5], bias, apart.mul_(-1.5 * S)))


def _sum_and_difference(even: Tensor, odd: Tensor, point: float, plus: Tensor, minus: Tensor) -> tuple[Tensor, Tensor]:
    """The sum and the difference of the products at a point and at its negative."""
    seen = torch.add(even, odd, alpha=point)
    one = _conv2d(seen, plus)
    other = _conv2d(torch.sub(even, odd, alpha=point, out=seen), minus)
    return one + other, one.sub_(other)


def _scale_and_add_bias(x: Tensor, factor: float, bias: Tensor | None, out: Tensor) -> None:
    """Write x * factor + bias, rounded once."""
    if bias is None:
        torch.mul(x, factor, out=out)
    else:
        torch.addcmul(bias, x, x.new_ones(()), value=factor, out=out)


def _conv2d(x: Tensor, kernel: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """A 3 x 3 convolution of pictures x (B, F, H, W, C) -> (B, F, H, W, O), plus the bias and what else is added."""
    pictures = _frames_as_batch(x)
    if residual is None:
        made = torch.ops.mkldnn._convolution_pointwise(pictures, kernel, bias, PADDING, _ONES, _ONES, 1, "none", [], "")
    else:
        made = torch.ops.mkldnn._convolution_pointwise.binary(
            pictures, _frames_as_batch(residual), kernel, bias, PADDING, _ONES, _ONES, 1, "add", 1.0, None, [], None
        )
    return made.permute(0, 2, 3, 1).unflatten(0, x.shape[:2])


def _frames_as_batch(x: Tensor) -> Tensor:
    """x (B, F, H, W, C) -> (B F, C, H, W), in channels_last memory."""
    return x.flatten(0, 1).permute(0, 3, 1, 2)
