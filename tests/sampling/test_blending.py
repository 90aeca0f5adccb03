"""Blending of a window into the previous video: dropped latent, AdaIN, linear cross-fade."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kadr.sampling.blending import blend_window
from kadr.sampling.latents import adain


def randn(frames: int, seed: int) -> Tensor:
    return torch.randn(1, 3, frames, 2, 4, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("overlap", [1, 2, 3, 5])
def test_the_previous_video_fades_out_over_the_overlap_less_one_latent(overlap: int) -> None:
    window, previous = randn(6, 1), randn(6, 2)
    added = blend_window(window, previous, previous, overlap=overlap, adain_factor=0.0)
    assert added.shape[2] == 5
    for index in range(overlap - 1):
        weight = 1 - (index + 1) / overlap
        expected = weight * previous[:, :, 6 - (overlap - 1) + index] + (1 - weight) * window[:, :, 1 + index]
        assert torch.allclose(added[:, :, index], expected, atol=1e-6)
    assert added[:, :, overlap - 1 :].equal(window[:, :, overlap:])


def test_a_window_equal_to_the_video_does_not_change_it() -> None:
    video = randn(9, 1)
    added = blend_window(video[:, :, 3:], video[:, :, :6], video[:, :, :6], overlap=3, adain_factor=0.0)
    assert torch.allclose(added, video[:, :, 4:], atol=1e-6)


def test_adain_is_applied_to_the_whole_window_before_the_blend() -> None:
    window, previous, first_window = randn(6, 1), randn(6, 2), 3 * randn(4, 3) + 1
    added = blend_window(window, previous, first_window, overlap=1, adain_factor=1.0)
    for statistic in (torch.mean, torch.std):
        assert torch.allclose(statistic(added, (2, 3, 4)), statistic(first_window, (2, 3, 4)), atol=1e-5)
    partial = blend_window(window, previous, first_window, overlap=3, adain_factor=0.25)
    assert torch.allclose(partial[:, :, 2:], adain(window[:, :, 1:], first_window, 0.25)[:, :, 2:], atol=1e-6)
