"""Convolution over time by fewer products: the same numbers, for any count of frames."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kadr.kernels.cpu import winograd
from tests.oracles import randn, relative_error

together = pytest.mark.parametrize("together", [winograd.F23, winograd.F43])
pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")


def packed(weight: Tensor, height: int, width: int, together: int) -> list[Tensor]:
    return [winograd.prepack_kernel(kernel, 1, height, width) for kernel in winograd.transform_kernel(weight, together)]


def plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (B, F + 2, H, W, C) -> (B, F, H, W, O)."""
    return F.conv3d(x.movedim(-1, 1), weight, bias, padding=(0, 1, 1)).movedim(1, -1)


@together
@pytest.mark.parametrize("frames", [1, 2, 3, 4, 5, 6, 7, 9])
@pytest.mark.parametrize("batch", [1, 2])
def test_it_equals_the_plain_convolution_for_any_count_of_frames(batch: int, frames: int, together: int) -> None:
    x, weight, bias = randn(batch, frames + 2, 5, 6, 24), randn(40, 24, 3, 3, 3, seed=2) / 25, randn(40, seed=3)
    made = winograd.convolve(x, packed(weight, 5, 6, together), bias)
    assert made.is_contiguous()
    assert relative_error(made, plain(x, weight, bias)) <= 2e-6


@together
@pytest.mark.parametrize("frames", [1, 2, 3, 4])
def test_it_does_without_a_bias(frames: int, together: int) -> None:
    x, weight = randn(1, frames + 2, 4, 4, 16), randn(16, 16, 3, 3, 3, seed=2) / 20
    assert relative_error(winograd.convolve(x, packed(weight, 4, 4, together), None), plain(x, weight, None)) <= 2e-6


@together
def test_three_equal_frames_are_one_picture(together: int) -> None:
    x, weight, bias = randn(2, 1, 5, 6, 24), randn(40, 24, 3, 3, 3, seed=2) / 25, randn(40, seed=3)
    made = winograd.convolve_repeated_frame(x, packed(weight, 5, 6, together), bias)
    assert relative_error(made, plain(x.expand(-1, 3, -1, -1, -1), weight, bias)) <= 2e-6


def test_in_bfloat16_its_error_is_less_than_twice_that_of_the_plain_one() -> None:
    x, weight, bias = randn(1, 10, 16, 16, 128), randn(128, 128, 3, 3, 3, seed=2) / 59, randn(128, seed=3)
    narrow = [tensor.bfloat16() for tensor in (x, weight, bias)]
    exact = plain(*(tensor.float() for tensor in narrow))
    own = relative_error(
        winograd.convolve(narrow[0], packed(narrow[1], 16, 16, winograd.F23), narrow[2]).float(), exact
    )
    assert 0.001 < own < 2 * relative_error(plain(*narrow).float(), exact)


@together
def test_a_large_weight_is_worked_on_in_pieces(monkeypatch: pytest.MonkeyPatch, together: int) -> None:
    weight = randn(10, 8, 3, 3, 3)
    whole = winograd.transform_kernel(weight, together)
    monkeypatch.setattr(winograd, "WINOGRAD_SLICE_ELEMENTS", 3 * weight[0].numel())
    assert all(
        torch.equal(one, other) for one, other in zip(winograd.transform_kernel(weight, together), whole, strict=True)
    )
