"""Winograd convolution along time equals direct convolution, for any number of frames."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kadr.kernels.cpu import winograd
from kadr.kernels.matmul import has_bf16_units
from tests.oracles import randn, relative_error

output_frames = pytest.mark.parametrize("output_frames", [winograd.F23, winograd.F43])
pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")


def prepacked(weight: Tensor, height: int, width: int, output_frames: int) -> list[Tensor]:
    return [
        winograd.prepack_kernel(kernel, 1, height, width) for kernel in winograd.transform_kernel(weight, output_frames)
    ]


def direct_conv3d(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (B, F + 2, H, W, C) -> (B, F, H, W, O)."""
    return F.conv3d(x.movedim(-1, 1), weight, bias, padding=(0, 1, 1)).movedim(1, -1)


@output_frames
@pytest.mark.parametrize("frames", [1, 2, 3, 4, 5, 6, 7, 9])
@pytest.mark.parametrize("batch", [1, 2])
def test_it_equals_direct_convolution_for_any_number_of_frames(batch: int, frames: int, output_frames: int) -> None:
    x, weight, bias = randn(batch, frames + 2, 5, 6, 24), randn(40, 24, 3, 3, 3, seed=2) / 25, randn(40, seed=3)
    output = winograd.convolve(x, prepacked(weight, 5, 6, output_frames), bias)
    assert output.is_contiguous()
    assert relative_error(output, direct_conv3d(x, weight, bias)) <= 2e-6


@output_frames
@pytest.mark.parametrize("frames", [1, 2, 3, 4])
def test_it_equals_direct_convolution_without_a_bias(frames: int, output_frames: int) -> None:
    x, weight = randn(1, frames + 2, 4, 4, 16), randn(16, 16, 3, 3, 3, seed=2) / 20
    assert (
        relative_error(
            winograd.convolve(x, prepacked(weight, 4, 4, output_frames), None), direct_conv3d(x, weight, None)
        )
        <= 2e-6
    )


@output_frames
def test_a_repeated_frame_equals_direct_convolution(output_frames: int) -> None:
    x, weight, bias = randn(2, 1, 5, 6, 24), randn(40, 24, 3, 3, 3, seed=2) / 25, randn(40, seed=3)
    output = winograd.convolve_repeated_frame(x, prepacked(weight, 5, 6, output_frames), bias)
    assert relative_error(output, direct_conv3d(x.expand(-1, 3, -1, -1, -1), weight, bias)) <= 2e-6


@pytest.mark.skipif(not has_bf16_units(), reason="this CPU has no bf16 units, and oneDNN no bf16 convolution")
def test_bf16_error_is_less_than_twice_that_of_direct_convolution() -> None:
    x, weight, bias = randn(1, 10, 16, 16, 128), randn(128, 128, 3, 3, 3, seed=2) / 59, randn(128, seed=3)
    bf16_inputs = [tensor.bfloat16() for tensor in (x, weight, bias)]
    exact = direct_conv3d(*(tensor.float() for tensor in bf16_inputs))
    error = relative_error(
        winograd.convolve(bf16_inputs[0], prepacked(bf16_inputs[1], 16, 16, winograd.F23), bf16_inputs[2]).float(),
        exact,
    )
    assert 0.001 < error < 2 * relative_error(direct_conv3d(*bf16_inputs).float(), exact)


@output_frames
def test_the_slice_size_does_not_change_transformed_kernels(
    monkeypatch: pytest.MonkeyPatch, output_frames: int
) -> None:
    weight = randn(10, 8, 3, 3, 3)
    whole = winograd.transform_kernel(weight, output_frames)
    monkeypatch.setattr(winograd, "WINOGRAD_SLICE_ELEMENTS", 3 * weight[0].numel())
    assert all(
        torch.equal(actual, expected)
        for actual, expected in zip(winograd.transform_kernel(weight, output_frames), whole, strict=True)
    )
