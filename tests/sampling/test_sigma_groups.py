"""Groups give each token the sigma that it has, and on a CPU exactly what `unique` finds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kadr.sampling.sigma_groups import SigmaGroups

MASKS = ([0.0, 1.0], [0.0, 0.4, 1.0], [0.3], [0.0, 0.1, 0.5, 0.9])


def draw_mask(values: list[float], batch: int, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(len(values))
    return torch.tensor(values)[torch.randint(len(values), (batch, count), generator=generator)]


@pytest.mark.parametrize("values", MASKS)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("sigma", [1.0, 0.6, 0.35, 0.05])
def test_distinct_sigmas_and_indices_are_those_of_unique(values: list[float], batch: int, sigma: float) -> None:
    mask = draw_mask(values, batch, 50)
    groups = SigmaGroups.from_mask(mask, 0, like=torch.zeros(batch, 50, 4))
    assert groups is not None
    token_sigmas = torch.tensor(sigma).minimum(1.0 - mask)
    distinct, indices = groups.distinct(token_sigmas)
    expected, expected_indices = token_sigmas.unique(return_inverse=True)
    assert torch.equal(distinct, expected)
    assert torch.equal(indices, expected_indices)


def test_a_batch_of_both_prompts_repeats_the_groups() -> None:
    mask = draw_mask([0.0, 0.5], 1, 30)
    groups = SigmaGroups.from_mask(mask, 0, like=torch.zeros(1, 30, 4))
    assert groups is not None
    token_sigmas = torch.tensor(0.8).minimum(1.0 - mask).repeat(2, 1)
    distinct, indices = groups.distinct(token_sigmas)
    assert torch.equal(distinct[indices], token_sigmas)


@pytest.mark.parametrize("has_mask", [False, True])
def test_reference_tokens_have_a_group_of_their_own(has_mask: bool) -> None:
    tokens = torch.zeros(1, 20, 4)
    mask = draw_mask([0.0, 1.0], 1, 20) if has_mask else None
    groups = SigmaGroups.from_mask(mask, 7, like=tokens)
    assert groups is not None
    assert groups.indices.shape == (1, 27)
    assert len(groups.tokens) == 2 + has_mask
    assert len(groups.indices[0, 20:].unique()) == 1
    assert not torch.isin(groups.indices[0, :20], groups.indices[0, 20:]).any()


def test_without_conditions_and_references_there_are_no_groups() -> None:
    assert SigmaGroups.from_mask(None, 0, like=torch.zeros(1, 20, 4)) is None
