"""Laws of the latent state, and its steps against the official pipeline's `denoising_step`."""

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
from kadr.sampling.samplers import euler_step, next_sigma
from kadr.sampling.schedules import explicit_sigmas
from kadr.sampling.state import LatentState, to_latents, to_tokens
from kadr.shapes import LatentGrid

GRID = LatentGrid(2, 3, 4)
SIGMAS = explicit_sigmas((1.0, 0.8, 0.6, 0.4, 0.2))


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def noise_state(batch: int = 1) -> LatentState:
    latents = randn(batch, 5, GRID.frames, GRID.height, GRID.width, seed=1)
    return LatentState.from_latents(latents, token_positions(GRID, fps=24, causal=True), GRID)


def conditioned_state(mask: Tensor, batch: int = 1) -> LatentState:
    state = noise_state(batch)
    return LatentState(state.tokens, state.clean_tokens, state.positions, GRID, mask.expand(batch, -1))


def masks() -> Tensor:
    """Returns (1, 24): 0, 1, one minus the sigmas and values slightly beside those."""
    near = [0.0, 1.0, 0.2, 0.4, 0.6, 0.8, 0.5, 0.999, 1e-7, 0.4 - 5e-7, 0.4 + 5e-7, 0.4 - 3e-6, 0.4 + 3e-6]
    return torch.tensor(near + [0.1 * i for i in range(11)])[None]


def test_tokens_are_ordered_as_by_the_official_patchifier() -> None:
    latents = randn(2, 5, GRID.frames, GRID.height, GRID.width, seed=2)
    expected, _ = SymmetricPatchifier(patch_size=1).patchify(latents=latents)
    assert torch.equal(to_tokens(latents), expected)
    assert torch.equal(to_latents(to_tokens(latents), GRID), latents)


def test_latents_leave_out_appended_tokens() -> None:
    state = noise_state()
    appended = LatentState(
        torch.cat([state.tokens, randn(1, 7, 5, seed=3)], dim=1), state.clean_tokens, state.positions, GRID, None
    )
    assert torch.equal(appended.latents(), state.latents())


def test_a_state_is_immutable() -> None:
    with pytest.raises(FrozenInstanceError):
        noise_state().tokens = torch.zeros(1)  # type: ignore[misc]


def test_without_conditions_every_token_has_the_sigma_of_the_step() -> None:
    token_sigmas = noise_state(batch=3).sigma_per_token(torch.tensor(0.7))
    assert token_sigmas.shape == (3, 1)
    assert token_sigmas.unique().tolist() == [torch.tensor(0.7).item()]


def test_a_token_s_sigma_is_at_most_one_minus_its_mask() -> None:
    state = conditioned_state(masks(), batch=2)
    for sigma in SIGMAS:
        assert torch.equal(state.sigma_per_token(sigma), torch.min(sigma, 1 - masks()).expand(2, -1))
    assert (state.sigma_per_token(torch.tensor(1.0))[:, 1] == 0).all()


def test_without_conditions_all_tokens_move() -> None:
    moved = noise_state().advance(torch.zeros(1, GRID.num_tokens, 5), torch.tensor(0.5))
    assert (moved.tokens == 0).all()


@pytest.mark.parametrize("sigma", [1.0, 0.6000005, 0.6, 0.5999995, 0.4, 0.2, 0.0])
def test_a_conditioned_token_stays_until_the_sampler_reaches_its_sigma(sigma: float) -> None:
    state = conditioned_state(masks())
    moved = state.advance(state.tokens + 1, torch.tensor(sigma))
    moves = torch.tensor(sigma) - 1e-6 < 1 - masks()[0]
    assert torch.equal(moved.tokens[0, moves], state.tokens[0, moves] + 1)
    assert torch.equal(moved.tokens[0, ~moves], state.tokens[0, ~moves])
    assert torch.equal(moved.clean_tokens, state.clean_tokens)
    if sigma > 1e-6:
        assert not moves[1], "a token with mask 1 never moves"


def test_steps_with_conditioned_tokens_equal_the_official_pipeline() -> None:
    state = conditioned_state(masks())
    scheduler = RectifiedFlowScheduler()
    scheduler.set_timesteps(timesteps=SIGMAS.tolist())
    pipeline = SimpleNamespace(scheduler=scheduler)
    tokens = state.tokens
    for index, sigma in enumerate(SIGMAS):
        velocity = randn(1, GRID.num_tokens, 5, seed=10 + index)
        token_sigmas = state.sigma_per_token(sigma)
        tokens = LTXVideoPipeline.denoising_step(pipeline, tokens, velocity, token_sigmas, masks(), sigma, {})
        following = next_sigma(token_sigmas, SIGMAS)
        state = state.advance(euler_step(state.tokens, velocity, token_sigmas, following), sigma)
        assert torch.equal(state.tokens, tokens)
