"""Guidance as a rule over any model: who is asked what, and its closed forms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kadr.sampling.guidance import (
    Denoiser,
    Perturbation,
    PromptEmbeddings,
    adaptive_projected_guidance,
    cfg_star_scale,
    guided_denoiser,
)
from kadr.sampling.settings import Guidance

WIDTH, CHANNELS, TOKENS, LENGTH = 12, 5, 7, 6


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def text(seed: int, real: int, batch: int = 1) -> PromptEmbeddings:
    return PromptEmbeddings(drawn(batch, LENGTH, WIDTH, seed=seed), (torch.arange(LENGTH) < real).expand(batch, -1))


class Model:
    """Something that mixes its inputs, sample by sample, and notes what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, ...]] = []
        self.disturbed: list[Perturbation] = []
        torch.manual_seed(0)
        self.inner = nn.Linear(CHANNELS + WIDTH + 1, CHANNELS).requires_grad_(False)

    def __call__(
        self, tokens: Tensor, level: Tensor, text: PromptEmbeddings, disturb: Perturbation | None = None
    ) -> tuple[Tensor, Tensor | None]:
        self.asked.append(tuple(tokens.shape))
        assert text.embeddings.shape[0] == text.mask.shape[0] == tokens.shape[0] == level.shape[0]
        said = (text.embeddings * text.mask[..., None]).mean(dim=1, keepdim=True).expand(-1, tokens.shape[1], -1)
        made = self.inner(torch.cat([tokens, said, level.expand(-1, tokens.shape[1])[..., None]], dim=-1)).tanh()
        if disturb is None:
            return made, None
        self.disturbed.append(disturb)
        return made, made[disturb.rows] * 0.5 - 0.1


POSITIVE, NEGATIVE = text(1, 5), text(2, 2)


def estimate(model: Model, *, together: bool = False, batch: int = 1, **values: Any) -> Denoiser:
    guidance = Guidance(**values)
    steps = [guidance.at_sigma(0.5)]
    texts = (text(1, 5, batch), text(2, 2, batch))
    return guided_denoiser(model, *texts, guidance, steps, guidance_batch=together)


@pytest.fixture(params=["one level", "a level per token"])
def level(request: pytest.FixtureRequest) -> Tensor:
    return torch.tensor([[0.7]]) if request.param == "one level" else torch.linspace(0.1, 1, TOKENS)[None]


ALL: Sequence[dict[str, Any]] = (
    {"cfg_scale": 3.0},
    {"stg_scale": 2.0, "skip_blocks": (1,)},
    {"cfg_scale": 3.0, "stg_scale": 2.0, "skip_blocks": (1, 4)},
    {"cfg_scale": 3.0, "stg_scale": 2.0, "skip_blocks": (1,), "rescale": 0.7, "cfg_star": True},
    {"cfg_scale": 5.0, "apg": 0.2, "apg_norm": 0.5},
)


@pytest.mark.parametrize("values", ALL)
@pytest.mark.parametrize("batch", [1, 3])
def test_guidance_in_one_batch_equals_separate_evaluations(values: dict[str, Any], batch: int, level: Tensor) -> None:
    tokens, level = drawn(batch, TOKENS, CHANNELS, seed=3), level.expand(batch, -1)
    apart, joined = Model(), Model()
    one = estimate(apart, batch=batch, **values)(0, tokens, level)
    other = estimate(joined, batch=batch, together=True, **values)(0, tokens, level)
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    guided = values.get("cfg_scale", 1.0) > 1
    assert apart.asked == [(batch, TOKENS, CHANNELS)] * (1 + guided)
    assert joined.asked == [(batch * (1 + guided), TOKENS, CHANNELS)]


def test_cfg_extrapolates_from_uncond_to_cond_by_its_scale(level: Tensor) -> None:
    tokens, model = drawn(1, TOKENS, CHANNELS, seed=4), Model()
    (prompt, _), (negative, _) = model(tokens, level, POSITIVE), model(tokens, level, NEGATIVE)
    for scale in (3.0, 7.5):
        made = estimate(model, cfg_scale=scale)(0, tokens, level)
        torch.testing.assert_close(made, negative + scale * (prompt - negative))


def test_cfg_scale_1_evaluates_the_model_once_and_changes_nothing(level: Tensor) -> None:
    tokens, model = drawn(1, TOKENS, CHANNELS, seed=5), Model()
    unguided, _ = model(tokens, level, POSITIVE)
    model.asked.clear()
    assert torch.equal(estimate(model, cfg_scale=1.0)(0, tokens, level), unguided)
    assert model.asked == [(1, TOKENS, CHANNELS)]


@pytest.mark.parametrize("together", [False, True])
def test_stg_perturbs_the_conditional_rows_only(together: bool, level: Tensor) -> None:
    tokens, model = drawn(2, TOKENS, CHANNELS, seed=6), Model()
    values = {"cfg_scale": 3.0, "stg_scale": 1.0, "skip_blocks": (2, 5), "stg_mode": "attention_skip"}
    estimate(model, together=together, batch=2, **values)(0, tokens, level.expand(2, -1))
    rows = slice(2, None) if together else slice(None)
    assert model.disturbed == [Perturbation((2, 5), "attention_skip", rows)]


