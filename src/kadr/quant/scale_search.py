"""The scale of each group of numbers, or its scale and offset, that rounds the group with the least error.

That is not the one that just spans the group, so several are tried, each improved by least squares, and the best is
kept: the search of llama.cpp's reference quantizers (`make_qx_quants` and `make_qkx2_quants` in ggml-quants.c) except
for this:

- The error of a candidate is had from sums over the group, without another pass over its numbers.
- Seven candidates are enough where the best is rounded and fitted once more, and its scale again after its offset.
- All formats weigh errors as llama.cpp's Q4_K does, by |x| + rms(x).

Scales and offsets are themselves whole numbers times a factor of the block, in float16. Blocks lie side by side,
x (groups, numbers of a group, N): every step is one operation on many blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

NUM_CANDIDATES = 7
MAX_STRETCH = (
    0.9  # codes by which the first candidate falls short of the range of codes, and by which the last exceeds it
)
MIN_FP16 = 2.0**-24  # of float16; with a factor of 0 a block would vanish
MIN_DETERMINANT_RATIO = 1e-4  # of its first term; a determinant below is rounding, and what it divides is noise


def quantize_affine(x: Tensor, max_code: int, max_scale: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x is about scale * factor * code - offset * offset_factor, none of them negative.

    Args:
        x: fp32 (groups, numbers of a group, N).
        max_code: the largest code.
        max_scale: the largest scale and offset.

    Returns:
        All fp32: codes like x; scales and offsets (groups, 1, N), whole numbers; their factors (1, 1, N).
    """
    lowest = x.amin(1, keepdim=True).clamp_(max=0)
    step = (x.amax(1, keepdim=True) - lowest) / max_code
    unit = safe_reciprocal(step)
    groups = _Groups(x, unit)
    groups.add_offset(lowest * -unit)  # from 0 to top
    slope, start = _fit_line(groups, lowest * -unit, max_code)
    wanted = -(start * step + lowest)
    offsets, offset_factor = _quantize_scales(wanted, wanted.amax(0, keepdim=True) / max_scale, 0, max_scale)
    # What is left for scale * code, now that the offset is known.
    groups.add_offset((offsets * offset_factor + lowest) * unit)
    wanted = step * _fit_slope(groups, slope, max_code)
    scales, factor = _quantize_scales(wanted, wanted.amax(0, keepdim=True) / max_scale, 0, max_scale)
    return (
        groups.round_to_codes(safe_reciprocal(scales * factor * unit), 0, max_code),
        scales,
        offsets,
        factor,
        offset_factor,
    )


def quantize_symmetric(x: Tensor, max_code: int, max_scale: int) -> tuple[Tensor, Tensor, Tensor]:
    """x is about scale * factor * code; codes are from -top to top - 1, scales from -top_scale to top_scale - 1.

    Args:
        x: fp32 (groups, numbers of a group, N).

    Returns:
        All fp32: codes like x; scales (groups, 1, N), whole numbers; their factor (1, 1, N), of either sign.
    """
    step = _signed_abs_max(x, 1) / -max_code  # there is one code more on the negative side: the extreme takes it
    unit = safe_reciprocal(step)
    groups = _Groups(x, unit)
    wanted = step * _search_slope(groups, max_code)
    scales, factor = _quantize_scales(wanted, _signed_abs_max(wanted, 0) / -max_scale, -max_scale, max_scale - 1)
    return groups.round_to_codes(safe_reciprocal(scales * factor * unit), -max_code, max_code - 1), scales, factor


def safe_reciprocal(x: Tensor) -> Tensor:
    """1 / x; 0 where that is beyond fp32, as for a block of zeros."""
    inverted = 1 / x
    return torch.where(inverted.isinf(), 0, inverted)


