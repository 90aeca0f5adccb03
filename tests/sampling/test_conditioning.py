"""What conditions do to a state, against the official pipeline."""

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
FIRST = GRID.height * GRID.width  # tokens of one latent frame


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def noise() -> Tensor:
    return drawn(1, 4, GRID.frames, GRID.height, GRID.width, seed=1)


def fresh() -> LatentState:
    return LatentState.from_latents(noise(), token_positions(GRID, fps=24, causal=True), GRID)


PICTURE = drawn(1, 4, 1, GRID.height, GRID.width, seed=2)


@pytest.mark.parametrize("strength", [1.0, 0.6, 0.1])
@pytest.mark.parametrize("frames", [1, 2])
def test_the_first_frames_start_as_the_flow_has_them_at_one_minus_the_strength(strength: float, frames: int) -> None:
    given = drawn(1, 4, frames, GRID.height, GRID.width, seed=3)
    state = replace_latents(fresh(), given, strength)
    expected = noise()
    expected[:, :, :frames] = torch.lerp(expected[:, :, :frames], given, strength)
    assert torch.equal(state.latents(), expected)
    torch.testing.assert_close(
        state.latents()[:, :, :frames], (1 - strength) * noise()[:, :, :frames] + strength * given
    )
    assert torch.equal(state.clean_tokens, state.tokens)
    assert state.conditioning_mask is not None
    count = frames * FIRST
    assert state.conditioning_mask[0].tolist() == pytest.approx([strength] * count + [0.0] * (GRID.num_tokens - count))
    assert torch.equal(state.positions, fresh().positions)


def test_a_picture_held_with_strength_1_is_there_in_every_bit() -> None:
    assert torch.equal(replace_latents(fresh(), PICTURE, 1.0).latents()[:, :, :1], PICTURE)


def test_a_condition_changes_no_state_it_is_given() -> None:
    state = fresh()
    before = state.tokens.clone()
    once = replace_latents(state, PICTURE, 0.5)
    kept, strength = once.tokens.clone(), once.conditioning_mask.clone()
    replace_latents(once, PICTURE * 2, 1.0)
    assert torch.equal(state.tokens, before)
    assert state.conditioning_mask is None
    assert torch.equal(once.tokens, kept)
    assert torch.equal(once.conditioning_mask, strength)


def test_a_later_condition_goes_over_an_earlier_one() -> None:
    """As the official code, which mixes into what stands there and overwrites the mask."""
    state = replace_latents(replace_latents(fresh(), PICTURE, 0.5), PICTURE * 2, 0.25)
    first = torch.lerp(torch.lerp(noise()[:, :, :1], PICTURE, 0.5), PICTURE * 2, 0.25)
    assert torch.equal(state.latents()[:, :, :1], first)
    assert state.conditioning_mask[0, :FIRST].unique().tolist() == [0.25]


@pytest.mark.parametrize("scale", [0.15, 1.0])
@pytest.mark.parametrize("now", [1.0, 0.725, 0.1])
def test_shaking_is_the_official_noise_on_conditioning_latents(
    scale: float, now: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = replace_latents(replace_latents(fresh(), drawn(1, 4, 2, 2, 2, seed=4), 0.9999), PICTURE, 1.0)
    state = state.advance(state.tokens + 1, torch.tensor(1e-5))  # moved off what was given
    shift = drawn(1, GRID.num_tokens, 4, seed=5)
    monkeypatch.setattr(official, "randn_tensor", lambda shape, **_: shift.reshape(shape))
    level = torch.tensor(now)
    expected = official.LTXVideoPipeline.add_noise_to_image_conditioning_latents(
        level, state.clean_tokens, state.tokens, scale, state.conditioning_mask, None
    )
    made = add_image_noise(scale, lambda index, shape: shift)(0, state, level)
    torch.testing.assert_close(made.tokens, expected, rtol=0, atol=1e-6)


def test_only_fully_held_tokens_are_shaken() -> None:
    state = replace_latents(replace_latents(fresh(), drawn(1, 4, 2, 2, 2, seed=4), 0.99999), PICTURE, 1.0)
    made = add_image_noise(0.15, lambda index, shape: torch.ones(shape))(0, state, torch.tensor(0.8))
    moved = (made.tokens != state.tokens).any(dim=-1)[0]
    assert moved.tolist() == [True] * FIRST + [False] * (GRID.num_tokens - FIRST)
    torch.testing.assert_close(made.tokens[:, :FIRST], to_tokens(PICTURE) + 0.15 * 0.64)
    assert torch.equal(made.clean_tokens, state.clean_tokens)


def test_shaking_does_not_add_up_over_steps() -> None:
    state = replace_latents(fresh(), PICTURE, 1.0)
    prepare = add_image_noise(0.15, lambda index, shape: drawn(*shape, seed=index))
    once = prepare(3, state, torch.tensor(0.5))
    again = prepare(3, prepare(2, prepare(1, state, torch.tensor(1.0)), torch.tensor(0.7)), torch.tensor(0.5))
    assert torch.equal(once.tokens, again.tokens)


def test_shaking_by_nothing_changes_nothing() -> None:
    state = replace_latents(fresh(), PICTURE, 1.0)
    made = add_image_noise(0.0, lambda index, shape: drawn(*shape, seed=index))(0, state, torch.tensor(1.0))
    assert torch.equal(made.tokens, state.tokens)


def test_without_held_tokens_nothing_is_shaken_and_no_noise_is_drawn() -> None:
    def draw(index: int, shape: torch.Size) -> Tensor:
        raise AssertionError("noise was drawn")

    state = fresh()
    assert add_image_noise(0.15, draw)(0, state, torch.tensor(1.0)) is state


def test_each_step_asks_for_its_own_noise_over_all_tokens() -> None:
    asked = []

    def draw(index: int, shape: torch.Size) -> Tensor:
        asked.append((index, tuple(shape)))
        return torch.zeros(shape)

    prepare, state = add_image_noise(0.15, draw), replace_latents(fresh(), PICTURE, 1.0)
    for index in range(3):
        state = prepare(index, state, torch.tensor(0.5))
    assert asked == [(index, (1, GRID.num_tokens, 4)) for index in range(3)]
