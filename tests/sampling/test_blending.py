"""A window behind the video that there is: what is dropped, what is moved, what is crossed over."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kadr.sampling.blending import blend_window
from kadr.sampling.latents import adain


def drawn(frames: int, seed: int) -> Tensor:
    return torch.randn(1, 3, frames, 2, 4, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("overlap", [1, 2, 3, 5])
def test_the_old_fades_out_over_all_but_one_latent_of_the_overlap(overlap: int) -> None:
    made, before = drawn(6, 1), drawn(6, 2)
    added = blend_window(made, before, before, overlap=overlap, adain_factor=0.0)
    assert added.shape[2] == 5
    for place in range(overlap - 1):
        old = 1 - (place + 1) / overlap
        expected = old * before[:, :, 6 - (overlap - 1) + place] + (1 - old) * made[:, :, 1 + place]
        assert torch.allclose(added[:, :, place], expected, atol=1e-6)
    assert added[:, :, overlap - 1 :].equal(made[:, :, overlap:])


def test_a_window_that_agrees_with_the_video_leaves_it_as_it_is() -> None:
    whole = drawn(9, 1)
    added = blend_window(whole[:, :, 3:], whole[:, :, :6], whole[:, :, :6], overlap=3, adain_factor=0.0)
    assert torch.allclose(added, whole[:, :, 4:], atol=1e-6)


def test_all_of_a_window_is_moved_to_the_statistics_of_the_first_before_it_crosses_over() -> None:
    made, before, first = drawn(6, 1), drawn(6, 2), 3 * drawn(4, 3) + 1
    added = blend_window(made, before, first, overlap=1, adain_factor=1.0)
    for measure in (torch.mean, torch.std):
        assert torch.allclose(measure(added, (2, 3, 4)), measure(first, (2, 3, 4)), atol=1e-5)
    part = blend_window(made, before, first, overlap=3, adain_factor=0.25)
    assert torch.allclose(part[:, :, 2:], adain(made[:, :, 1:], first, 0.25)[:, :, 2:], atol=1e-6)
