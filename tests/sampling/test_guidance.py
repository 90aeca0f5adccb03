"""Guidance as a rule over any model: together, one after the other, and its closed forms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from kadr.sampling.guidance import Text, classifier_free, plain

WIDTH, CHANNELS, TOKENS, LENGTH = 12, 5, 7, 6


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def text(seed: int, real: int) -> Text:
    return Text(drawn(1, LENGTH, WIDTH, seed=seed), (torch.arange(LENGTH) < real)[None])


class Model:
    """Something that mixes its inputs, sample by sample, and notes what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, ...]] = []
        torch.manual_seed(0)
        self.inner = nn.Linear(CHANNELS + WIDTH + 1, CHANNELS).requires_grad_(False)

    def __call__(self, tokens: Tensor, level: Tensor, text: Text) -> Tensor:
        self.asked.append(tuple(tokens.shape))
        assert text.encoding.shape[0] == text.mask.shape[0] == tokens.shape[0] == level.shape[0]
        said = (text.encoding * text.mask[..., None]).mean(dim=1, keepdim=True).expand(-1, tokens.shape[1], -1)
        return self.inner(torch.cat([tokens, said, level.expand(-1, tokens.shape[1])[..., None]], dim=-1)).tanh()


POSITIVE, NEGATIVE = text(1, 5), text(2, 2)


@pytest.fixture(params=["one level", "a level per token"])
def level(request: pytest.FixtureRequest) -> Tensor:
    return torch.tensor([[0.7]]) if request.param == "one level" else torch.linspace(0, 1, TOKENS)[None]


def test_together_gives_the_numbers_of_one_after_the_other(level: Tensor) -> None:
    tokens = drawn(1, TOKENS, CHANNELS, seed=3)
    apart, joined = Model(), Model()
    one = classifier_free(apart, POSITIVE, NEGATIVE, 3.0)(tokens, level)
    other = classifier_free(joined, POSITIVE, NEGATIVE, 3.0, together=True)(tokens, level)
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    assert apart.asked == [(1, TOKENS, CHANNELS)] * 2
    assert joined.asked == [(2, TOKENS, CHANNELS)]


@pytest.mark.parametrize("together", [False, True])
def test_guidance_goes_beyond_the_prompt_by_its_scale(together: bool, level: Tensor) -> None:
    tokens, model = drawn(1, TOKENS, CHANNELS, seed=4), Model()
    with_text, without = model(tokens, level, POSITIVE), model(tokens, level, NEGATIVE)
    for scale in (1.0, 3.0, 7.5):
        made = classifier_free(model, POSITIVE, NEGATIVE, scale, together=together)(tokens, level)
        torch.testing.assert_close(made, without + scale * (with_text - without))


def test_a_scale_of_1_and_equal_prompts_are_no_guidance(level: Tensor) -> None:
    tokens, model = drawn(1, TOKENS, CHANNELS, seed=5), Model()
    unguided = plain(model, POSITIVE)(tokens, level)
    torch.testing.assert_close(classifier_free(model, POSITIVE, NEGATIVE, 1.0)(tokens, level), unguided)
    torch.testing.assert_close(classifier_free(model, POSITIVE, POSITIVE, 9.0)(tokens, level), unguided)


def test_unguided_asks_the_model_once() -> None:
    model = Model()
    plain(model, POSITIVE)(drawn(1, TOKENS, CHANNELS, seed=6), torch.tensor([[0.5]]))
    assert model.asked == [(1, TOKENS, CHANNELS)]
