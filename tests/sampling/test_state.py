"""The state's laws, against the official pipeline's own denoising step."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from types import SimpleNamespace

import pytest
import torch
from ltx_video.models.transformers.symmetric_patchifier import SymmetricPatchifier
from ltx_video.pipelines.pipeline_ltx_video import LTXVideoPipeline
from ltx_video.schedulers.rf import RectifiedFlowScheduler
from torch import Tensor

from kadr.sampling.positions import token_positions
from kadr.sampling.samplers import euler_step
from kadr.sampling.schedules import explicit_sigmas
from kadr.sampling.state import LatentState, to_latents, to_tokens
from kadr.shapes import LatentGrid

GRID = LatentGrid(2, 3, 4)
LEVELS = explicit_sigmas((1.0, 0.8, 0.6, 0.4, 0.2))


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fresh(batch: int = 1) -> LatentState:
    latents = drawn(batch, 5, GRID.frames, GRID.height, GRID.width, seed=1)
    return LatentState.from_latents(latents, token_positions(GRID, fps=24, causal=True), GRID)


def held(strength: Tensor, batch: int = 1) -> LatentState:
    state = fresh(batch)
    return LatentState(state.tokens, state.clean_tokens, state.positions, GRID, strength.expand(batch, -1))


def strengths() -> Tensor:
    """(1, 24): nothing, everything, levels' complements and a hair beside them."""
    near = [0.0, 1.0, 0.2, 0.4, 0.6, 0.8, 0.5, 0.999, 1e-7, 0.4 - 5e-7, 0.4 + 5e-7, 0.4 - 3e-6, 0.4 + 3e-6]
    return torch.tensor(near + [0.1 * i for i in range(11)])[None]


def test_tokens_are_ordered_as_the_official_patchifier_orders_them() -> None:
    latents = drawn(2, 5, GRID.frames, GRID.height, GRID.width, seed=2)
    expected, _ = SymmetricPatchifier(patch_size=1).patchify(latents=latents)
    assert torch.equal(to_tokens(latents), expected)
    assert torch.equal(to_latents(to_tokens(latents), GRID), latents)


def test_latents_leave_out_tokens_that_a_condition_appended() -> None:
    state = fresh()
    more = LatentState(
        torch.cat([state.tokens, drawn(1, 7, 5, seed=3)], dim=1), state.clean_tokens, state.positions, GRID, None
    )
    assert torch.equal(more.latents(), state.latents())


def test_a_state_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        fresh().tokens = torch.zeros(1)  # type: ignore[misc]


def test_every_token_is_at_the_sampling_s_level_where_nothing_is_held() -> None:
    level = fresh(batch=3).sigma_per_token(torch.tensor(0.7))
    assert level.shape == (3, 1)
    assert level.unique().tolist() == [torch.tensor(0.7).item()]


def test_a_token_is_never_above_one_minus_its_strength() -> None:
    state = held(strengths(), batch=2)
    for now in LEVELS:
        assert torch.equal(state.sigma_per_token(now), torch.min(now, 1 - strengths()).expand(2, -1))
    assert (state.sigma_per_token(torch.tensor(1.0))[:, 1] == 0).all()


def test_without_conditions_all_tokens_move() -> None:
    moved = fresh().advance(torch.zeros(1, GRID.num_tokens, 5), torch.tensor(0.5))
    assert (moved.tokens == 0).all()


@pytest.mark.parametrize("now", [1.0, 0.6000005, 0.6, 0.5999995, 0.4, 0.2, 0.0])
def test_a_held_token_stays_until_the_sampling_is_at_its_level(now: float) -> None:
    state = held(strengths())
    level = torch.tensor(now)
    moved = state.advance(state.tokens + 1, level)
    moves = level - 1e-6 < 1 - strengths()[0]
    assert torch.equal(moved.tokens[0, moves], state.tokens[0, moves] + 1)
    assert torch.equal(moved.tokens[0, ~moves], state.tokens[0, ~moves])
    assert torch.equal(moved.clean_tokens, state.clean_tokens)
    if now > 1e-6:
        assert not moves[1], "a token held with strength 1 moves never"


def test_steps_with_held_tokens_are_those_of_the_official_pipeline() -> None:
    state, path = held(strengths()), torch.cat([LEVELS, torch.zeros(1)])
    scheduler = RectifiedFlowScheduler()
    scheduler.set_timesteps(timesteps=LEVELS.tolist())
    pipeline = SimpleNamespace(scheduler=scheduler)
    tokens = state.tokens
    for index, now in enumerate(LEVELS):
        velocity = drawn(1, GRID.num_tokens, 5, seed=10 + index)
        level = state.sigma_per_token(now)
        tokens = LTXVideoPipeline.denoising_step(pipeline, tokens, velocity, level, strengths(), now, {})
        state = state.advance(euler_step(index, state.tokens, velocity, level, path), now)
        assert torch.equal(state.tokens, tokens)
