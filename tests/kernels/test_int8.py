"""Matmuls in 8-bit integers and the Hadamard transform: exact sums, and bounded rounding errors."""

from __future__ import annotations

import pytest
import torch

from kadr.kernels import int8
from kadr.kernels.hadamard import hadamard_transform


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_quantized_rows_are_off_by_at_most_half_a_step() -> None:
    x = randn(5, 64) * torch.tensor([1e-6, 1.0, 300.0, 1e4, 0.0])[:, None]
    codes, scale = int8.quantize_rows(x)
    assert codes.dtype == torch.int8
    assert codes.abs().max() == 127
    assert ((codes * scale - x).abs() <= 0.5001 * scale).all()


@pytest.mark.parametrize("rows", [1, 16, 17, 300])
def test_linear_equals_the_product_of_the_codes(rows: int) -> None:
    x, weight, bias = randn(2, rows, 96), randn(72, 96, seed=1), randn(72, seed=2)
    codes, scale = int8.quantize_rows(weight)
    tokens, scales = int8.quantize_rows(x.reshape(-1, 96))
    exact = (tokens.double() * scales) @ (codes.double() * scale).T + bias
    output = int8.linear(x, codes, scale.flatten(), bias)
    assert output.shape == (2, rows, 72)
    torch.testing.assert_close(output.double().reshape(-1, 72), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 0.011), (torch.bfloat16, 0.012)])
def test_on_normal_numbers_the_error_is_about_one_percent(dtype: torch.dtype, bound: float) -> None:
    x, weight = randn(64, 512), randn(256, 512, seed=1)
    codes, scale = int8.quantize_rows(weight)
    output = int8.linear(x.to(dtype), codes, scale.flatten(), None)
    assert output.dtype == dtype
    expected = x @ weight.T
    assert 0.004 < float((output.float() - expected).norm() / expected.norm()) < bound


def test_a_token_of_zeros_gives_the_bias() -> None:
    codes, scale = int8.quantize_rows(randn(8, 16))
    bias = randn(8, seed=3)
    assert torch.equal(int8.linear(torch.zeros(3, 16), codes, scale.flatten(), bias), bias.expand(3, 8))


@pytest.mark.parametrize("block_size", [2, 64, 128, 256, 1024])
def test_the_hadamard_transform_is_its_own_inverse(block_size: int) -> None:
    x = randn(3, 1024)
    rotated = hadamard_transform(x, block_size)
    torch.testing.assert_close(rotated.norm(), x.norm())
    torch.testing.assert_close(hadamard_transform(rotated, block_size), x, rtol=1e-4, atol=1e-5)
    assert (rotated - x).norm() > 0.5 * x.norm()


def test_the_hadamard_transform_has_sylvesters_order() -> None:
    matrix = torch.ones(1, 1)
    for _ in range(8):
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    x = randn(2, 512)
    torch.testing.assert_close(
        hadamard_transform(x, 256), (x.view(2, 2, 256) @ matrix / 16).view(2, 512), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("block_size", [0, 3, 96, 2048])
def test_a_block_size_that_does_not_fit_is_refused(block_size: int) -> None:
    with pytest.raises(ValueError, match="power of two that divides 1024"):
        hadamard_transform(torch.zeros(1, 1024), block_size)
