"""What a training learns, against its closed form."""

from __future__ import annotations

import pytest
import torch

from kadr.training.objective import (
    SIGMA_DISTRIBUTIONS,
    add_noise,
    masked_mse,
    shifted_logit_normal,
    stratified_sigmas,
    uniform,
    velocity_target,
)


def test_the_velocity_carries_the_noise_to_the_clip() -> None:
    clean, noise = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    level = torch.tensor([[0.25], [0.75]])[..., None]
    between = add_noise(clean, noise, level)
    torch.testing.assert_close(between - level * velocity_target(clean, noise), clean)
    assert torch.equal(add_noise(clean, noise, torch.zeros(1)), clean)
    assert torch.equal(add_noise(clean, noise, torch.ones(1)), noise)


def test_the_loss_is_of_the_tokens_that_are_learned_alone() -> None:
    right, learned = torch.zeros(1, 4, 2), torch.tensor([False, True, True, False])
    said = torch.tensor([100.0, 1.0, 2.0, 100.0])[None, :, None].expand(1, 4, 2)
    assert float(masked_mse(said, right, learned)) == pytest.approx((1 + 4) / 2)


@pytest.mark.parametrize(("tokens", "mean"), [(1024, 0.95), (4096, 2.05), (2560, 1.5)])
def test_shifted_levels_are_those_of_the_official_trainer(tokens: int, mean: float) -> None:
    normal = torch.randn(7)
    torch.testing.assert_close(shifted_logit_normal(normal, tokens), torch.sigmoid(normal + mean))


def test_uniform_levels_are_even() -> None:
    drawn = uniform(torch.randn(20_000, generator=torch.Generator().manual_seed(0)), 64).sort().values
    assert (drawn - torch.linspace(0, 1, 20_000)).abs().max() < 0.02


@pytest.mark.parametrize("name", SIGMA_DISTRIBUTIONS)
def test_levels_stay_between_0_and_1(name: str) -> None:
    drawn = SIGMA_DISTRIBUTIONS[name](torch.tensor([-4.0, 0.0, 4.0]), 4096)
    assert bool(((drawn > 0) & (drawn < 1)).all())


def test_levels_that_are_spread_have_one_in_each_part_where_they_are_even() -> None:
    torch.manual_seed(1)
    drawn = stratified_sigmas(4000)
    assert bool(((drawn > 0) & (drawn < 1)).all())
    assert float(drawn.mean()) == pytest.approx(0.5 * (0.5 + 0.735), abs=0.02)  # the mean of the leaning half: sampled
