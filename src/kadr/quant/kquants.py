"""Numbers into the K formats of GGML: blocks of 256, whose groups have a scale each, or a scale and an offset.

What comes back is scale * code, or scale * code - offset. Scales and offsets are themselves small whole numbers times a
factor of the block. The scale that rounds a group with the least error is not the one that just spans it, so several
are tried, each improved by least squares, and the best is kept. That is the search of llama.cpp's reference quantizers
(`make_qx_quants` and `make_qkx2_quants` in ggml-quants.c) except for this:

- The error of a candidate is had from sums over the group, without another pass over its numbers.
- Seven candidates are enough where the best is rounded and fitted once more, and its scale again after its offset.
- All five formats weigh errors as llama.cpp's Q4_K does, by |x| + rms(x).

Blocks lie side by side here, numbers (256, N): every step is one operation on many blocks. `kernels.dequant` describes
the layouts.
"""

from __future__ import annotations

import torch
from torch import Tensor

CANDIDATES = 7
SPAN = 0.9  # codes by which the first candidate falls short of the range of codes, and by which the last exceeds it
SMALLEST_HALF = 2.0**-24  # of float16; with a factor of 0 a block would vanish
SINGULAR = 1e-4  # of its first term; a determinant below is rounding, and what it divides is noise


def q2_k(numbers: Tensor) -> Tensor:
    """fp32 (256, N) -> bytes (84, N)."""
    codes, scales, offsets, factors = _with_offsets(numbers.unflatten(0, (16, 16)), 3, 15)
    return torch.cat([gathered(torch.cat([scales, offsets]), 4, 16), gathered(codes, 2, 32), factors])


def q3_k(numbers: Tensor) -> Tensor:
    """fp32 (256, N) -> bytes (110, N)."""
    codes, scales, factor = _without_offsets(numbers.unflatten(0, (16, 16)), 4, 32)
    scales = scales.add_(32).view(torch.uint8)
    split = [gathered(scales & 15, 4, 8), gathered(scales >> 4, 2, 4)]
    return torch.cat([gathered(codes >> 2, 1, 32), gathered(codes & 3, 2, 32), *split, factor])


def q4_k(numbers: Tensor) -> Tensor:
    """fp32 (256, N) -> bytes (144, N)."""
    codes, scales, offsets, factors = _with_offsets(numbers.unflatten(0, (8, 32)), 15, 63)
    return torch.cat([factors, _in_twelve_bytes(scales, offsets), gathered(codes, 4, 32)])


def q5_k(numbers: Tensor) -> Tensor:
    """fp32 (256, N) -> bytes (176, N)."""
    codes, scales, offsets, factors = _with_offsets(numbers.unflatten(0, (8, 32)), 31, 63)
    split = [gathered(codes >> 4, 1, 32), gathered(codes & 15, 4, 32)]
    return torch.cat([factors, _in_twelve_bytes(scales, offsets), *split])


def q6_k(numbers: Tensor) -> Tensor:
    """fp32 (256, N) -> bytes (210, N)."""
    codes, scales, factor = _without_offsets(numbers.unflatten(0, (16, 16)), 32, 128)
    return torch.cat([gathered(codes & 15, 4, 64), gathered(codes >> 4, 2, 32), scales.view(torch.uint8), factor])


