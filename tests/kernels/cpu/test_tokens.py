"""Norms, modulation and RoPE of tokens in bfloat16 on a CPU are the float32 result, rounded once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kadr.kernels import fused, mode, reference
from kadr.kernels.cpu import tokens
from tests.oracles import randn

HALF_BFLOAT16_ULP = 2.0**-8
SAMPLES, COUNT, WIDTH = 2, 37, 96


@pytest.fixture(autouse=True)
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices of ten rows, the last of them shorter."""
    monkeypatch.setattr(tokens, "SLICE_ELEMENTS", 10 * WIDTH)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return randn(*shape, seed=seed).bfloat16()


def assert_rounded_once(output: Tensor, expected: Tensor) -> None:
    assert output.dtype == torch.bfloat16
    assert output.is_contiguous()
    torch.testing.assert_close(output.float(), expected, rtol=1.01 * HALF_BFLOAT16_ULP, atol=2e-6)


@torch.no_grad()
@pytest.mark.parametrize("shape", [(1, 1), (SAMPLES, 1), (SAMPLES, COUNT), (1, COUNT)])
def test_norm_modulate_rounds_once(shape: tuple[int, int]) -> None:
    x, (scale, shift) = draw(SAMPLES, COUNT, WIDTH), (draw(*shape, WIDTH, seed=seed) for seed in (1, 2))
    expected = reference.norm_modulate(x.float(), scale.float(), shift.float())
    assert_rounded_once(fused.norm_modulate(x, scale, shift), expected)
    residual, modulated = fused.gate_residual_norm_modulate(x, scale, x, scale, shift)
    assert torch.equal(residual, reference.gate_residual(x, scale, x))
    assert torch.equal(modulated, fused.norm_modulate(residual, scale, shift))


@torch.no_grad()
@pytest.mark.parametrize("samples", [None, 1, SAMPLES])
def test_norm_rope_rounds_once(samples: int | None) -> None:
    x, weight = draw(SAMPLES, COUNT, WIDTH).transpose(0, 1).contiguous().transpose(0, 1), draw(WIDTH, seed=1)
    rotation = None
    if samples:
        angle = randn(samples, COUNT, WIDTH // 2, seed=2)
        rotation = torch.stack([angle.cos(), angle.sin()], dim=-1)
    expected = reference.norm_rope(x.float(), weight.float(), rotation, 1e-5, 0.3)
    assert_rounded_once(fused.norm_rope(x, weight, rotation, 1e-5, 0.3), expected)


def test_gradients_other_dtypes_and_the_reference_mode_keep_the_definition() -> None:
    x = draw(1, 3, WIDTH)
    assert not tokens.is_supported(x)  # gradients are enabled
    with torch.no_grad():
        assert tokens.is_supported(x, None)
        assert not tokens.is_supported(x, x.float())
        assert not tokens.is_supported(x.to("meta"))
        with mode.override(mode.REFERENCE):
            assert not tokens.is_supported(x)
