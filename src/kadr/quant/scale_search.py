"""Search for the scale of each group, or its scale and offset, that quantizes the group with the least error.

The scale that exactly covers the range of the group is not the best one. The search tries several candidates, refines
each by least squares and keeps the best. It follows llama.cpp's reference quantizers (`make_qx_quants` and
`make_qkx2_quants` in ggml-quants.c), with these differences:

- The error of a candidate comes from sums over the group, without another pass over its values.
- Seven candidates are enough: the best one is rounded and refitted once, and its scale is refitted after its offset.
- All formats weight errors as llama.cpp's Q4_K does, by |x| + rms(x).

Scales and offsets are stored as integers, each kind times one float16 factor per block. Values are x (groups, group
size, N) with N blocks: every step is one operation on many blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

NUM_CANDIDATES = 7
MAX_STRETCH = 0.9  # codes by which the first candidate falls short of the code range, and by which the last exceeds it
MIN_FP16 = 2.0**-24  # smallest positive float16; with a factor of 0 a block would vanish
MIN_DETERMINANT_RATIO = 1e-4  # of its first term; a smaller determinant is rounding error, and so is what it divides


def quantize_affine(x: Tensor, max_code: int, max_scale: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Quantizes x to scale * factor * code - offset * offset_factor, none of them negative.

    Args:
        x: fp32 (groups, group size, N).
        max_code: the largest code.
        max_scale: the largest integer scale and offset.

    Returns:
        All fp32: codes like x; scales and offsets (groups, 1, N), integers; their factors (1, 1, N).
    """
    lowest = x.amin(1, keepdim=True).clamp_(max=0)
    step = (x.amax(1, keepdim=True) - lowest) / max_code
    unit = safe_reciprocal(step)
    groups = _Groups(x, unit)
    groups.add_offset(lowest * -unit)  # values now span 0 to max_code
    slope, start = _fit_line(groups, lowest * -unit, max_code)
    target = -(start * step + lowest)
    offsets, offset_factor = _quantize_scales(target, target.amax(0, keepdim=True) / max_scale, 0, max_scale)
    # The remainder for scale * code, now that the offset is rounded.
    groups.add_offset((offsets * offset_factor + lowest) * unit)
    target = step * _fit_slope(groups, slope, max_code)
    scales, factor = _quantize_scales(target, target.amax(0, keepdim=True) / max_scale, 0, max_scale)
    return (
        groups.round_to_codes(safe_reciprocal(scales * factor * unit), 0, max_code),
        scales,
        offsets,
        factor,
        offset_factor,
    )


def quantize_symmetric(x: Tensor, max_code: int, max_scale: int) -> tuple[Tensor, Tensor, Tensor]:
    """Quantizes x to scale * factor * code.

    Codes are in [-max_code, max_code - 1], scales in [-max_scale, max_scale - 1].

    Args:
        x: fp32 (groups, group size, N).

    Returns:
        All fp32: codes like x; scales (groups, 1, N), integers; their factor (1, 1, N), of either sign.
    """
    step = _signed_abs_max(x, 1) / -max_code  # the extreme value gets the extra negative code
    unit = safe_reciprocal(step)
    groups = _Groups(x, unit)
    target = step * _search_slope(groups, max_code)
    scales, factor = _quantize_scales(target, _signed_abs_max(target, 0) / -max_scale, -max_scale, max_scale - 1)
    return groups.round_to_codes(safe_reciprocal(scales * factor * unit), -max_code, max_code - 1), scales, factor


def safe_reciprocal(x: Tensor) -> Tensor:
    """Returns 1 / x; 0 where that overflows fp32, as for a block of zeros."""
    reciprocal = 1 / x
    return torch.where(reciprocal.isinf(), 0, reciprocal)