def test_stg_moves_away_from_the_perturbed_prediction(level: Tensor) -> None:
    tokens, model = drawn(1, TOKENS, CHANNELS, seed=7), Model()
    prompt, _ = model(tokens, level, POSITIVE)
    made = estimate(model, stg_scale=2.0, skip_blocks=(0,))(0, tokens, level)
    torch.testing.assert_close(made, prompt + 2.0 * (prompt - (prompt * 0.5 - 0.1)))


def test_stg_without_blocks_changes_nothing_and_costs_nothing(level: Tensor) -> None:
    tokens, model = drawn(1, TOKENS, CHANNELS, seed=8), Model()
    prompt, _ = model(tokens, level, POSITIVE)
    model.asked.clear()
    assert torch.equal(estimate(model, stg_scale=4.0, skip_blocks=())(0, tokens, level), prompt)
    assert len(model.asked) == 1
    assert not model.disturbed


@pytest.mark.parametrize("rescale", [0.0, 0.3, 0.7])
def test_rescale_interpolates_the_standard_deviation(rescale: float, level: Tensor) -> None:
    tokens, model = drawn(1, TOKENS, CHANNELS, seed=9), Model()
    prompt, _ = model(tokens, level, POSITIVE)
    free = estimate(model, stg_scale=3.0, skip_blocks=(0,))(0, tokens, level)
    made = estimate(model, stg_scale=3.0, skip_blocks=(0,), rescale=rescale)(0, tokens, level)
    wanted = rescale * prompt.std() + (1 - rescale) * free.std()
    torch.testing.assert_close(made.std(), wanted)
    torch.testing.assert_close(made / made.std(), free / free.std())


def test_rescale_is_off_at_1_and_without_stg(level: Tensor) -> None:
    tokens, model = drawn(1, TOKENS, CHANNELS, seed=10), Model()
    free = estimate(model, stg_scale=3.0, skip_blocks=(0,))(0, tokens, level)
    assert torch.equal(estimate(model, stg_scale=3.0, skip_blocks=(0,), rescale=1.0)(0, tokens, level), free)
    plain = estimate(model, cfg_scale=3.0)(0, tokens, level)
    assert torch.equal(estimate(model, cfg_scale=3.0, rescale=0.5)(0, tokens, level), plain)


def test_cfg_star_makes_the_difference_orthogonal_to_uncond() -> None:
    prompt, negative = drawn(3, TOKENS, CHANNELS, seed=11), drawn(3, TOKENS, CHANNELS, seed=12)
    factor = cfg_star_scale(prompt, negative)
    assert factor.shape == (3, 1, 1)
    left = ((prompt - factor * negative) * negative).flatten(1).sum(1)
    torch.testing.assert_close(left, torch.zeros(3), rtol=0, atol=1e-5)


def test_apg_of_1_equals_plain_cfg() -> None:
    prompt, negative, tokens = (drawn(2, TOKENS, CHANNELS, seed=seed) for seed in (13, 14, 15))
    level = torch.full((2, 1), 0.6)
    made = adaptive_projected_guidance(prompt, negative, 4.0, tokens, level, Guidance(apg=1.0))
    torch.testing.assert_close(made, negative + 4.0 * (prompt - negative), rtol=1e-5, atol=1e-5)


def test_apg_of_0_has_no_component_along_the_clean_prediction() -> None:
    prompt, negative, tokens = (drawn(2, TOKENS, CHANNELS, seed=seed) for seed in (16, 17, 18))
    level = torch.full((2, 1), 0.6)
    made = adaptive_projected_guidance(prompt, negative, 4.0, tokens, level, Guidance(apg=0.0))
    picture, push = tokens - 0.6 * prompt, -0.6 * (made - prompt)
    torch.testing.assert_close((picture * push).sum(1), torch.zeros(2, CHANNELS), rtol=0, atol=1e-5)
    assert push.abs().max() > 0.1


def test_apg_leaves_clean_tokens_unguided_and_limits_the_norm() -> None:
    prompt, negative, tokens = (drawn(1, TOKENS, CHANNELS, seed=seed) for seed in (19, 20, 21))
    level = torch.full((1, TOKENS), 0.5)
    level[0, 0] = 0.0
    made = adaptive_projected_guidance(prompt, negative, 2.0, tokens, level, Guidance(apg=1.0, apg_norm=0.25))
    assert torch.equal(made[:, 0], prompt[:, 0])
    torch.testing.assert_close((0.5 * (made - prompt)).norm(), torch.tensor(0.25))


def test_cfg_without_a_negative_prompt_raises() -> None:
    guidance = Guidance(cfg_scale=2.0)
    asking = guided_denoiser(Model(), POSITIVE, None, guidance, [guidance.at_sigma(0.5)])
    with pytest.raises(ValueError, match="negative prompt"):
        asking(0, drawn(1, TOKENS, CHANNELS, seed=22), torch.tensor([[0.5]]))
