"""Sampler steps against the official scheduler's `step`, and the denoising loop over stand-in models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ltx_video.schedulers.rf import RectifiedFlowScheduler
from torch import Tensor

from kadr.sampling.conditioning import replace_latents
from kadr.sampling.positions import token_positions
from kadr.sampling.samplers import denoise, euler_step, next_sigma, stochastic_step
from kadr.sampling.schedules import Schedule, explicit_sigmas
from kadr.sampling.state import LatentState, to_tokens
from kadr.shapes import LatentGrid
from tests.oracles import relative_error

SCHEDULES = {
    "distilled second pass": explicit_sigmas((0.9094, 0.725, 0.4219)),
    "linear-quadratic": Schedule(sampler="LinearQuadratic").get_sigmas(12, tokens=1),
    "shifted": Schedule(shifting="SD3", shift_terminal=0.1).get_sigmas(9, tokens=500),
    "one step": explicit_sigmas((1.0,)),
}


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- steps -----------------------------------------------------------------------------------------------------------


def with_final_zero(sigmas: Tensor) -> Tensor:
    return torch.cat([sigmas, torch.zeros(1)])


def official_scheduler(sigmas: Tensor) -> RectifiedFlowScheduler:
    scheduler = RectifiedFlowScheduler()
    scheduler.set_timesteps(timesteps=sigmas.tolist())
    return scheduler


def token_sigmas_around(sigmas: Tensor, count: int) -> Tensor:
    """Returns (1, count): sigmas of the schedule, slightly beside them, between them, above, below, and 0."""
    near = [sigmas, sigmas - 5e-7, sigmas + 5e-7, sigmas - 2e-6, sigmas + 2e-6, sigmas * 0.97, torch.zeros(2)]
    return torch.cat(near).clamp(0, 1).repeat(count)[:count][None]


def test_each_token_steps_to_the_next_sigma_below_its_own() -> None:
    """The values are those of the fact sheet."""
    token_sigmas, sigmas = torch.tensor([[0.9094, 0.8, 0.2]]), SCHEDULES["distilled second pass"]
    stepped = euler_step(0, torch.zeros(1, 3, 1), torch.ones(1, 3, 1), token_sigmas, with_final_zero(sigmas))
    torch.testing.assert_close(stepped[0, :, 0], torch.tensor([-0.1844, -0.075, -0.2]), rtol=0, atol=1e-7)


@pytest.mark.parametrize("sigmas", SCHEDULES.values(), ids=SCHEDULES)
def test_sigmas_within_tolerance_count_as_the_same(sigmas: Tensor) -> None:
    all_sigmas = with_final_zero(sigmas)
    for shift in (0.0, 5e-7, -5e-7):
        assert torch.equal(next_sigma((sigmas + shift)[None], all_sigmas), all_sigmas[1:][None])


def test_each_video_of_a_batch_steps_by_its_own_sigmas() -> None:
    """The official pipeline gives the scheduler only the sigmas of the first one."""
    tokens, velocity = randn(2, 64, 3, seed=12), randn(2, 64, 3, seed=13)
    for sigmas in SCHEDULES.values():
        all_sigmas = with_final_zero(sigmas)
        batch_sigmas = torch.cat([token_sigmas_around(sigmas, 64), sigmas[-1].expand(1, 64)])
        one_by_one = [
            euler_step(0, tokens[i : i + 1], velocity[i : i + 1], batch_sigmas[i : i + 1], all_sigmas) for i in range(2)
        ]
        assert torch.equal(euler_step(0, tokens, velocity, batch_sigmas, all_sigmas), torch.cat(one_by_one))


def test_below_the_lowest_sigma_and_at_0_the_next_is_0() -> None:
    all_sigmas = with_final_zero(SCHEDULES["distilled second pass"])
    assert next_sigma(torch.tensor([[0.4, 0.01, 1e-7, 0.0]]), all_sigmas).tolist() == [[0, 0, 0, 0]]


@pytest.mark.parametrize("sigmas", SCHEDULES.values(), ids=SCHEDULES)
def test_euler_equals_the_official_step_with_one_sigma_for_all(sigmas: Tensor) -> None:
    tokens, velocity = randn(2, 5, 3, seed=1), randn(2, 5, 3, seed=2)
    scheduler = official_scheduler(sigmas)
    for index, sigma in enumerate(sigmas):
        stepped = euler_step(index, tokens, velocity, sigma.expand(2, 1), with_final_zero(sigmas))
        assert torch.equal(stepped, scheduler.step(velocity, sigma, tokens, return_dict=False)[0])
        per_token = scheduler.step(velocity, sigma.expand(2, 1), tokens, return_dict=False)[0]
        assert torch.equal(stepped, per_token)


@pytest.mark.parametrize("sigmas", SCHEDULES.values(), ids=SCHEDULES)
def test_euler_equals_the_official_step_with_sigmas_per_token(sigmas: Tensor, parity: Any) -> None:
    tokens, velocity = randn(1, 64, 3, seed=3), randn(1, 64, 3, seed=4)
    token_sigmas = token_sigmas_around(sigmas, 64)
    expected = official_scheduler(sigmas).step(velocity, token_sigmas, tokens, return_dict=False)[0]
    stepped = euler_step(0, tokens, velocity, token_sigmas, with_final_zero(sigmas))
    parity("step", "Euler", "official", relative_error(stepped, expected))
    assert torch.equal(stepped, expected)


@pytest.mark.parametrize("sigmas", SCHEDULES.values(), ids=SCHEDULES)
def test_stochastic_step_equals_the_official_one_for_equal_noise(
    sigmas: Tensor, monkeypatch: pytest.MonkeyPatch, parity: Any
) -> None:
    tokens, velocity, noise = (randn(1, 64, 3, seed=seed) for seed in (5, 6, 7))
    drawn: list[tuple[int, torch.Size]] = []

    def draw(index: int, shape: torch.Size) -> Tensor:
        drawn.append((index, shape))
        return noise

    step = stochastic_step(draw)
    monkeypatch.setattr(torch, "randn_like", lambda like: noise)
    scheduler = official_scheduler(sigmas)
    for index, token_sigmas in enumerate((sigmas[:1, None], sigmas[-1:, None], token_sigmas_around(sigmas, 64))):
        stepped = step(index, tokens, velocity, token_sigmas, with_final_zero(sigmas))
        expected = scheduler.step(velocity, token_sigmas, tokens, return_dict=False, stochastic_sampling=True)[0]
        parity("step", "stochastic", "official", relative_error(stepped, expected))
        torch.testing.assert_close(stepped, expected, rtol=0, atol=2e-6)
    assert drawn == [(index, tokens.shape) for index in range(3)]


def test_the_last_stochastic_step_adds_no_noise() -> None:
    tokens, velocity = randn(1, 4, 3, seed=8), randn(1, 4, 3, seed=9)
    step = stochastic_step(lambda index, shape: torch.full(shape, 1e6))
    sigmas = with_final_zero(explicit_sigmas((0.9, 0.3)))
    stepped = step(0, tokens, velocity, torch.tensor([[0.3]]), sigmas)
    torch.testing.assert_close(stepped, tokens - 0.3 * velocity)


def test_on_a_straight_flow_any_schedule_reaches_the_clean_tokens() -> None:
    clean, noise = randn(1, 6, 3, seed=10), randn(1, 6, 3, seed=11)
    for sigmas in SCHEDULES.values():
        first = sigmas[0]
        tokens = (1 - first) * clean + first * noise
        for index, sigma in enumerate(sigmas):
            tokens = euler_step(index, tokens, noise - clean, sigma.expand(1, 1), with_final_zero(sigmas))
        torch.testing.assert_close(tokens, clean, rtol=0, atol=2e-6)


# --- the denoising loop ----------------------------------------------------------------------------------------------

GRID = LatentGrid(3, 2, 2)
LATENT_SHAPE = (1, 4, GRID.frames, GRID.height, GRID.width)
NOISE, CLEAN = randn(*LATENT_SHAPE, seed=1), randn(*LATENT_SHAPE, seed=2)
LOOP_SCHEDULES = {
    "linear-quadratic": Schedule(sampler="LinearQuadratic").get_sigmas(10, tokens=12),
    "shifted": Schedule(shifting="SD3", shift_terminal=0.1).get_sigmas(7, tokens=12),
    "skipped at the back": Schedule(sampler="LinearQuadratic").get_sigmas(10, tokens=12, skip_final=4),
    "one step": explicit_sigmas((1.0,)),
}


def noise_state() -> LatentState:
    return LatentState.from_latents(NOISE, token_positions(GRID, fps=24, causal=True), GRID)


def exact_velocity(index: int, tokens: Tensor, sigma: Tensor) -> Tensor:
    """Returns the velocity of the straight flow from CLEAN to NOISE."""
    return to_tokens(NOISE - CLEAN)


@pytest.mark.parametrize("sigmas", LOOP_SCHEDULES.values(), ids=LOOP_SCHEDULES)
def test_the_exact_velocity_leads_to_the_clean_latents(sigmas: Tensor) -> None:
    for state in (noise_state(), replace_latents(noise_state(), CLEAN[:, :, :1], 1.0)):
        denoised = denoise(exact_velocity, state, sigmas)
        torch.testing.assert_close(denoised.latents(), CLEAN, rtol=0, atol=5e-6)


@pytest.mark.parametrize("sigmas", LOOP_SCHEDULES.values(), ids=LOOP_SCHEDULES)
@pytest.mark.parametrize("strength", [0.9, 0.6, 0.2, 0.01])
def test_a_soft_condition_joins_at_the_first_sigma_not_above_its_own(sigmas: Tensor, strength: float) -> None:
    """Its tokens step from there, as in the official code, so they keep the noise between their own sigma and that one.

    They keep all of it if even the last sigma of the schedule is above their own.
    """
    denoised = denoise(exact_velocity, replace_latents(noise_state(), CLEAN[:, :, :1], strength), sigmas)
    token_sigma = 1 - strength
    joined_at = max((sigma for sigma in sigmas.tolist() if sigma <= token_sigma + 1e-6), default=0.0)
    expected = CLEAN.clone()
    expected[:, :, :1] += (token_sigma - joined_at) * (NOISE - CLEAN)[:, :, :1]
    torch.testing.assert_close(denoised.latents(), expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("sigmas", LOOP_SCHEDULES.values(), ids=LOOP_SCHEDULES)
def test_the_last_step_goes_from_the_last_sigma_to_0(sigmas: Tensor) -> None:
    visited: list[float] = []

    def step(index: int, tokens: Tensor, velocity: Tensor, sigma: Tensor, all_sigmas: Tensor) -> Tensor:
        visited.append(all_sigmas[index].item())
        assert all_sigmas[-1] == 0
        assert torch.equal(all_sigmas[:-1], sigmas)
        return tokens

    denoise(exact_velocity, noise_state(), sigmas, step=step)
    assert visited == sigmas.tolist()


def test_each_step_prepares_evaluates_and_reports_in_this_order() -> None:
    sigmas, calls = LOOP_SCHEDULES["shifted"], []

    def denoiser(index: int, tokens: Tensor, sigma: Tensor) -> Tensor:
        calls.append(("evaluated", sigma.item()))
        return exact_velocity(index, tokens, sigma)

    def prepare(index: int, state: LatentState, sigma: Tensor) -> LatentState:
        calls.append(("prepared", index))
        return state

    def watch(index: int, sigma: Tensor, state: LatentState) -> None:
        calls.append(("reported", index))

    denoise(denoiser, noise_state(), sigmas, prepare=prepare, watch=watch)
    expected = [
        call
        for index, sigma in enumerate(sigmas.tolist())
        for call in (("prepared", index), ("evaluated", sigma), ("reported", index))
    ]
    assert calls == expected


def test_tokens_stay_float32_when_the_model_computes_in_bfloat16() -> None:
    denoised = denoise(
        lambda index, tokens, sigma: exact_velocity(index, tokens, sigma).bfloat16(),
        noise_state(),
        LOOP_SCHEDULES["shifted"],
    )
    assert denoised.tokens.dtype == torch.float32


def test_denoise_changes_neither_state_nor_sigmas_in_place() -> None:
    state, sigmas = noise_state(), LOOP_SCHEDULES["shifted"].clone()
    tokens = state.tokens.clone()
    denoise(exact_velocity, state, sigmas, step=stochastic_step(lambda index, shape: torch.ones(shape)))
    assert torch.equal(state.tokens, tokens)
    assert torch.equal(sigmas, LOOP_SCHEDULES["shifted"])


def test_an_exact_model_reaches_clean_latents_by_stochastic_steps() -> None:
    """A model that knows the clean tokens ends on them, whatever noise is added in between."""

    def exact_model(index: int, tokens: Tensor, sigma: Tensor) -> Tensor:
        return (tokens - to_tokens(CLEAN)) / sigma[..., None]

    denoised = denoise(
        exact_model,
        noise_state(),
        LOOP_SCHEDULES["shifted"],
        step=stochastic_step(lambda index, shape: randn(*shape, seed=index + 50)),
    )
    torch.testing.assert_close(denoised.latents(), CLEAN, rtol=0, atol=1e-5)