class _Groups:
    """Values y (groups, group size, N) in units of their group, the weight of each error, and a workspace.

    The workspace is allocated once: allocations would cost as much time as the arithmetic.
    """

    def __init__(self, x: Tensor, unit: Tensor) -> None:
        self.y = x * unit
        self._weights, self._weighted_y, self._codes, self._workspace = (torch.empty_like(x) for _ in range(4))
        root_mean_square = torch.mul(self.y, self.y, out=self._workspace).mean(1, keepdim=True).sqrt_()
        torch.abs(self.y, out=self._weights).add_(root_mean_square)  # large values weigh more
        torch.mul(self._weights, self.y, out=self._weighted_y)

    def add_offset(self, amount: Tensor) -> None:
        """Adds to y; the weights stay."""
        self.y.add_(amount)
        torch.mul(self._weights, self.y, out=self._weighted_y)

    def weighted_totals(self) -> tuple[Tensor, Tensor]:
        """Returns the sum of the weights and the weighted sum of y."""
        return self._weights.sum(1, keepdim=True), self._weighted_y.sum(1, keepdim=True)

    def round_to_codes(self, factor: Tensor | float, low: int, high: int, start: Tensor | None = None) -> Tensor:
        """Returns (y - start) * factor rounded and clamped to codes, valid until the next call."""
        if start is None:
            torch.mul(self.y, factor, out=self._codes)
        else:
            torch.sub(self.y, start, out=self._codes).mul_(factor)
        return self._codes.round_().clamp_(low, high)

    def weighted_sums(self, codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the weighted sums of code, y * code and code^2."""
        sum_y = torch.mul(self._weighted_y, codes, out=self._workspace).sum(1, keepdim=True)
        sum_codes = torch.mul(self._weights, codes, out=self._workspace).sum(1, keepdim=True)
        return sum_codes, sum_y, self._workspace.mul_(codes).sum(1, keepdim=True)


def _fit_line(groups: _Groups, max_start: Tensor, max_code: int) -> tuple[Tensor, Tensor]:
    """Returns slope, start (groups, 1, N) with the least error of slope * code + start, where start <= `max_start`."""
    total, total_y = groups.weighted_totals()
    twice_total_y = 2 * total_y
    slope, start, least_error = (
        torch.ones_like(max_start),
        torch.zeros_like(max_start),
        torch.full_like(max_start, torch.inf),
    )
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
        # The sum of weights * (a * codes + b - y)^2 with a optimal for b, less that of y^2, which all candidates share.
        error = b * (b * total + a * sum_codes - twice_total_y) - a * sum_y
        better = (error < least_error) & (determinant > MIN_DETERMINANT_RATIO * product)
        slope, start = torch.where(better, a, slope), torch.where(better, b, start)
        least_error = torch.where(better, error, least_error)
    return slope, start


def _search_slope(groups: _Groups, max_code: int) -> Tensor:
    """Returns slope (groups, 1, N) with the least error of slope * code, codes in [-max_code, max_code - 1]."""
    slope = torch.ones_like(groups.y[:, :1])
    largest_gain = torch.zeros_like(slope)
    for stretch in _candidate_factors(max_code):
        _, sum_y, sum_squares = groups.weighted_sums(groups.round_to_codes(stretch, -max_code, max_code - 1))
        gain = sum_y.square() / sum_squares  # reduction of the sum of squared errors
        better = gain > largest_gain  # False in a group of zeros
        slope, largest_gain = torch.where(better, sum_y / sum_squares, slope), torch.where(better, gain, largest_gain)
    return slope


def _fit_slope(groups: _Groups, slope: Tensor, max_code: int) -> Tensor:
    """Returns the least-squares slope for the codes, from 0 to max_code, that y has with this slope."""
    _, sum_y, sum_squares = groups.weighted_sums(groups.round_to_codes(1 / slope, 0, max_code))
    return torch.where(sum_squares > 0, sum_y / sum_squares, slope)


def _candidate_factors(max_code: int) -> list[float]:
    """Returns the candidate factors for values that just span the codes."""
    return [1 + MAX_STRETCH * (2 * index / (NUM_CANDIDATES - 1) - 1) / max_code for index in range(NUM_CANDIDATES)]


def _signed_abs_max(x: Tensor, dim: int) -> Tensor:
    """Returns the value farthest from 0, with its sign."""
    highest, lowest = x.amax(dim, keepdim=True), x.amin(dim, keepdim=True)
    return torch.where(-lowest > highest, lowest, highest)


def _quantize_scales(values: Tensor, factor: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """Quantizes values (groups, 1, N) to integers in fp32 times a factor (1, 1, N) that float16 can represent.

    Args:
        factor: maps the largest value to `low` or `high`.
    """
    # Half of float16's smallest step is added: below 6e-5, where its steps are coarse, this rounds away from 0, and the
    # largest value is not clamped; elsewhere it has no effect.
    factor = (factor + factor.sign() * (MIN_FP16 / 2)).half().float()
    factor = torch.where(factor == 0, MIN_FP16, factor)
    return (values / factor).round_().clamp_(low, high), factor
