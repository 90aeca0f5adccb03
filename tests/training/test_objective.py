"""The training objective against its closed form."""

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


def test_the_velocity_leads_from_the_noised_sample_to_the_clean_one() -> None:
    clean, noise = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    sigma = torch.tensor([[0.25], [0.75]])[..., None]
    noised = add_noise(clean, noise, sigma)
    torch.testing.assert_close(noised - sigma * velocity_target(clean, noise), clean)
    assert torch.equal(add_noise(clean, noise, torch.zeros(1)), clean)
    assert torch.equal(add_noise(clean, noise, torch.ones(1)), noise)


def test_the_loss_counts_only_masked_in_tokens() -> None:
    target, loss_mask = torch.zeros(1, 4, 2), torch.tensor([False, True, True, False])
    predicted = torch.tensor([100.0, 1.0, 2.0, 100.0])[None, :, None].expand(1, 4, 2)
    assert float(masked_mse(predicted, target, loss_mask)) == pytest.approx((1 + 4) / 2)


@pytest.mark.parametrize(("tokens", "mean"), [(1024, 0.95), (4096, 2.05), (2560, 1.5)])
def test_shifted_sigmas_are_those_of_the_official_trainer(tokens: int, mean: float) -> None:
    normal = torch.randn(7)
    torch.testing.assert_close(shifted_logit_normal(normal, tokens), torch.sigmoid(normal + mean))


def test_uniform_sigmas_are_uniform() -> None:
    sigmas = uniform(torch.randn(20_000, generator=torch.Generator().manual_seed(0)), 64).sort().values
    assert (sigmas - torch.linspace(0, 1, 20_000)).abs().max() < 0.02


@pytest.mark.parametrize("name", SIGMA_DISTRIBUTIONS)
def test_sigmas_stay_between_0_and_1(name: str) -> None:
    sigmas = SIGMA_DISTRIBUTIONS[name](torch.tensor([-4.0, 0.0, 4.0]), 4096)
    assert bool(((sigmas > 0) & (sigmas < 1)).all())


def test_stratified_sigmas_have_the_mean_of_their_mixture() -> None:
    torch.manual_seed(1)
    sigmas = stratified_sigmas(4000)
    assert bool(((sigmas > 0) & (sigmas < 1)).all())
    assert float(sigmas.mean()) == pytest.approx(0.5 * (0.5 + 0.735), abs=0.02)  # the mean of the leaning half: sampled
