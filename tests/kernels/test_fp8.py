"""Products of 8-bit floats: each way to them gives the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kadr.errors import KadrWarning
from kadr.kernels import fp8, reference
from kadr.kernels.fp8 import E4M3, FP32_MATMUL, SCALED_MM, UNSCALED_MM

HERE = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def coded(rows: int, columns: int, seed: int) -> tuple[Tensor, Tensor]:
    return reference.quantize_rows(drawn(rows, columns, seed=seed), E4M3)


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Take the CPU for a GPU with units for 8-bit floats, whose library may lack some ways."""

    def pretend(**ways: Any) -> None:
        monkeypatch.setattr(fp8, "has_fp8_units", lambda device: True)
        for name, run in ways.items():
            monkeypatch.setitem(fp8._MATMULS, name, run)
        fp8.reset()

    yield pretend
    fp8.reset()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("name", [SCALED_MM, UNSCALED_MM, FP32_MATMUL])
def test_every_way_gives_the_product_of_the_codes(name: str, biased: bool, dtype: torch.dtype) -> None:
    (codes, scales), (weight, scale) = coded(33, 64, 0), coded(48, 64, 1)
    bias = drawn(48, seed=2).to(dtype) if biased else None
    exact = (codes.double() * scales) @ (weight.double() * scale).T + (bias.double() if bias is not None else 0)
    made = fp8._MATMULS[name](codes, scales, weight, scale.flatten(), bias, dtype)
    assert made.dtype == dtype
    error = (made.double() - exact).norm() / exact.norm()
    assert error < {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 3e-4}[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_on_normal_numbers_the_error_is_about_four_percent(dtype: torch.dtype) -> None:
    x, (weight, scale) = drawn(2, 32, 512), coded(256, 512, 1)
    bias = drawn(256, seed=2)
    made = fp8.linear(x.to(dtype), weight, scale.flatten(), bias.to(dtype))
    assert made.shape == (2, 32, 256)
    assert made.dtype == dtype
    right = x @ drawn(256, 512, seed=1).T + bias
    assert 0.02 < float((made.float() - right).norm() / right.norm()) < 0.045


def test_rows_of_all_sizes_are_rounded_alike() -> None:
    """A scale for each row: large and small tokens lose the same share."""
    x, (weight, scale) = drawn(1, 512), coded(64, 512, 1)
    small, large = (fp8.linear(x * factor, weight, scale.flatten(), None) / factor for factor in (2.0**-12, 2.0**12))
    torch.testing.assert_close(small, large)


def test_a_token_of_zeros_gives_the_bias() -> None:
    weight, scale = coded(32, 16, 0)
    bias = drawn(32, seed=3)
    assert torch.equal(fp8.linear(torch.zeros(3, 16), weight, scale.flatten(), bias), bias.expand(3, 32))


def test_without_a_gpu_it_is_the_definition() -> None:
    assert not fp8.has_fp8_units(HERE)
    assert fp8.select_matmul(HERE, torch.bfloat16) == FP32_MATMUL


def test_the_first_way_that_works_is_gone(a_gpu: Callable[..., None]) -> None:
    def lacks(*_: Any) -> Tensor:
        raise RuntimeError("Invalid scaling configuration")

    def wrong(*given: Any) -> Tensor:
        return fp8._fp32_matmul(*given) * 1.1

    a_gpu()
    assert fp8.select_matmul(HERE, torch.bfloat16) == SCALED_MM
    for broken in (lacks, wrong):
        a_gpu(scaled=broken)
        assert fp8.select_matmul(HERE, torch.bfloat16) == UNSCALED_MM
    a_gpu(scaled=lacks, unscaled=wrong)
    with pytest.warns(KadrWarning, match="Invalid scaling configuration; unscaled: wrong by 10 %"):
        assert fp8.select_matmul(HERE, torch.bfloat16) == FP32_MATMUL


@pytest.mark.parametrize("sides, right", [((48, 64), True), ((40, 64), False), ((48, 72), False)])
def test_sides_must_be_multiples_of_sixteen(sides: tuple[int, int], right: bool) -> None:
    assert fp8.supports_shape(*sides) is right
