"""Sampler steps against the official scheduler's `step`, and the denoising loop over stand-in models."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from ltx_video.schedulers.rf import RectifiedFlowScheduler
from torch import Tensor

from kadr.sampling.conditioning import add_image_noise, replace_latents
from kadr.sampling.positions import token_positions
from kadr.sampling.samplers import (
    SAMPLERS,
    SampleFunction,
    StopSampling,
    euler_step,
    next_sigma,
    res_2s_sigmas,
    sample_euler,
    sample_euler_stochastic,
    sample_res_2s,
    stochastic_step,
)
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


def step_by_euler(tokens: Tensor, velocity: Tensor, sigma: Tensor, sigmas: Tensor) -> Tensor:
    return euler_step(tokens, velocity, sigma, next_sigma(sigma, sigmas))


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
    stepped = step_by_euler(torch.zeros(1, 3, 1), torch.ones(1, 3, 1), token_sigmas, sigmas)
    torch.testing.assert_close(stepped[0, :, 0], torch.tensor([-0.1844, -0.075, -0.2]), rtol=0, atol=1e-7)


@pytest.mark.parametrize("sigmas", SCHEDULES.values(), ids=SCHEDULES)
def test_sigmas_within_tolerance_count_as_the_same(sigmas: Tensor) -> None:
    following = torch.cat([sigmas[1:], torch.zeros(1)])[None]
    for shift in (0.0, 5e-7, -5e-7):
        assert torch.equal(next_sigma((sigmas + shift)[None], sigmas), following)


def test_each_video_of_a_batch_steps_by_its_own_sigmas() -> None:
    """The official pipeline gives the scheduler only the sigmas of the first one."""
    tokens, velocity = randn(2, 64, 3, seed=12), randn(2, 64, 3, seed=13)
    for sigmas in SCHEDULES.values():
        batch_sigmas = torch.cat([token_sigmas_around(sigmas, 64), sigmas[-1].expand(1, 64)])
        one_by_one = [
            step_by_euler(tokens[i : i + 1], velocity[i : i + 1], batch_sigmas[i : i + 1], sigmas) for i in range(2)
        ]
        assert torch.equal(step_by_euler(tokens, velocity, batch_sigmas, sigmas), torch.cat(one_by_one))


def test_below_the_lowest_sigma_and_at_0_the_next_is_0() -> None:
    sigmas = SCHEDULES["distilled second pass"]
    assert next_sigma(torch.tensor([[0.4, 0.01, 1e-7, 0.0]]), sigmas).tolist() == [[0, 0, 0, 0]]


@pytest.mark.parametrize("sigmas", SCHEDULES.values(), ids=SCHEDULES)
def test_euler_equals_the_official_step_with_one_sigma_for_all(sigmas: Tensor) -> None:
    tokens, velocity = randn(2, 5, 3, seed=1), randn(2, 5, 3, seed=2)
    scheduler = official_scheduler(sigmas)
    for sigma in sigmas:
        stepped = step_by_euler(tokens, velocity, sigma.expand(2, 1), sigmas)
        assert torch.equal(stepped, scheduler.step(velocity, sigma, tokens, return_dict=False)[0])
        per_token = scheduler.step(velocity, sigma.expand(2, 1), tokens, return_dict=False)[0]
        assert torch.equal(stepped, per_token)


@pytest.mark.parametrize("sigmas", SCHEDULES.values(), ids=SCHEDULES)
def test_euler_equals_the_official_step_with_sigmas_per_token(sigmas: Tensor, parity: Any) -> None:
    tokens, velocity = randn(1, 64, 3, seed=3), randn(1, 64, 3, seed=4)
    token_sigmas = token_sigmas_around(sigmas, 64)
    expected = official_scheduler(sigmas).step(velocity, token_sigmas, tokens, return_dict=False)[0]
    stepped = step_by_euler(tokens, velocity, token_sigmas, sigmas)
    parity("step", "Euler", "official", relative_error(stepped, expected))
    assert torch.equal(stepped, expected)


@pytest.mark.parametrize("sigmas", SCHEDULES.values(), ids=SCHEDULES)
def test_stochastic_step_equals_the_official_one_for_equal_noise(
    sigmas: Tensor, monkeypatch: pytest.MonkeyPatch, parity: Any
) -> None:
    tokens, velocity, noise = (randn(1, 64, 3, seed=seed) for seed in (5, 6, 7))
    monkeypatch.setattr(torch, "randn_like", lambda like: noise)
    scheduler = official_scheduler(sigmas)
    for token_sigmas in (sigmas[:1, None], sigmas[-1:, None], token_sigmas_around(sigmas, 64)):
        stepped = stochastic_step(tokens, velocity, token_sigmas, next_sigma(token_sigmas, sigmas), noise)
        expected = scheduler.step(velocity, token_sigmas, tokens, return_dict=False, stochastic_sampling=True)[0]
        parity("step", "stochastic", "official", relative_error(stepped, expected))
        torch.testing.assert_close(stepped, expected, rtol=0, atol=2e-6)


def test_the_last_stochastic_step_adds_no_noise() -> None:
    tokens, velocity = randn(1, 4, 3, seed=8), randn(1, 4, 3, seed=9)
    sigma, sigmas = torch.tensor([[0.3]]), explicit_sigmas((0.9, 0.3))
    stepped = stochastic_step(tokens, velocity, sigma, next_sigma(sigma, sigmas), torch.full_like(tokens, 1e6))
    torch.testing.assert_close(stepped, tokens - 0.3 * velocity)


def test_on_a_straight_flow_any_schedule_reaches_the_clean_tokens() -> None:
    clean, noise = randn(1, 6, 3, seed=10), randn(1, 6, 3, seed=11)
    for sigmas in SCHEDULES.values():
        first = sigmas[0]
        tokens = (1 - first) * clean + first * noise
        for sigma in sigmas:
            tokens = step_by_euler(tokens, noise - clean, sigma.expand(1, 1), sigmas)
        torch.testing.assert_close(tokens, clean, rtol=0, atol=2e-6)


# --- samplers ----------------------------------------------------------------------------------------------

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


def exact_velocity(sigma: float, tokens: Tensor, token_sigmas: Tensor) -> Tensor:
    """Returns the velocity of the straight flow from CLEAN to NOISE."""
    return to_tokens(NOISE - CLEAN)


def draw_noise(index: int, shape: torch.Size) -> Tensor:
    return randn(*shape, seed=index + 50)


ODE_SAMPLERS = [sample_euler, sample_res_2s]


@pytest.mark.parametrize("sigmas", LOOP_SCHEDULES.values(), ids=LOOP_SCHEDULES)
@pytest.mark.parametrize("sample", ODE_SAMPLERS)
def test_the_exact_velocity_leads_to_the_clean_latents(sample: SampleFunction, sigmas: Tensor) -> None:
    for state in (noise_state(), replace_latents(noise_state(), CLEAN[:, :, :1], 1.0)):
        sampled = sample(exact_velocity, state, sigmas, noise=draw_noise)
        torch.testing.assert_close(sampled.latents(), CLEAN, rtol=0, atol=5e-6)


@pytest.mark.parametrize("sigmas", LOOP_SCHEDULES.values(), ids=LOOP_SCHEDULES)
@pytest.mark.parametrize("strength", [0.9, 0.6, 0.2, 0.01])
@pytest.mark.parametrize("sample", ODE_SAMPLERS)
def test_a_soft_condition_joins_at_the_first_sigma_not_above_its_own(
    sample: SampleFunction, strength: float, sigmas: Tensor
) -> None:
    """Its tokens step from there, as in the official code, so they keep the noise between their own sigma and that one.

    They keep all of it if even the last sigma of the schedule is above their own.
    """
    state = replace_latents(noise_state(), CLEAN[:, :, :1], strength)
    sampled = sample(exact_velocity, state, sigmas, noise=draw_noise)
    token_sigma = 1 - strength
    joined_at = max((sigma for sigma in sigmas.tolist() if sigma <= token_sigma + 1e-6), default=0.0)
    expected = CLEAN.clone()
    expected[:, :, :1] += (token_sigma - joined_at) * (NOISE - CLEAN)[:, :, :1]
    torch.testing.assert_close(sampled.latents(), expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("strength", [None, 1.0, 0.55, 0.3])
@pytest.mark.parametrize("name", SAMPLERS)
def test_each_step_evaluates_at_the_sigmas_of_the_table(name: str, strength: float | None) -> None:
    """Free tokens have the sigma of the evaluation; those that a step does not move have their own."""
    state, sigmas = noise_state(), LOOP_SCHEDULES["shifted"]
    if strength is not None:
        state = replace_latents(state, CLEAN[:, :, :1], strength)
    evaluated, calls = [], []

    def denoiser(sigma: float, tokens: Tensor, token_sigmas: Tensor) -> Tensor:
        calls.append("evaluated")
        evaluated.append((sigma, token_sigmas))
        return exact_velocity(sigma, tokens, token_sigmas)

    def prepare(index: int, state: LatentState, sigma: Tensor) -> LatentState:
        calls.append(("prepared", index, pytest.approx(float(sigma))))
        return state

    def watch(index: int, sigma: float, state: LatentState) -> None:
        calls.append(("watched", index, sigma))

    SAMPLERS[name].sample(denoiser, state, sigmas, noise=draw_noise, prepare=prepare, watch=watch)
    expected_sigmas, expected_calls = [], []
    for index, (sigma, following) in enumerate(pairwise([*sigmas.tolist(), 0.0])):
        for at in SAMPLERS[name].evaluation_sigmas(sigma, following):
            expected_sigmas.append((sigma, at))
            expected_calls += [("prepared", index, at), "evaluated"]
        expected_calls.append(("watched", index, sigma))
    assert [sigma for sigma, _ in evaluated] == [at for _, at in expected_sigmas]
    assert calls == expected_calls
    for (sigma, at), (_, token_sigmas) in zip(expected_sigmas, evaluated, strict=True):
        assert token_sigmas[0, -1].item() == pytest.approx(at, abs=1e-7)
        if strength is not None:
            own = 1 - strength
            expected = own if own < sigma - 1e-6 else at
            assert token_sigmas[0, 0].item() == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("name", SAMPLERS)
def test_tokens_stay_float32_when_the_model_computes_in_bfloat16(name: str) -> None:
    def denoiser(sigma: float, tokens: Tensor, token_sigmas: Tensor) -> Tensor:
        return exact_velocity(sigma, tokens, token_sigmas).bfloat16()

    sampled = SAMPLERS[name].sample(denoiser, noise_state(), LOOP_SCHEDULES["shifted"], noise=draw_noise)
    assert sampled.tokens.dtype == torch.float32


@pytest.mark.parametrize("name", SAMPLERS)
def test_sampling_changes_neither_state_nor_sigmas_in_place(name: str) -> None:
    state, sigmas = noise_state(), LOOP_SCHEDULES["shifted"].clone()
    tokens = state.tokens.clone()
    SAMPLERS[name].sample(exact_velocity, state, sigmas, noise=draw_noise)
    assert torch.equal(state.tokens, tokens)
    assert torch.equal(sigmas, LOOP_SCHEDULES["shifted"])


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_model_that_knows_the_clean_tokens_ends_on_them(name: str) -> None:
    """Whatever noise a sampler adds in between."""

    def exact_model(sigma: float, tokens: Tensor, token_sigmas: Tensor) -> Tensor:
        return (tokens - to_tokens(CLEAN)) / token_sigmas[..., None]

    sampled = SAMPLERS[name].sample(exact_model, noise_state(), LOOP_SCHEDULES["shifted"], noise=draw_noise)
    torch.testing.assert_close(sampled.latents(), CLEAN, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", SAMPLERS)
def test_only_the_stochastic_sampler_draws_noise_once_a_step(name: str) -> None:
    drawn: list[tuple[int, torch.Size]] = []

    def draw(index: int, shape: torch.Size) -> Tensor:
        drawn.append((index, shape))
        return randn(*shape, seed=index)

    state, sigmas = noise_state(), LOOP_SCHEDULES["shifted"]
    SAMPLERS[name].sample(exact_velocity, state, sigmas, noise=draw)
    is_stochastic = SAMPLERS[name].sample is sample_euler_stochastic
    assert drawn == [(index, state.tokens.shape) for index in range(len(sigmas) * is_stochastic)]


# --- second order ----------------------------------------------------------------------------------------------------

DATA_STD = 0.5


def gaussian_velocity(sigma: float, tokens: Tensor, token_sigmas: Tensor) -> Tensor:
    """Returns the velocity of the flow from normal data of mean 0 and standard deviation DATA_STD, to noise.

    x = (1 - s) data + s noise has the variance V(s) = (1 - s)² DATA_STD² + s², so the flow keeps x / sqrt(V(s)): its
    velocity is x V'(s) / (2 V(s)).
    """
    sigma_, one = token_sigmas[..., None], 1 - token_sigmas[..., None]
    return tokens * (sigma_ - one * DATA_STD**2) / (one**2 * DATA_STD**2 + sigma_**2)


def gaussian_scale(sigma: float) -> float:
    return ((1 - sigma) ** 2 * DATA_STD**2 + sigma**2) ** 0.5


def solve_gaussian(sample: SampleFunction, steps: int, strength: float | None = None) -> float:
    """Returns the error at sigma 0.2 of the exact solution of that flow, from sigma 1 on or from a condition's own.

    The last step, to 0, is an Euler step in both samplers; its result is turned back into the state that it began from.
    """
    sigmas = torch.linspace(1.0, 0.2, steps + 1)
    state, first = noise_state(), 1.0
    if strength is not None:
        state, first = replace_latents(state, CLEAN, strength), 1 - strength
    states: list[LatentState] = []
    sample(gaussian_velocity, state, sigmas, noise=draw_noise, watch=lambda index, sigma, at: states.append(at))
    expected = state.tokens * gaussian_scale(0.2) / gaussian_scale(first)
    return float((states[-2].tokens - expected).norm() / expected.norm())


@pytest.mark.parametrize("strength", [None, 0.4], ids=["free tokens", "tokens with a sigma of their own"])
@pytest.mark.parametrize("sample, order", [(sample_euler, 1), (sample_res_2s, 2)])
def test_error_on_a_gaussian_flow_falls_by_the_order(
    sample: SampleFunction, order: int, strength: float | None
) -> None:
    errors = [solve_gaussian(sample, steps, strength) for steps in (8, 16, 32, 64)]
    for coarse, fine in pairwise(errors):
        assert coarse / fine == pytest.approx(2**order, rel=0.15)


def test_res_2s_integrates_a_clean_prediction_linear_in_log_sigma_exactly() -> None:
    """For clean(x, t) = a + b t with t = -log sigma, x(t) = a + b (t - 1) + c exp(-t) solves dx/dt = clean - x."""
    a, b, c = (randn(1, GRID.num_tokens, 4, seed=seed) for seed in (60, 61, 62))

    def solution(sigma: float) -> Tensor:
        return a + b * (-math.log(sigma) - 1) + c * sigma

    def velocity(sigma: float, tokens: Tensor, token_sigmas: Tensor) -> Tensor:
        return (tokens - (a - b * token_sigmas.log()[..., None])) / token_sigmas[..., None]

    state, tokens = noise_state(), {}
    state = replace(state, tokens=solution(0.9))
    sigmas = explicit_sigmas((0.9, 0.5, 0.1))
    sample_res_2s(velocity, state, sigmas, watch=lambda index, sigma, at: tokens.update({index: at.tokens}))
    for index, sigma in ((0, 0.5), (1, 0.1)):
        torch.testing.assert_close(tokens[index], solution(sigma), rtol=0, atol=5e-6)


@pytest.mark.parametrize("name", SAMPLERS)
def test_clean_tokens_stay(name: str) -> None:
    state = replace_latents(noise_state(), CLEAN[:, :, :1], 1.0)
    sampled = SAMPLERS[name].sample(gaussian_velocity, state, LOOP_SCHEDULES["shifted"], noise=draw_noise)
    assert torch.equal(sampled.latents()[:, :, :1], CLEAN[:, :, :1])
    assert sampled.tokens.isfinite().all()


def test_second_evaluation_has_the_image_noise_of_its_step_and_sigma() -> None:
    state, sigmas, seen = replace_latents(noise_state(), CLEAN[:, :, :1], 1.0), explicit_sigmas((0.9, 0.4)), []

    def denoiser(sigma: float, tokens: Tensor, token_sigmas: Tensor) -> Tensor:
        seen.append((sigma, tokens[:, : GRID.height * GRID.width]))
        return torch.zeros_like(tokens)

    sample_res_2s(denoiser, state, sigmas, prepare=add_image_noise(0.15, draw_noise))
    clean = state.tokens[:, : GRID.height * GRID.width]
    for (sigma, tokens), index in zip(seen, (0, 0, 1), strict=True):
        noise = draw_noise(index, state.tokens.shape)[:, : GRID.height * GRID.width]
        torch.testing.assert_close(tokens, clean + 0.15 * sigma**2 * noise, rtol=0, atol=1e-6)


def test_the_last_step_of_res_2s_is_an_euler_step() -> None:
    sigmas = explicit_sigmas((0.7,))
    assert res_2s_sigmas(0.7, 0.0) == (0.7,)
    by_euler, by_res = (sample(gaussian_velocity, noise_state(), sigmas) for sample in (sample_euler, sample_res_2s))
    assert torch.equal(by_euler.tokens, by_res.tokens)


@pytest.mark.parametrize("name", SAMPLERS)
def test_finish_changes_the_state_after_each_step_and_may_end_sampling(name: str) -> None:
    sigmas, finished, watched = LOOP_SCHEDULES["shifted"], [], []

    def finish(index: int, state: LatentState, sigma: Tensor) -> LatentState:
        finished.append((index, float(sigma)))
        state = replace(state, tokens=torch.full_like(state.tokens, float(index)))
        if index == 1:
            raise StopSampling(state)
        return state

    def watch(index: int, sigma: float, state: LatentState) -> None:
        watched.append((index, state.tokens.unique().tolist()))

    with pytest.raises(StopSampling) as stopped:
        SAMPLERS[name].sample(exact_velocity, noise_state(), sigmas, noise=draw_noise, finish=finish, watch=watch)
    assert finished == [(index, float(sigmas[index])) for index in (0, 1)]
    assert watched == [(0, [0.0])]
    assert stopped.value.state.tokens.unique().tolist() == [1.0]
