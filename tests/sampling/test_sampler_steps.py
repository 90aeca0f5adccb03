"""Steps along the flow, against the fact sheet and the official scheduler's `step`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ltx_video.schedulers.rf import RectifiedFlowScheduler
from torch import Tensor

from kadr.sampling.samplers import euler_step, next_sigma, stochastic_step
from kadr.sampling.schedules import Schedule, explicit_sigmas
from tests.oracles import relative_error

LISTS = {
    "distilled second pass": explicit_sigmas((0.9094, 0.725, 0.4219)),
    "linear-quadratic": Schedule(sampler="LinearQuadratic").get_sigmas(12, tokens=1),
    "shifted": Schedule(shifting="SD3", shift_terminal=0.1).get_sigmas(9, tokens=500),
    "one": explicit_sigmas((1.0,)),
}


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def path(levels: Tensor) -> Tensor:
    return torch.cat([levels, torch.zeros(1)])


def official(levels: Tensor) -> RectifiedFlowScheduler:
    scheduler = RectifiedFlowScheduler()
    scheduler.set_timesteps(timesteps=levels.tolist())
    return scheduler


def awkward(levels: Tensor, count: int) -> Tensor:
    """(1, count): levels on the list, a hair beside them, between them, above, below, and 0."""
    near = [levels, levels - 5e-7, levels + 5e-7, levels - 2e-6, levels + 2e-6, levels * 0.97, torch.zeros(2)]
    return torch.cat(near).clamp(0, 1).repeat(count)[:count][None]


def test_each_token_steps_to_the_next_level_below_its_own() -> None:
    """The vector of the fact sheet."""
    level = torch.tensor([[0.9094, 0.8, 0.2]])
    made = euler_step(
        0, torch.zeros(1, 3, 1), torch.ones(1, 3, 1), level, path(explicit_sigmas((0.9094, 0.725, 0.4219)))
    )
    torch.testing.assert_close(made[0, :, 0], torch.tensor([-0.1844, -0.075, -0.2]), rtol=0, atol=1e-7)


@pytest.mark.parametrize("levels", LISTS.values(), ids=LISTS)
def test_a_level_a_hair_above_another_counts_as_the_same(levels: Tensor) -> None:
    down = path(levels)
    for shift in (0.0, 5e-7, -5e-7):
        assert torch.equal(next_sigma((levels + shift)[None], down), down[1:][None])


def test_each_video_of_a_batch_steps_by_its_own_levels() -> None:
    """The official pipeline hands the scheduler the levels of the first one alone."""
    tokens, velocity = drawn(2, 64, 3, seed=12), drawn(2, 64, 3, seed=13)
    for levels in LISTS.values():
        own = torch.cat([awkward(levels, 64), levels[-1].expand(1, 64)])
        alone = [euler_step(0, tokens[i : i + 1], velocity[i : i + 1], own[i : i + 1], path(levels)) for i in range(2)]
        assert torch.equal(euler_step(0, tokens, velocity, own, path(levels)), torch.cat(alone))


def test_below_the_lowest_level_and_at_0_the_next_is_0() -> None:
    down = path(explicit_sigmas((0.9094, 0.725, 0.4219)))
    assert next_sigma(torch.tensor([[0.4, 0.01, 1e-7, 0.0]]), down).tolist() == [[0, 0, 0, 0]]


@pytest.mark.parametrize("levels", LISTS.values(), ids=LISTS)
def test_euler_is_the_official_step_where_all_tokens_share_a_level(levels: Tensor) -> None:
    tokens, velocity = drawn(2, 5, 3, seed=1), drawn(2, 5, 3, seed=2)
    scheduler = official(levels)
    for index, now in enumerate(levels):
        made = euler_step(index, tokens, velocity, now.expand(2, 1), path(levels))
        assert torch.equal(made, scheduler.step(velocity, now, tokens, return_dict=False)[0])
        per_token = scheduler.step(velocity, now.expand(2, 1), tokens, return_dict=False)[0]
        assert torch.equal(made, per_token)


@pytest.mark.parametrize("levels", LISTS.values(), ids=LISTS)
def test_euler_is_the_official_step_where_every_token_has_its_own_level(levels: Tensor, parity: Any) -> None:
    tokens, velocity = drawn(1, 64, 3, seed=3), drawn(1, 64, 3, seed=4)
    level = awkward(levels, 64)
    expected = official(levels).step(velocity, level, tokens, return_dict=False)[0]
    made = euler_step(0, tokens, velocity, level, path(levels))
    parity("step", "Euler", "official", relative_error(made, expected))
    assert torch.equal(made, expected)


@pytest.mark.parametrize("levels", LISTS.values(), ids=LISTS)
def test_a_stochastic_step_is_the_official_one_with_the_same_noise(
    levels: Tensor, monkeypatch: pytest.MonkeyPatch, parity: Any
) -> None:
    tokens, velocity, noise = (drawn(1, 64, 3, seed=seed) for seed in (5, 6, 7))
    asked: list[tuple[int, torch.Size]] = []

    def draw(index: int, shape: torch.Size) -> Tensor:
        asked.append((index, shape))
        return noise

    step = stochastic_step(draw)
    monkeypatch.setattr(torch, "randn_like", lambda like: noise)
    scheduler = official(levels)
    for index, level in enumerate((levels[:1, None], levels[-1:, None], awkward(levels, 64))):
        made = step(index, tokens, velocity, level, path(levels))
        expected = scheduler.step(velocity, level, tokens, return_dict=False, stochastic_sampling=True)[0]
        parity("step", "stochastic", "official", relative_error(made, expected))
        torch.testing.assert_close(made, expected, rtol=0, atol=2e-6)
    assert asked == [(index, tokens.shape) for index in range(3)]


def test_the_last_stochastic_step_returns_the_guess_and_no_noise() -> None:
    tokens, velocity = drawn(1, 4, 3, seed=8), drawn(1, 4, 3, seed=9)
    step = stochastic_step(lambda index, shape: torch.full(shape, 1e6))
    made = step(0, tokens, velocity, torch.tensor([[0.3]]), path(explicit_sigmas((0.9, 0.3))))
    torch.testing.assert_close(made, tokens - 0.3 * velocity)


def test_a_step_that_lands_where_the_flow_is_straight_depends_on_nothing_between() -> None:
    """With the exact velocity of a straight flow, any number of steps arrives at the same clean tokens."""
    clean, noise = drawn(1, 6, 3, seed=10), drawn(1, 6, 3, seed=11)
    for levels in LISTS.values():
        first = levels[0]
        tokens = (1 - first) * clean + first * noise
        for index, now in enumerate(levels):
            tokens = euler_step(index, tokens, noise - clean, now.expand(1, 1), path(levels))
        torch.testing.assert_close(tokens, clean, rtol=0, atol=2e-6)
