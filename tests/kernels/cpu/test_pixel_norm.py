"""Norm, modulation and SiLU in slices equal the definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kadr.kernels import fused, mode, reference
from kadr.kernels.cpu import pixel_norm
from tests.oracles import randn, relative_error


def video(dtype: torch.dtype, batch: int = 2) -> Tensor:
    x = randn(batch, 32, 3, 5, 4).to(dtype)
    return x.contiguous(memory_format=torch.channels_last_3d)


@pytest.fixture(params=[1, 40 * 32, 10**6])
def slice_elements(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(pixel_norm, "PIXEL_NORM_SLICE_ELEMENTS", request.param)
    return request.param


@torch.no_grad()
@pytest.mark.parametrize("modulation_rows", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_equals_the_definition_for_every_slice_size(
    dtype: torch.dtype, modulation_rows: int, slice_elements: int
) -> None:
    x, original = video(dtype), video(dtype)
    scale_shift = (
        [randn(modulation_rows, 32, seed=seed).to(dtype) for seed in (1, 2)] if modulation_rows else [None, None]
    )
    output = pixel_norm.pixel_norm_modulate_silu(x, *scale_shift)
    exact = reference.pixel_norm_modulate_silu(
        x.double(), *(None if tensor is None else tensor.double() for tensor in scale_shift)
    )
    expected = reference.pixel_norm_modulate_silu(x, *scale_shift)
    assert output.dtype == dtype
    assert output.movedim(1, -1).is_contiguous()
    assert relative_error(output.double(), exact) <= (
        1e-6 if dtype == torch.float32 else 1.05 * relative_error(expected.double(), exact)
    )
    assert torch.equal(x, original)


def test_is_supported_for_channels_last_without_gradients() -> None:
    x, scale_or_shift = video(torch.bfloat16), torch.ones(1, 32, dtype=torch.bfloat16)
    with torch.no_grad():
        assert pixel_norm.is_supported(x, scale_or_shift, scale_or_shift)
        assert pixel_norm.is_supported(x, None, None)
        assert torch.equal(fused.pixel_norm_modulate_silu(x), pixel_norm.pixel_norm_modulate_silu(x))
        assert not pixel_norm.is_supported(x.contiguous(), scale_or_shift, scale_or_shift)
        assert not pixel_norm.is_supported(x[:, :, :0], scale_or_shift, scale_or_shift)
        assert not pixel_norm.is_supported(x.double(), scale_or_shift, scale_or_shift)
        with mode.override(mode.REFERENCE):
            assert not pixel_norm.is_supported(x, scale_or_shift, scale_or_shift)
    assert not pixel_norm.is_supported(x, scale_or_shift, scale_or_shift)  # gradients are enabled
