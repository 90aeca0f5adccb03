"""Matmuls in 8-bit floats: every implementation gives the same values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kadr.errors import KadrWarning
from kadr.kernels import fp8, reference
from kadr.kernels.fp8 import E4M3, FP32_MATMUL, SCALED_MM, UNSCALED_MM

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quantized(rows: int, columns: int, seed: int) -> tuple[Tensor, Tensor]:
    return reference.quantize_rows(randn(rows, columns, seed=seed), E4M3)


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes the CPU count as a GPU with fp8 units, and replaces the matmuls passed by name."""

    def pretend(**matmuls: Any) -> None:
        monkeypatch.setattr(fp8, "has_fp8_units", lambda device: True)
        for name, run in matmuls.items():
            monkeypatch.setitem(fp8._MATMULS, name, run)
        fp8.reset()

    yield pretend
    fp8.reset()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("name", [SCALED_MM, UNSCALED_MM, FP32_MATMUL])
def test_every_matmul_gives_the_product_of_the_codes(name: str, has_bias: bool, dtype: torch.dtype) -> None:
    (codes, scales), (weight, scale) = quantized(33, 64, 0), quantized(48, 64, 1)
    bias = randn(48, seed=2).to(dtype) if has_bias else None
    exact = (codes.double() * scales) @ (weight.double() * scale).T + (bias.double() if bias is not None else 0)
    output = fp8._MATMULS[name](codes, scales, weight, scale.flatten(), bias, dtype)
    assert output.dtype == dtype
    error = (output.double() - exact).norm() / exact.norm()
    assert error < {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 3e-4}[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_on_normal_numbers_the_error_is_about_four_percent(dtype: torch.dtype) -> None:
    x, (weight, scale) = randn(2, 32, 512), quantized(256, 512, 1)
    bias = randn(256, seed=2)
    output = fp8.linear(x.to(dtype), weight, scale.flatten(), bias.to(dtype))
    assert output.shape == (2, 32, 256)
    assert output.dtype == dtype
    expected = x @ randn(256, 512, seed=1).T + bias
    assert 0.02 < float((output.float() - expected).norm() / expected.norm()) < 0.045


def test_large_and_small_rows_have_equal_relative_errors() -> None:
    """Each row has its own scale."""
    x, (weight, scale) = randn(1, 512), quantized(64, 512, 1)
    small, large = (fp8.linear(x * factor, weight, scale.flatten(), None) / factor for factor in (2.0**-12, 2.0**12))
    torch.testing.assert_close(small, large)


def test_a_token_of_zeros_gives_the_bias() -> None:
    weight, scale = quantized(32, 16, 0)
    bias = randn(32, seed=3)
    assert torch.equal(fp8.linear(torch.zeros(3, 16), weight, scale.flatten(), bias), bias.expand(3, 32))


def test_without_a_gpu_the_fp32_matmul_is_selected() -> None:
    assert not fp8.has_fp8_units(CPU)
    assert fp8.select_matmul(CPU, torch.bfloat16) == FP32_MATMUL


def test_the_first_matmul_that_computes_correctly_is_selected(fake_gpu: Callable[..., None]) -> None:
    def not_available(*_: Any) -> Tensor:
        raise RuntimeError("Invalid scaling configuration")

    def wrong_scale(*arguments: Any) -> Tensor:
        return fp8._fp32_matmul(*arguments) * 1.1

    fake_gpu()
    assert fp8.select_matmul(CPU, torch.bfloat16) == SCALED_MM
    for broken in (not_available, wrong_scale):
        fake_gpu(scaled=broken)
        assert fp8.select_matmul(CPU, torch.bfloat16) == UNSCALED_MM
    fake_gpu(scaled=not_available, unscaled=wrong_scale)
    with pytest.warns(KadrWarning, match="Invalid scaling configuration; unscaled: wrong by 10 %"):
        assert fp8.select_matmul(CPU, torch.bfloat16) == FP32_MATMUL


def test_memory_that_runs_out_selects_no_matmul(fake_gpu: Callable[..., None]) -> None:
    def out_of_memory(*_: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    fake_gpu(scaled=out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        fp8.select_matmul(CPU, torch.bfloat16)
    assert not fp8._selected_matmuls


@pytest.mark.parametrize("shape, is_supported", [((48, 64), True), ((40, 64), False), ((48, 72), False)])
def test_sides_must_be_multiples_of_sixteen(shape: tuple[int, int], is_supported: bool) -> None:
    assert fp8.supports_shape(*shape) is is_supported
