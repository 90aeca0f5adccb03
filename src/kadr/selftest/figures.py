"""Figures of tensors that the stages compare with limits. All are scale-free."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

ROW_FLOOR = 0.01  # of the rms norm of all rows: a row of zeros has no relative error of its own


class WorstRow(NamedTuple):
    """The row with the largest relative error, and that error."""

    error: float
    row: int


def worst_row(actual: Tensor, expected: Tensor) -> WorstRow:
    """Compares rows, along the last axis, of two tensors of one shape.

    The error of a row is |actual - expected| / |expected|; a mean over all rows would hide one that is wrong.
    NaN counts as an infinite error.
    """
    if actual.shape != expected.shape:
        return WorstRow(math.inf, 0)
    actual, expected = (item.reshape(-1, item.shape[-1]).double() for item in (actual, expected))
    norms = expected.norm(dim=1)
    floor = ROW_FLOOR * norms.square().mean().sqrt()
    errors = (actual - expected).norm(dim=1) / norms.clamp(min=max(float(floor), 1e-30))
    errors = torch.nan_to_num(errors, nan=math.inf, posinf=math.inf)
    row = int(errors.argmax())
    return WorstRow(float(errors[row]), row)


def error_ratio(actual: Tensor, expected: Tensor) -> float:
    """Returns the mean square of the error over that of the expected values: 1 for predicting zero."""
    actual, expected = actual.double(), expected.double()
    return float((actual - expected).square().mean() / expected.square().mean())


def calibration_slope(predicted: Tensor, actual: Tensor) -> float:
    """Returns the slope of the regression of actual on predicted values through the origin.

    It is 1 for an estimator with the least mean square error: no multiple of it is closer.
    """
    predicted, actual = predicted.double(), actual.double()
    return float((predicted * actual).mean() / predicted.square().mean())


def correlation(a: Tensor, b: Tensor) -> float:
    """Returns the correlation of all elements; 0 where one is constant or not finite."""
    a, b = (item.double().flatten() - item.double().mean() for item in (a, b))
    value = float((a @ b) / (a.norm() * b.norm()).clamp(min=1e-30))
    return value if math.isfinite(value) else 0.0


def cosine(a: Tensor, b: Tensor) -> float:
    """Returns the cosine of the angle between two vectors."""
    return float(torch.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0))


def psnr(actual: Tensor, expected: Tensor) -> float:
    """Returns the peak signal-to-noise ratio in dB of pixels in [-1, 1]."""
    error = float((actual.double() - expected.double()).square().mean())
    return 10 * math.log10(4 / error) if error > 0 else 100.0


def residual_variance(actual: Tensor, expected: Tensor) -> float:
    """Returns the mean square error over the variance of expected (B, C, F, H, W): 1 for a constant colour."""
    variance = (expected - expected.mean((2, 3, 4), keepdim=True)).double().square().mean()
    return float((actual - expected).double().square().mean() / variance)


def high_frequency_share(frames: Tensor) -> float:
    """Returns the share of the power of frames (F, C, H, W) above half of the highest frequency.

    Images have under 0.05, white noise 0.75.
    """
    power = _power(frames)
    high = torch.maximum(*_frequencies(power)) >= 0.25
    return float(power[high].sum() / power.sum().clamp(min=1e-30))


def grid_share(frames: Tensor) -> float:
    """Returns the share of the power of frames (F, C, H, W) at periods of 2, 4 and 8 pixels both ways.

    A decoder whose output channels are in the wrong places draws such a grid.
    """
    power = _power(frames)
    down, right = _frequencies(power)
    on_grid = (down * 8 % 1 == 0) & (right * 8 % 1 == 0) & (down + right > 0)
    return float(power[on_grid].sum() / power.sum().clamp(min=1e-30))


def _power(frames: Tensor) -> Tensor:
    frames = frames.double()
    return torch.fft.fft2(frames - frames.mean((-2, -1), keepdim=True)).abs().square().mean((0, 1))


def _frequencies(power: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the frequencies of each element, in cycles per pixel, down and right: (H, W) each."""
    down, right = (torch.fft.fftfreq(side, dtype=torch.float64).abs() for side in power.shape)
    return torch.meshgrid(down, right, indexing="ij")  # type: ignore[return-value]