def gathered(codes: Tensor, bits: int, width: int) -> Tensor:
    """Whole numbers of so many bits, several to a byte.

    Args:
        codes: uint8 (count, N). The first `width` come into the lowest bits of `width` bytes, the next into the bits
            above, and so on; then comes the next run of bytes.

    Returns:
        uint8 (count * bits / 8, N).
    """
    runs = codes.unflatten(0, (-1, 8 // bits, width))
    made = runs[:, 0]
    for place in range(1, 8 // bits):
        made = made | runs[:, place] << bits * place
    return made.flatten(0, 1)


def halves(values: Tensor) -> Tensor:
    """values (1, N) as float16: bytes (2, N).

    Raises:
        ValueError: one is beyond float16.
    """
    half = values.half()
    if not bool(half.isfinite().all()):
        raise ValueError("its numbers are so large that the scale of a block does not fit into float16")
    return half.view(torch.uint8).view(-1, 2).t()


def inverse(x: Tensor) -> Tensor:
    """1 / x; 0 where that is beyond fp32, as for a block of zeros."""
    inverted = 1 / x
    return torch.where(inverted.isinf(), 0, inverted)


def _in_twelve_bytes(scales: Tensor, offsets: Tensor) -> Tensor:
    """Of Q4_K and Q5_K; uint8 (8, N) each, of 6 bits."""
    first = [part[:4] | part[4:] >> 4 << 6 for part in (scales, offsets)]
    return torch.cat([*first, scales[4:] & 15 | offsets[4:] << 4])


def _with_offsets(x: Tensor, top: int, top_scale: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """scale * code - offset for x, none of them negative.

    Args:
        x: fp32 (groups, numbers of a group, N).
        top: the largest code.
        top_scale: the largest whole number for a scale or an offset.

    Returns:
        codes uint8 (256, N); scales and offsets uint8 (groups, N); their two factors in bytes (4, N).
    """
    lowest = x.amin(1, keepdim=True).clamp_(max=0)
    step = (x.amax(1, keepdim=True) - lowest) / top
    unit = inverse(step)
    y = x * unit
    weights = _weights(y)
    y.sub_(lowest * unit)  # from 0 to top
    slope, start = _fit_line(y, weights, lowest * -unit, top)
    wanted = -(start * step + lowest)
    offsets, offset_factor = _rounded(wanted, wanted.amax(0, keepdim=True) / top_scale, 0, top_scale)
    y.add_((offsets * offset_factor + lowest) * unit)  # what is left for scale * code, now that the offset is known
    wanted = step * _fit_slope(y, weights, slope, top)
    scales, factor = _rounded(wanted, wanted.amax(0, keepdim=True) / top_scale, 0, top_scale)
    codes = y.mul_(inverse(scales * factor * unit)).round_().clamp_(0, top)
    factors = torch.cat([halves(factor[0]), halves(offset_factor[0])])
    return codes.to(torch.uint8).flatten(0, 1), scales[:, 0].to(torch.uint8), offsets[:, 0].to(torch.uint8), factors


def _without_offsets(x: Tensor, top: int, top_scale: int) -> tuple[Tensor, Tensor, Tensor]:
    """scale * (code - top) for x, with codes below 2 * top, and scales and their factors of either sign.

    Args:
        x: fp32 (groups, numbers of a group, N).
        top_scale: scales are whole numbers from -top_scale to top_scale - 1.

    Returns:
        codes uint8 (256, N); scales int8 (groups, N); their factor in bytes (2, N).
    """
    step = _extreme(x, 1) / -top  # there is one code more on the negative side: the extreme takes it
    unit = inverse(step)
    y = x * unit
    wanted = step * _search_slope(y, _weights(y), top)
    scales, factor = _rounded(wanted, _extreme(wanted, 0) / -top_scale, -top_scale, top_scale - 1)
    codes = y.mul_(inverse(scales * factor * unit)).round_().clamp_(-top, top - 1).add_(top)
    return codes.to(torch.uint8).flatten(0, 1), scales[:, 0].to(torch.int8), halves(factor[0])


def _fit_line(y: Tensor, weights: Tensor, room: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """slope, start (groups, 1, N): y is best rounded to slope * code + start, with start at most `room`."""
    weighted = weights * y
    total, total_y = weights.sum(1, keepdim=True), weighted.sum(1, keepdim=True)
    slope, start, least = torch.ones_like(room), torch.zeros_like(room), torch.full_like(room, torch.inf)
    codes, spare = torch.empty_like(y), torch.empty_like(y)
    for stretch in (*_stretches(top), None):
        if stretch is None:
            torch.sub(y, start, out=codes).div_(slope)
        else:
            torch.mul(y, stretch, out=codes)
        sum_codes, sum_y, sum_squares = _moments(weights, weighted, codes.round_().clamp_(0, top), spare)
        determinant = total * sum_squares - sum_codes.square()
        b = torch.minimum((sum_squares * total_y - sum_codes * sum_y) / determinant, room)
        a = (sum_y - b * sum_codes) / sum_squares
        # The sum of weights * (a * codes + b - y)^2, but for that of y^2, which all candidates share.
        error = b * (b * total - 2 * total_y + 2 * a * sum_codes) + a * (a * sum_squares - 2 * sum_y)
        better = (error < least) & (determinant > SINGULAR * total * sum_squares)
        slope, start = torch.where(better, a, slope), torch.where(better, b, start)
        least = torch.where(better, error, least)
    return slope, start


def _search_slope(y: Tensor, weights: Tensor, top: int) -> Tensor:
    """slope (groups, 1, N): y is best rounded to slope * code, codes from -top to top - 1."""
    weighted, codes, spare = weights * y, torch.empty_like(y), torch.empty_like(y)
    slope = torch.ones_like(y[:, :1])
    most = torch.zeros_like(slope)
    for stretch in _stretches(top):
        torch.mul(y, stretch, out=codes).round_().clamp_(-top, top - 1)
        _, sum_y, sum_squares = _moments(weights, weighted, codes, spare)
        gain = sum_y.square() / sum_squares  # what such codes take off the sum of squares
        better = gain > most  # which nothing is in a group of zeros
        slope, most = torch.where(better, sum_y / sum_squares, slope), torch.where(better, gain, most)
    return slope


def _fit_slope(y: Tensor, weights: Tensor, slope: Tensor, top: int) -> Tensor:
    """The slope that suits best the codes, from 0 to top, that y has with this one."""
    codes = (y / slope).round_().clamp_(0, top)
    _, sum_y, sum_squares = _moments(weights, weights * y, codes, torch.empty_like(y))
    return torch.where(sum_squares > 0, sum_y / sum_squares, slope)


def _moments(weights: Tensor, weighted: Tensor, codes: Tensor, spare: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The weighted sums of code, y * code and code^2 in each group.

    Args:
        weighted: weights * y.
        spare: like y, to write into.
    """
    sum_y = torch.mul(weighted, codes, out=spare).sum(1, keepdim=True)
    sum_codes = torch.mul(weights, codes, out=spare).sum(1, keepdim=True)
    return sum_codes, sum_y, spare.mul_(codes).sum(1, keepdim=True)


def _stretches(top: int) -> list[float]:
    """What numbers that just span the codes are multiplied with before they are rounded."""
    return [1 + SPAN * (2 * index / (CANDIDATES - 1) - 1) / top for index in range(CANDIDATES)]


def _weights(y: Tensor) -> Tensor:
    """What an error counts: more where a number is large. y (groups, numbers, N)."""
    return y.abs() + y.square().mean(1, keepdim=True).sqrt_()


def _extreme(x: Tensor, dim: int) -> Tensor:
    """What is farthest from 0, with its sign."""
    highest, lowest = x.amax(dim, keepdim=True), x.amin(dim, keepdim=True)
    return torch.where(-lowest > highest, lowest, highest)


def _rounded(values: Tensor, factor: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """values (groups, 1, N) as whole numbers in fp32 times a factor (1, 1, N) in float16.

    Args:
        factor: what would bring the largest value to `low` or `high`.
    """
    # Half of float16's smallest step is added: where its steps are coarse, below 6e-5, that rounds away from 0, and the
    # largest value is not cut off; elsewhere it is nothing.
    factor = (factor + factor.sign() * (SMALLEST_HALF / 2)).half().float()
    factor = torch.where(factor == 0, SMALLEST_HALF, factor)
    return (values / factor).round_().clamp_(low, high), factor
