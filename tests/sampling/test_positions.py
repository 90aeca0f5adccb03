"""Token positions, against published values and the official package."""

from __future__ import annotations

import pytest
import torch
from ltx_video.models.autoencoders.vae_encode import latent_to_pixel_coords_from_factors
from ltx_video.models.transformers.symmetric_patchifier import SymmetricPatchifier

from kadr.sampling.positions import token_positions
from kadr.shapes import LatentGrid, Size

GRID = LatentGrid(16, 3, 5)


@pytest.mark.parametrize(
    "causal, seconds",
    [(True, [0, 1 / 30, 9 / 30, 113 / 30]), (False, [0, 8 / 30, 16 / 30, 120 / 30])],
)
def test_latent_frames_are_at_the_published_seconds(causal, seconds):
    positions = token_positions(LatentGrid(16, 1, 1), fps=30, causal=causal)
    assert positions.dtype == torch.float32
    assert positions[0, [0, 1, 2, 15]].tolist() == pytest.approx(seconds, rel=1e-6)


@pytest.mark.parametrize("fps", [24.0, 25.0, 30.0, 29.97, 60.0])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("first_frame", [0, 8, 41])
def test_positions_equal_the_official_ones_bit_for_bit(fps, causal, first_frame):
    latent = SymmetricPatchifier(patch_size=1).get_latent_coords(GRID.frames, GRID.height, GRID.width, 1, "cpu")
    pixels = latent_to_pixel_coords_from_factors(latent, (8, 32, 32), causal_fix=causal)
    pixels[:, 0] += first_frame
    expected = pixels.to(torch.float32)
    expected[:, 0] = expected[:, 0] * (1.0 / fps)
    assert torch.equal(token_positions(GRID, fps=fps, causal=causal, first_frame=first_frame), expected[0])


def test_tokens_are_ordered_by_frame_then_row_then_column():
    positions = token_positions(GRID, fps=8, causal=False)
    assert positions.shape == (3, GRID.num_tokens)
    for frame, row, column in [(0, 0, 0), (0, 0, 4), (0, 1, 0), (0, 2, 3), (1, 0, 0), (15, 2, 4)]:
        token = (frame * GRID.height + row) * GRID.width + column
        assert positions[:, token].tolist() == [frame, 32 * row, 32 * column]


def test_token_order_equals_the_official_patchifier():
    latents = torch.arange(2 * GRID.num_tokens).view(1, 2, GRID.frames, GRID.height, GRID.width)
    tokens, _ = SymmetricPatchifier(patch_size=1).patchify(latents)
    assert torch.equal(tokens, latents.flatten(2).transpose(1, 2))


@pytest.mark.parametrize(
    "size, frames, grid, tokens",
    [
        (Size(1216, 704), 121, LatentGrid(16, 22, 38), 13376),
        (Size(768, 512), 97, LatentGrid(13, 16, 24), 4992),
        (Size(800, 448), 121, LatentGrid(16, 14, 25), 5600),
        (Size(1600, 896), 121, LatentGrid(16, 28, 50), 22400),
        (Size(1280, 704), 257, LatentGrid(33, 22, 40), 29040),
    ],
    ids=str,
)
def test_a_grid_has_the_published_number_of_tokens(size, frames, grid, tokens):
    assert LatentGrid.for_video(size, frames) == grid
    assert token_positions(grid, fps=30, causal=True).shape == (3, tokens)
    assert grid.num_tokens == tokens
    assert grid.video_frames == frames
    assert grid.video_size == size