class _Groups:
    """Numbers y (groups, numbers, N) in units of their group, what an error of each counts, and room to work in.

    The room is made once: fresh memory would cost as much time as the arithmetic.
    """

    def __init__(self, x: Tensor, unit: Tensor) -> None:
        self.y = x * unit
        self._weights, self._weighted_y, self._codes, self._workspace = (torch.empty_like(x) for _ in range(4))
        root_mean_square = torch.mul(self.y, self.y, out=self._workspace).mean(1, keepdim=True).sqrt_()
        torch.abs(self.y, out=self._weights).add_(root_mean_square)  # more where a number is large
        torch.mul(self._weights, self.y, out=self._weighted_y)

    def add_offset(self, amount: Tensor) -> None:
        """Add to y; the weights stay."""
        self.y.add_(amount)
        torch.mul(self._weights, self.y, out=self._weighted_y)

    def weighted_totals(self) -> tuple[Tensor, Tensor]:
        """The sums of the weights, and of y, weighted."""
        return self._weights.sum(1, keepdim=True), self._weighted_y.sum(1, keepdim=True)

    def round_to_codes(self, factor: Tensor | float, low: int, high: int, start: Tensor | None = None) -> Tensor:
        """(y - start) * by in whole numbers; they last until the next call."""
        if start is None:
            torch.mul(self.y, factor, out=self._codes)
        else:
            torch.sub(self.y, start, out=self._codes).mul_(factor)
        return self._codes.round_().clamp_(low, high)

    def weighted_sums(self, codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of code, y * code and code^2, weighted."""
        sum_y = torch.mul(self._weighted_y, codes, out=self._workspace).sum(1, keepdim=True)
        sum_codes = torch.mul(self._weights, codes, out=self._workspace).sum(1, keepdim=True)
        return sum_codes, sum_y, self._workspace.mul_(codes).sum(1, keepdim=True)


def _fit_line(groups: _Groups, max_start: Tensor, max_code: int) -> tuple[Tensor, Tensor]:
    """slope, start (groups, 1, N): y is best rounded to slope * code + start, with start at most `max_start`."""
    total, total_y = groups.weighted_totals()
    twice_total_y = 2 * total_y
    slope, start, least = torch.ones_like(max_start), torch.zeros_like(max_start), torch.full_like(max_start, torch.inf)
    for stretch in (*_candidate_factors(max_code), None):
        codes = (
            groups.round_to_codes(1 / slope, 0, max_code, start)
            if stretch is None
            else groups.round_to_codes(stretch, 0, max_code)
        )
        sum_codes, sum_y, sum_squares = groups.weighted_sums(codes)
        product = total * sum_squares
        determinant = product - sum_codes.square()
        b = torch.minimum((sum_squares * total_y - sum_codes * sum_y) / determinant, max_start)
        a = (sum_y - b * sum_codes) / sum_squares
        # The sum of weights * (a * codes + b - y)^2, as a is the best for b; without that of y^2, which all share.
        error = b * (b * total + a * sum_codes - twice_total_y) - a * sum_y
        better = (error < least) & (determinant > MIN_DETERMINANT_RATIO * product)
        slope, start = torch.where(better, a, slope), torch.where(better, b, start)
        least = torch.where(better, error, least)
    return slope, start


def _search_slope(groups: _Groups, max_code: int) -> Tensor:
    """slope (groups, 1, N): y is best rounded to slope * code, codes from -top to top - 1."""
    slope = torch.ones_like(groups.y[:, :1])
    most = torch.zeros_like(slope)
    for stretch in _candidate_factors(max_code):
        _, sum_y, sum_squares = groups.weighted_sums(groups.round_to_codes(stretch, -max_code, max_code - 1))
        gain = sum_y.square() / sum_squares  # what such codes take off the sum of squares
        better = gain > most  # which nothing is in a group of zeros
        slope, most = torch.where(better, sum_y / sum_squares, slope), torch.where(better, gain, most)
    return slope


def _fit_slope(groups: _Groups, slope: Tensor, max_code: int) -> Tensor:
    """The slope that suits best the codes, from 0 to top, that y has with this one."""
    _, sum_y, sum_squares = groups.weighted_sums(groups.round_to_codes(1 / slope, 0, max_code))
    return torch.where(sum_squares > 0, sum_y / sum_squares, slope)


def _candidate_factors(max_code: int) -> list[float]:
    """What numbers that just span the codes are multiplied with before they are rounded."""
    return [1 + MAX_STRETCH * (2 * index / (NUM_CANDIDATES - 1) - 1) / max_code for index in range(NUM_CANDIDATES)]


def _signed_abs_max(x: Tensor, dim: int) -> Tensor:
    """What is farthest from 0, with its sign."""
    highest, lowest = x.amax(dim, keepdim=True), x.amin(dim, keepdim=True)
    return torch.where(-lowest > highest, lowest, highest)


def _quantize_scales(values: Tensor, factor: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """values (groups, 1, N) as whole numbers in fp32 times a factor (1, 1, N) in float16.

    Args:
        factor: what would bring the largest value to `low` or `high`.
    """
    # Half of float16's smallest step is added: where its steps are coarse, below 6e-5, that rounds away from 0, and the
    # largest value is not cut off; elsewhere it is nothing.
    factor = (factor + factor.sign() * (MIN_FP16 / 2)).half().float()
    factor = torch.where(factor == 0, MIN_FP16, factor)
    return (values / factor).round_().clamp_(low, high), factor
