"""Figures of tensors whose values are known."""

from __future__ import annotations

import math

import pytest
import torch

from kadr.selftest import figures
from kadr.selftest.scene import draw_circle_clip
from kadr.shapes import Size


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_worst_row_is_the_one_that_is_zero() -> None:
    expected = randn(2, 50, 16)
    actual = expected.clone()
    actual[1, 7] = 0
    assert figures.worst_row(actual, expected) == (pytest.approx(1.0), 57)
    actual[0, 3, 2] = math.nan
    assert figures.worst_row(actual, expected) == (math.inf, 3)
    assert figures.worst_row(actual, expected[:1]).error == math.inf


def test_rows_of_zeros_are_compared_with_the_others() -> None:
    expected = randn(4, 8)
    expected[2] = 0
    assert figures.worst_row(expected + 1e-4 * (expected == 0), expected).error < 0.05


def test_velocity_figures_of_zero_and_of_half_are_known() -> None:
    v = randn(100, 8)
    assert figures.error_ratio(torch.zeros_like(v), v) == pytest.approx(1)
    assert figures.error_ratio(v / 2, v) == pytest.approx(0.25)
    assert figures.calibration_slope(v / 2, v) == pytest.approx(2)


def test_spectra_tell_noise_images_and_grids_apart() -> None:
    clip = draw_circle_clip(Size(128, 96), 3)[0].transpose(0, 1)
    grid = clip.clone()
    grid[..., ::2, ::2] += 0.5
    assert figures.high_frequency_share(clip) < 0.02
    assert figures.high_frequency_share(randn(3, 3, 96, 128)) == pytest.approx(0.75, abs=0.02)
    assert figures.grid_share(clip) < 5e-4 < 0.01 < figures.grid_share(grid)


def test_residual_of_a_constant_colour_is_one() -> None:
    clip = draw_circle_clip(Size(64, 64), 9)
    constant = clip.mean((2, 3, 4), keepdim=True).expand_as(clip)
    assert figures.residual_variance(constant, clip) == pytest.approx(1, rel=1e-5)
    assert figures.psnr(clip, clip) == 100.0


def test_correlation_of_a_constant_is_zero() -> None:
    assert figures.correlation(torch.ones(9), randn(9)) == 0.0
    assert figures.correlation(randn(9), 2 * randn(9) + 1) == pytest.approx(1)
