"""Conditions and image noise on a latent state, against the official pipeline."""

from __future__ import annotations

import ltx_video.pipelines.pipeline_ltx_video as official
import pytest
import torch
from torch import Tensor

from kadr.sampling.conditioning import add_image_noise, replace_latents
from kadr.sampling.positions import token_positions
from kadr.sampling.state import LatentState, to_tokens
from kadr.shapes import LatentGrid

GRID = LatentGrid(3, 2, 2)
FRAME_TOKENS = GRID.height * GRID.width


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def noise() -> Tensor:
    return randn(1, 4, GRID.frames, GRID.height, GRID.width, seed=1)


def noise_state() -> LatentState:
    return LatentState.from_latents(noise(), token_positions(GRID, fps=24, causal=True), GRID)


IMAGE_LATENTS = randn(1, 4, 1, GRID.height, GRID.width, seed=2)


@pytest.mark.parametrize("strength", [1.0, 0.6, 0.1])
@pytest.mark.parametrize("frames", [1, 2])
def test_conditioned_tokens_start_at_sigma_one_minus_strength(strength: float, frames: int) -> None:
    latents = randn(1, 4, frames, GRID.height, GRID.width, seed=3)
    state = replace_latents(noise_state(), latents, strength)
    expected = noise()
    expected[:, :, :frames] = torch.lerp(expected[:, :, :frames], latents, strength)
    assert torch.equal(state.latents(), expected)
    torch.testing.assert_close(
        state.latents()[:, :, :frames], (1 - strength) * noise()[:, :, :frames] + strength * latents
    )
    assert torch.equal(state.clean_tokens, state.tokens)
    assert state.conditioning_mask is not None
    count = frames * FRAME_TOKENS
    assert state.conditioning_mask[0].tolist() == pytest.approx([strength] * count + [0.0] * (GRID.num_tokens - count))
    assert torch.equal(state.positions, noise_state().positions)


def test_an_image_with_strength_1_is_kept_bit_for_bit() -> None:
    assert torch.equal(replace_latents(noise_state(), IMAGE_LATENTS, 1.0).latents()[:, :, :1], IMAGE_LATENTS)


def test_a_condition_does_not_change_its_input_state() -> None:
    state = noise_state()
    tokens = state.tokens.clone()
    conditioned = replace_latents(state, IMAGE_LATENTS, 0.5)
    conditioned_tokens, mask = conditioned.tokens.clone(), conditioned.conditioning_mask.clone()
    replace_latents(conditioned, IMAGE_LATENTS * 2, 1.0)
    assert torch.equal(state.tokens, tokens)
    assert state.conditioning_mask is None
    assert torch.equal(conditioned.tokens, conditioned_tokens)
    assert torch.equal(conditioned.conditioning_mask, mask)


def test_a_later_condition_is_mixed_over_an_earlier_one() -> None:
    """The official code, too, mixes into the latents that are there and overwrites the mask."""
    state = replace_latents(replace_latents(noise_state(), IMAGE_LATENTS, 0.5), IMAGE_LATENTS * 2, 0.25)
    expected = torch.lerp(torch.lerp(noise()[:, :, :1], IMAGE_LATENTS, 0.5), IMAGE_LATENTS * 2, 0.25)
    assert torch.equal(state.latents()[:, :, :1], expected)
    assert state.conditioning_mask[0, :FRAME_TOKENS].unique().tolist() == [0.25]


@pytest.mark.parametrize("scale", [0.15, 1.0])
@pytest.mark.parametrize("sigma", [1.0, 0.725, 0.1])
def test_image_noise_equals_the_official_noise_on_conditioning_latents(
    scale: float, sigma: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = replace_latents(replace_latents(noise_state(), randn(1, 4, 2, 2, 2, seed=4), 0.9999), IMAGE_LATENTS, 1.0)
    state = state.advance(state.tokens + 1, torch.tensor(1e-5))  # away from the clean tokens
    image_noise = randn(1, GRID.num_tokens, 4, seed=5)
    monkeypatch.setattr(official, "randn_tensor", lambda shape, **_: image_noise.reshape(shape))
    expected = official.LTXVideoPipeline.add_noise_to_image_conditioning_latents(
        torch.tensor(sigma), state.clean_tokens, state.tokens, scale, state.conditioning_mask, None
    )
    noisy = add_image_noise(scale, lambda index, shape: image_noise)(0, state, torch.tensor(sigma))
    torch.testing.assert_close(noisy.tokens, expected, rtol=0, atol=1e-6)


def test_only_fully_conditioned_tokens_get_image_noise() -> None:
    state = replace_latents(replace_latents(noise_state(), randn(1, 4, 2, 2, 2, seed=4), 0.99999), IMAGE_LATENTS, 1.0)
    noisy = add_image_noise(0.15, lambda index, shape: torch.ones(shape))(0, state, torch.tensor(0.8))
    changed = (noisy.tokens != state.tokens).any(dim=-1)[0]
    assert changed.tolist() == [True] * FRAME_TOKENS + [False] * (GRID.num_tokens - FRAME_TOKENS)
    torch.testing.assert_close(noisy.tokens[:, :FRAME_TOKENS], to_tokens(IMAGE_LATENTS) + 0.15 * 0.64)
    assert torch.equal(noisy.clean_tokens, state.clean_tokens)


def test_image_noise_does_not_accumulate_over_steps() -> None:
    state = replace_latents(noise_state(), IMAGE_LATENTS, 1.0)
    prepare = add_image_noise(0.15, lambda index, shape: randn(*shape, seed=index))
    single = prepare(3, state, torch.tensor(0.5))
    repeated = prepare(3, prepare(2, prepare(1, state, torch.tensor(1.0)), torch.tensor(0.7)), torch.tensor(0.5))
    assert torch.equal(single.tokens, repeated.tokens)


def test_image_noise_of_scale_0_changes_nothing() -> None:
    state = replace_latents(noise_state(), IMAGE_LATENTS, 1.0)
    noisy = add_image_noise(0.0, lambda index, shape: randn(*shape, seed=index))(0, state, torch.tensor(1.0))
    assert torch.equal(noisy.tokens, state.tokens)


def test_without_conditioned_tokens_no_image_noise_is_drawn() -> None:
    def draw(index: int, shape: torch.Size) -> Tensor:
        raise AssertionError("noise was drawn")

    state = noise_state()
    assert add_image_noise(0.15, draw)(0, state, torch.tensor(1.0)) is state


def test_each_step_draws_its_own_image_noise_for_all_tokens() -> None:
    drawn_noise = []

    def draw(index: int, shape: torch.Size) -> Tensor:
        drawn_noise.append((index, tuple(shape)))
        return torch.zeros(shape)

    prepare, state = add_image_noise(0.15, draw), replace_latents(noise_state(), IMAGE_LATENTS, 1.0)
    for index in range(3):
        state = prepare(index, state, torch.tensor(0.5))
    assert drawn_noise == [(index, (1, GRID.num_tokens, 4)) for index in range(3)]
