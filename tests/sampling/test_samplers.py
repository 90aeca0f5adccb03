"""The loop over stand-ins: what is asked, when, and where it ends."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kadr.sampling.conditioning import replace_latents
from kadr.sampling.positions import token_positions
from kadr.sampling.samplers import denoise, stochastic_step
from kadr.sampling.schedules import Schedule, explicit_sigmas
from kadr.sampling.state import LatentState, to_tokens
from kadr.shapes import LatentGrid

GRID = LatentGrid(3, 2, 2)
SHAPE = (1, 4, GRID.frames, GRID.height, GRID.width)
SCHEDULES = {
    "linear-quadratic": Schedule(sampler="LinearQuadratic").get_sigmas(10, tokens=12),
    "shifted": Schedule(shifting="SD3", shift_terminal=0.1).get_sigmas(7, tokens=12),
    "skipped at the back": Schedule(sampler="LinearQuadratic").get_sigmas(10, tokens=12, skip_final=4),
    "one step": explicit_sigmas((1.0,)),
}


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


NOISE, CLEAN = drawn(*SHAPE, seed=1), drawn(*SHAPE, seed=2)


def fresh() -> LatentState:
    return LatentState.from_latents(NOISE, token_positions(GRID, fps=24, causal=True), GRID)


def exact(index: int, tokens: Tensor, level: Tensor) -> Tensor:
    """The velocity of the straight flow from CLEAN to NOISE."""
    return to_tokens(NOISE - CLEAN)


@pytest.mark.parametrize("levels", SCHEDULES.values(), ids=SCHEDULES)
def test_the_exact_velocity_leads_to_the_clean_latents_with_any_schedule(levels: Tensor) -> None:
    for state in (fresh(), replace_latents(fresh(), CLEAN[:, :, :1], 1.0)):
        made = denoise(exact, state, levels)
        torch.testing.assert_close(made.latents(), CLEAN, rtol=0, atol=5e-6)


@pytest.mark.parametrize("levels", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("strength", [0.9, 0.6, 0.2, 0.01])
def test_a_half_held_picture_joins_at_the_first_level_that_is_not_above_its_own(
    levels: Tensor, strength: float
) -> None:
    """It steps from there, as in the official code, and so keeps the noise between its own level and that one; all of
    its noise where even the last level lies above it."""
    made = denoise(exact, replace_latents(fresh(), CLEAN[:, :, :1], strength), levels)
    own = 1 - strength
    joins = max((level for level in levels.tolist() if level <= own + 1e-6), default=0.0)
    expected = CLEAN.clone()
    expected[:, :, :1] += (own - joins) * (NOISE - CLEAN)[:, :, :1]
    torch.testing.assert_close(made.latents(), expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("levels", SCHEDULES.values(), ids=SCHEDULES)
def test_the_last_step_goes_from_the_last_level_to_0(levels: Tensor) -> None:
    steps: list[float] = []

    def step(index: int, tokens: Tensor, velocity: Tensor, level: Tensor, path: Tensor) -> Tensor:
        steps.append(path[index].item())
        assert path[-1] == 0
        assert torch.equal(path[:-1], levels)
        return tokens

    denoise(exact, fresh(), levels, step=step)
    assert steps == levels.tolist()


def test_each_step_prepares_asks_moves_and_reports_once_and_in_this_order() -> None:
    levels, seen = SCHEDULES["shifted"], []

    def estimate(index: int, tokens: Tensor, level: Tensor) -> Tensor:
        seen.append(("asked", level.item()))
        return exact(index, tokens, level)

    def prepare(index: int, state: LatentState, now: Tensor) -> LatentState:
        seen.append(("prepared", index))
        return state

    def watch(index: int, now: Tensor, state: LatentState) -> None:
        seen.append(("reported", index))

    denoise(estimate, fresh(), levels, prepare=prepare, watch=watch)
    expected = [
        (what, value)
        for index, now in enumerate(levels.tolist())
        for what, value in (("prepared", index), ("asked", now), ("reported", index))
    ]
    assert seen == expected


def test_tokens_stay_float32_when_the_model_computes_in_less() -> None:
    made = denoise(lambda index, tokens, level: exact(index, tokens, level).bfloat16(), fresh(), SCHEDULES["shifted"])
    assert made.tokens.dtype == torch.float32


def test_a_sampling_changes_nothing_it_is_given() -> None:
    state, levels = fresh(), SCHEDULES["shifted"].clone()
    before = state.tokens.clone()
    denoise(exact, state, levels, step=stochastic_step(lambda index, shape: torch.ones(shape)))
    assert torch.equal(state.tokens, before)
    assert torch.equal(levels, SCHEDULES["shifted"])


def test_an_exact_model_finds_the_clean_latents_through_fresh_noise() -> None:
    """A stochastic sampling with a model that knows the clean tokens ends on them, whatever noise comes between."""

    def knowing(index: int, tokens: Tensor, level: Tensor) -> Tensor:
        return (tokens - to_tokens(CLEAN)) / level[..., None]

    made = denoise(
        knowing,
        fresh(),
        SCHEDULES["shifted"],
        step=stochastic_step(lambda index, shape: drawn(*shape, seed=index + 50)),
    )
    torch.testing.assert_close(made.latents(), CLEAN, rtol=0, atol=1e-5)
