"""Guidance over any model: which predictions are evaluated, and closed forms of CFG, STG, rescale and APG."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kadr.sampling.guidance import (
    Perturbation,
    PromptEmbeddings,
    adaptive_projected_guidance,
    cfg_star_scale,
    guided_denoiser,
)
from kadr.sampling.samplers import Denoiser
from kadr.sampling.settings import Guidance

WIDTH, CHANNELS, TOKENS, LENGTH = 12, 5, 7, 6


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def prompt_embeddings(seed: int, length: int, batch: int = 1) -> PromptEmbeddings:
    mask = (torch.arange(LENGTH) < length).expand(batch, -1)
    return PromptEmbeddings(randn(batch, LENGTH, WIDTH, seed=seed), mask)


class MixingModel:
    """A stand-in model that mixes its inputs, sample by sample, and records its evaluations."""

    def __init__(self) -> None:
        self.evaluated_shapes: list[tuple[int, ...]] = []
        self.perturbations: list[Perturbation] = []
        torch.manual_seed(0)
        self.inner = nn.Linear(CHANNELS + WIDTH + 1, CHANNELS).requires_grad_(False)

    def __call__(
        self, tokens: Tensor, sigma: Tensor, prompt: PromptEmbeddings, perturbation: Perturbation | None = None
    ) -> tuple[Tensor, Tensor | None]:
        self.evaluated_shapes.append(tuple(tokens.shape))
        assert prompt.embeddings.shape[0] == prompt.mask.shape[0] == tokens.shape[0] == sigma.shape[0]
        pooled = (prompt.embeddings * prompt.mask[..., None]).mean(dim=1, keepdim=True)
        pooled = pooled.expand(-1, tokens.shape[1], -1)
        inputs = torch.cat([tokens, pooled, sigma.expand(-1, tokens.shape[1])[..., None]], dim=-1)
        velocity = self.inner(inputs).tanh()
        if perturbation is None:
            return velocity, None
        self.perturbations.append(perturbation)
        return velocity, velocity[perturbation.rows] * 0.5 - 0.1


POSITIVE, NEGATIVE = prompt_embeddings(1, 5), prompt_embeddings(2, 2)


def make_denoiser(model: MixingModel, *, guidance_batch: bool = False, batch: int = 1, **values: Any) -> Denoiser:
    prompts = (prompt_embeddings(1, 5, batch), prompt_embeddings(2, 2, batch))
    return guided_denoiser(model, *prompts, Guidance(**values), guidance_batch=guidance_batch)


@pytest.fixture(params=["one sigma", "a sigma per token"])
def sigma(request: pytest.FixtureRequest) -> Tensor:
    return torch.tensor([[0.7]]) if request.param == "one sigma" else torch.linspace(0.1, 1, TOKENS)[None]


GUIDANCE_VALUES: Sequence[dict[str, Any]] = (
    {"cfg_scale": 3.0},
    {"stg_scale": 2.0, "skip_blocks": (1,)},
    {"cfg_scale": 3.0, "stg_scale": 2.0, "skip_blocks": (1, 4)},
    {"cfg_scale": 3.0, "stg_scale": 2.0, "skip_blocks": (1,), "rescale": 0.7, "cfg_star": True},
    {"cfg_scale": 5.0, "apg": 0.2, "apg_norm": 0.5},
)


@pytest.mark.parametrize("values", GUIDANCE_VALUES)
@pytest.mark.parametrize("batch", [1, 3])
def test_guidance_in_one_batch_equals_separate_evaluations(values: dict[str, Any], batch: int, sigma: Tensor) -> None:
    tokens, sigma = randn(batch, TOKENS, CHANNELS, seed=3), sigma.expand(batch, -1)
    separate_model, batched_model = MixingModel(), MixingModel()
    separate = make_denoiser(separate_model, batch=batch, **values)(0.5, tokens, sigma)
    batched = make_denoiser(batched_model, batch=batch, guidance_batch=True, **values)(0.5, tokens, sigma)
    torch.testing.assert_close(separate, batched, rtol=1e-6, atol=1e-6)
    has_cfg = values.get("cfg_scale", 1.0) > 1
    assert separate_model.evaluated_shapes == [(batch, TOKENS, CHANNELS)] * (1 + has_cfg)
    assert batched_model.evaluated_shapes == [(batch * (1 + has_cfg), TOKENS, CHANNELS)]


def test_cfg_extrapolates_from_uncond_to_cond_by_its_scale(sigma: Tensor) -> None:
    tokens, model = randn(1, TOKENS, CHANNELS, seed=4), MixingModel()
    (cond, _), (uncond, _) = model(tokens, sigma, POSITIVE), model(tokens, sigma, NEGATIVE)
    for scale in (3.0, 7.5):
        velocity = make_denoiser(model, cfg_scale=scale)(0.5, tokens, sigma)
        torch.testing.assert_close(velocity, uncond + scale * (cond - uncond))


def test_cfg_scale_1_evaluates_the_model_once_and_changes_nothing(sigma: Tensor) -> None:
    tokens, model = randn(1, TOKENS, CHANNELS, seed=5), MixingModel()
    cond, _ = model(tokens, sigma, POSITIVE)
    model.evaluated_shapes.clear()
    assert torch.equal(make_denoiser(model, cfg_scale=1.0)(0.5, tokens, sigma), cond)
    assert model.evaluated_shapes == [(1, TOKENS, CHANNELS)]


@pytest.mark.parametrize("guidance_batch", [False, True])
def test_stg_perturbs_the_conditional_rows_only(guidance_batch: bool, sigma: Tensor) -> None:
    tokens, model = randn(2, TOKENS, CHANNELS, seed=6), MixingModel()
    values = {"cfg_scale": 3.0, "stg_scale": 1.0, "skip_blocks": (2, 5), "stg_mode": "attention_skip"}
    make_denoiser(model, guidance_batch=guidance_batch, batch=2, **values)(0.5, tokens, sigma.expand(2, -1))
    rows = slice(2, None) if guidance_batch else slice(None)
    assert model.perturbations == [Perturbation((2, 5), "attention_skip", rows)]


def test_stg_moves_away_from_the_perturbed_prediction(sigma: Tensor) -> None:
    tokens, model = randn(1, TOKENS, CHANNELS, seed=7), MixingModel()
    cond, _ = model(tokens, sigma, POSITIVE)
    velocity = make_denoiser(model, stg_scale=2.0, skip_blocks=(0,))(0.5, tokens, sigma)
    torch.testing.assert_close(velocity, cond + 2.0 * (cond - (cond * 0.5 - 0.1)))


def test_stg_without_blocks_changes_nothing_and_costs_nothing(sigma: Tensor) -> None:
    tokens, model = randn(1, TOKENS, CHANNELS, seed=8), MixingModel()
    cond, _ = model(tokens, sigma, POSITIVE)
    model.evaluated_shapes.clear()
    assert torch.equal(make_denoiser(model, stg_scale=4.0, skip_blocks=())(0.5, tokens, sigma), cond)
    assert len(model.evaluated_shapes) == 1
    assert not model.perturbations


@pytest.mark.parametrize("rescale", [0.0, 0.3, 0.7])
def test_rescale_interpolates_the_standard_deviation(rescale: float, sigma: Tensor) -> None:
    tokens, model = randn(1, TOKENS, CHANNELS, seed=9), MixingModel()
    cond, _ = model(tokens, sigma, POSITIVE)
    unscaled = make_denoiser(model, stg_scale=3.0, skip_blocks=(0,))(0.5, tokens, sigma)
    rescaled = make_denoiser(model, stg_scale=3.0, skip_blocks=(0,), rescale=rescale)(0.5, tokens, sigma)
    torch.testing.assert_close(rescaled.std(), rescale * cond.std() + (1 - rescale) * unscaled.std())
    torch.testing.assert_close(rescaled / rescaled.std(), unscaled / unscaled.std())


def test_rescale_is_off_at_1_and_without_stg(sigma: Tensor) -> None:
    tokens, model = randn(1, TOKENS, CHANNELS, seed=10), MixingModel()
    unscaled = make_denoiser(model, stg_scale=3.0, skip_blocks=(0,))(0.5, tokens, sigma)
    rescale_1 = make_denoiser(model, stg_scale=3.0, skip_blocks=(0,), rescale=1.0)(0.5, tokens, sigma)
    assert torch.equal(rescale_1, unscaled)
    without_stg = make_denoiser(model, cfg_scale=3.0)(0.5, tokens, sigma)
    assert torch.equal(make_denoiser(model, cfg_scale=3.0, rescale=0.5)(0.5, tokens, sigma), without_stg)


def test_cfg_star_makes_the_difference_orthogonal_to_uncond() -> None:
    cond, uncond = randn(3, TOKENS, CHANNELS, seed=11), randn(3, TOKENS, CHANNELS, seed=12)
    factor = cfg_star_scale(cond, uncond)
    assert factor.shape == (3, 1, 1)
    product = ((cond - factor * uncond) * uncond).flatten(1).sum(1)
    torch.testing.assert_close(product, torch.zeros(3), rtol=0, atol=1e-5)


def test_apg_of_1_equals_plain_cfg() -> None:
    cond, uncond, tokens = (randn(2, TOKENS, CHANNELS, seed=seed) for seed in (13, 14, 15))
    sigma = torch.full((2, 1), 0.6)
    velocity = adaptive_projected_guidance(cond, uncond, 4.0, tokens, sigma, Guidance(apg=1.0))
    torch.testing.assert_close(velocity, uncond + 4.0 * (cond - uncond), rtol=1e-5, atol=1e-5)


def test_apg_of_0_has_no_component_along_the_clean_prediction() -> None:
    cond, uncond, tokens = (randn(2, TOKENS, CHANNELS, seed=seed) for seed in (16, 17, 18))
    sigma = torch.full((2, 1), 0.6)
    velocity = adaptive_projected_guidance(cond, uncond, 4.0, tokens, sigma, Guidance(apg=0.0))
    clean, update = tokens - 0.6 * cond, -0.6 * (velocity - cond)
    torch.testing.assert_close((clean * update).sum(1), torch.zeros(2, CHANNELS), rtol=0, atol=1e-5)
    assert update.abs().max() > 0.1


def test_apg_leaves_clean_tokens_unguided_and_limits_the_norm() -> None:
    cond, uncond, tokens = (randn(1, TOKENS, CHANNELS, seed=seed) for seed in (19, 20, 21))
    sigma = torch.full((1, TOKENS), 0.5)
    sigma[0, 0] = 0.0
    velocity = adaptive_projected_guidance(cond, uncond, 2.0, tokens, sigma, Guidance(apg=1.0, apg_norm=0.25))
    assert torch.equal(velocity[:, 0], cond[:, 0])
    torch.testing.assert_close((0.5 * (velocity - cond)).norm(), torch.tensor(0.25))


def test_cfg_without_a_negative_prompt_raises() -> None:
    denoiser = guided_denoiser(MixingModel(), POSITIVE, None, Guidance(cfg_scale=2.0))
    with pytest.raises(ValueError, match="negative prompt"):
        denoiser(0.5, randn(1, TOKENS, CHANNELS, seed=22), torch.tensor([[0.5]]))


def test_lists_are_looked_up_by_the_sigma_of_the_evaluation() -> None:
    """A sampler may evaluate between the sigmas of its schedule."""
    tokens, token_sigmas = randn(1, TOKENS, CHANNELS, seed=1), torch.tensor([[0.7]])
    by_list = make_denoiser(MixingModel(), cfg_scale=(1.0, 4.0), sigmas=(0.8, 0.5))
    for sigma, scale in ((0.9, 1.0), (0.8, 1.0), (0.79, 4.0), (0.1, 4.0)):
        expected = make_denoiser(MixingModel(), cfg_scale=scale)(sigma, tokens, token_sigmas)
        assert torch.equal(by_list(sigma, tokens, token_sigmas), expected)
