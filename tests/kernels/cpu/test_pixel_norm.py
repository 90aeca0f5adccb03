"""Norm, modulation and SiLU by pieces: the same numbers as at once."""

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
def piece(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(pixel_norm, "PIXEL_NORM_SLICE_ELEMENTS", request.param)
    return request.param


@torch.no_grad()
@pytest.mark.parametrize("rows", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_equals_the_definition(dtype: torch.dtype, rows: int, piece: int) -> None:
    x, given = video(dtype), video(dtype)
    bends = [randn(rows, 32, seed=seed).to(dtype) for seed in (1, 2)] if rows else [None, None]
    made = pixel_norm.pixel_norm_modulate_silu(x, *bends)
    exact = reference.pixel_norm_modulate_silu(x.double(), *(None if b is None else b.double() for b in bends))
    right = reference.pixel_norm_modulate_silu(x, *bends)
    assert made.dtype == dtype
    assert made.movedim(1, -1).is_contiguous()
    assert relative_error(made.double(), exact) <= (
        1e-6 if dtype == torch.float32 else 1.05 * relative_error(right.double(), exact)
    )
    assert torch.equal(x, given)


def test_it_is_taken_where_it_suits() -> None:
    x, bend = video(torch.bfloat16), torch.ones(1, 32, dtype=torch.bfloat16)
    with torch.no_grad():
        assert pixel_norm.is_supported(x, bend, bend)
        assert pixel_norm.is_supported(x, None, None)
        assert torch.equal(fused.pixel_norm_modulate_silu(x), pixel_norm.pixel_norm_modulate_silu(x))
        assert not pixel_norm.is_supported(x.contiguous(), bend, bend)
        assert not pixel_norm.is_supported(x[:, :, :0], bend, bend)
        assert not pixel_norm.is_supported(x.double(), bend, bend)
        with mode.override(mode.REFERENCE):
            assert not pixel_norm.is_supported(x, bend, bend)
    assert not pixel_norm.is_supported(x, bend, bend)  # gradients are wanted
