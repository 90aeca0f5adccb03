"""Products in 8 bits: exact sums, and rounding that stays within its bounds."""

from __future__ import annotations

import pytest
import torch

from kadr.kernels import int8
from kadr.kernels.hadamard import hadamard_transform


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_rows_come_back_within_half_a_step() -> None:
    x = drawn(5, 64) * torch.tensor([1e-6, 1.0, 300.0, 1e4, 0.0])[:, None]
    numbers, scale = int8.quantize_rows(x)
    assert numbers.dtype == torch.int8
    assert numbers.abs().max() == 127
    assert ((numbers * scale - x).abs() <= 0.5001 * scale).all()


@pytest.mark.parametrize("rows", [1, 16, 17, 300])
def test_the_product_is_that_of_the_rounded_numbers(rows: int) -> None:
    x, weight, bias = drawn(2, rows, 96), drawn(72, 96, seed=1), drawn(72, seed=2)
    numbers, scale = int8.quantize_rows(weight)
    tokens, scales = int8.quantize_rows(x.reshape(-1, 96))
    exact = (tokens.double() * scales) @ (numbers.double() * scale).T + bias
    made = int8.linear(x, numbers, scale.flatten(), bias)
    assert made.shape == (2, rows, 72)
    torch.testing.assert_close(made.double().reshape(-1, 72), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 0.011), (torch.bfloat16, 0.012)])
def test_on_normal_numbers_the_error_is_about_one_percent(dtype: torch.dtype, bound: float) -> None:
    x, weight = drawn(64, 512), drawn(256, 512, seed=1)
    numbers, scale = int8.quantize_rows(weight)
    made = int8.linear(x.to(dtype), numbers, scale.flatten(), None)
    assert made.dtype == dtype
    right = x @ weight.T
    assert 0.004 < float((made.float() - right).norm() / right.norm()) < bound


def test_a_token_of_zeros_gives_the_bias() -> None:
    numbers, scale = int8.quantize_rows(drawn(8, 16))
    bias = drawn(8, seed=3)
    assert torch.equal(int8.linear(torch.zeros(3, 16), numbers, scale.flatten(), bias), bias.expand(3, 8))


@pytest.mark.parametrize("block", [2, 64, 128, 256, 1024])
def test_the_rotation_is_orthogonal_and_its_own_inverse(block: int) -> None:
    x = drawn(3, 1024)
    turned = hadamard_transform(x, block)
    torch.testing.assert_close(turned.norm(), x.norm())
    torch.testing.assert_close(hadamard_transform(turned, block), x, rtol=1e-4, atol=1e-5)
    assert (turned - x).norm() > 0.5 * x.norm()


def test_the_rotation_is_that_of_sylvester() -> None:
    right = torch.ones(1, 1)
    for _ in range(8):
        right = torch.cat([torch.cat([right, right], 1), torch.cat([right, -right], 1)])
    x = drawn(2, 512)
    torch.testing.assert_close(
        hadamard_transform(x, 256), (x.view(2, 2, 256) @ right / 16).view(2, 512), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("block", [0, 3, 96, 2048])
def test_a_rotation_that_does_not_fit_is_refused(block: int) -> None:
    with pytest.raises(ValueError, match="power of two that divides 1024"):
        hadamard_transform(torch.zeros(1, 1024), block)
