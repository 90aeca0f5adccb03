"""Convolution over three frames by fewer products: Winograd's F(2, 3) along time (Lavin and Gray, arXiv:1509.09308).

Two frames next to each other are made of four products of pictures where the plain way takes six. With frames d0 to d3
that they see, and the three taps g0 to g2 of the kernel, each a convolution over single pictures:

    m1 = g0 (d0 - d2)    m2 = (g0 + g1 + g2)/2 (d1 + d2)    m3 = (g0 - g1 + g2)/2 (d2 - d1)    m4 = g2 (d1 - d3)
    first = m1 + m2 + m3    second = m2 - m3 - m4

Exact but for rounding. A video in channels_last_3d memory is a batch of pictures in channels_last memory, so the
pictures of all pairs go through oneDNN at once, with weights that lie in its order; what is added after a product is
added before the sums are rounded.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

EDGE = [1, 1]  # padding, and with that stride and dilation, of a picture
_ONES = [1, 1]
PIECE = 4_194_304  # numbers of a weight that are worked on at a time, in float32


def taps(weight: Tensor) -> tuple[Tensor, ...]:
    """weight (O, C, 3, 3, 3) -> the kernels of m1, m2, m3 and -m4, each (O, C, 3, 3) in the weight's dtype."""
    outputs, channels, _, *sides = weight.shape
    made = tuple(weight.new_empty(outputs, channels, *sides) for _ in range(4))
    step = max(1, PIECE // weight[0].numel())
    for start in range(0, outputs, step):
        piece = slice(start, start + step)
        first, middle, last = weight[piece].float().unbind(2)
        outer = first + last
        for kernel, values in zip(made, (first, (outer + middle) / 2, (outer - middle) / 2, -last), strict=True):
            kernel[piece] = values
    return made


def pack(kernel: Tensor, pictures: int, height: int, width: int) -> Tensor:
    """A kernel (O, C, 3, 3) in the order that oneDNN reads it best in, for pictures of such a size."""
    lying = kernel.contiguous(memory_format=torch.channels_last)
    shape = [pictures, kernel.shape[1], height, width]
    packed: Tensor = torch.ops.mkldnn._reorder_convolution_weight(lying, EDGE, _ONES, _ONES, 1, shape)
    return packed


def convolve(x: Tensor, kernels: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    """A 3 x 3 x 3 convolution with zeros around the pictures.

    Args:
        x: (B, F + 2, H, W, C), contiguous, on the CPU.
        kernels: of `taps`, each packed.
        bias: (O).

    Returns:
        (B, F, H, W, O), contiguous.
    """
    frames = x.shape[1] - 2
    made = torch.empty(x.shape[0], frames, *x.shape[2:4], kernels[0].shape[0], dtype=x.dtype)
    if pairs := frames // 2:
        seen = [x[:, start : start + 2 * pairs : 2] for start in range(4)]
        _pairs(seen, kernels, bias, made[:, 0 : 2 * pairs : 2], made[:, 1 : 2 * pairs : 2])
    if frames % 2:
        _pairs([x[:, start : start + 1] for start in range(frames - 1, frames + 2)], kernels, bias, made[:, -1:])
    return made


def convolve_still(x: Tensor, kernels: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    """`convolve` of three frames that are one and the same, for a third of the products. x: (B, 1, H, W, C)."""
    return _picture(2 * x, kernels[1], bias)


def _pairs(
    seen: Sequence[Tensor], kernels: Sequence[Tensor], bias: Tensor | None, first: Tensor, second: Tensor | None = None
) -> None:
    """Write the first and the second frames of pairs. seen: the frames that each pair sees; three without a second.

    One tensor is used again for all that goes into the products: fresh memory costs more than the sums do.
    """
    m1, m2, m3, m4 = kernels
    before, now, after, *beyond = seen
    shared = _picture(now + after, m2)
    outer = after - now
    inner = _picture(outer, m3)
    # Written through copies: to add to what is there, oneDNN would round the product first.
    first.copy_(_picture(torch.sub(before, after, out=outer), m1, bias, shared + inner))
    if second is not None:
        second.copy_(_picture(torch.sub(now, *beyond, out=outer), m4, bias, shared.sub_(inner)))


def _picture(x: Tensor, kernel: Tensor, bias: Tensor | None = None, added: Tensor | None = None) -> Tensor:
    """A 3 x 3 convolution of pictures x (B, F, H, W, C) -> (B, F, H, W, O), plus the bias and what else is added."""
    pictures = _batch(x)
    if added is None:
        made = torch.ops.mkldnn._convolution_pointwise(pictures, kernel, bias, EDGE, _ONES, _ONES, 1, "none", [], "")
    else:
        made = torch.ops.mkldnn._convolution_pointwise.binary(
            pictures, _batch(added), kernel, bias, EDGE, _ONES, _ONES, 1, "add", 1.0, None, [], None
        )
    return made.permute(0, 2, 3, 1).unflatten(0, x.shape[:2])


def _batch(x: Tensor) -> Tensor:
    """x (B, F, H, W, C) -> (B F, C, H, W), in channels_last memory."""
    return x.flatten(0, 1).permute(0, 3, 1, 2)
