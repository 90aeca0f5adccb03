"""The registry is data: names that resolve, sizes that follow from the shapes, recipes that the samplers accept."""

from __future__ import annotations

import pytest
import torch

from kadr.errors import RequestError
from kadr.models.registry import BY_NAME, RELEASED, Recipe, Released, by_file, find
from kadr.models.transformer import TRANSFORMER_2B, TRANSFORMER_13B, Transformer
from kadr.models.vae import VAE
from kadr.models.vae.config import VAE_0_9, VAE_0_9_1, VAE_0_9_5
from kadr.sampling.schedule import Schedule, explicit
from kadr.shapes import snap_frames

HOSTED = [released for released in RELEASED if released.repo]


@pytest.fixture(scope="module")
def numbers() -> dict[int | str, int]:
    """How many numbers are in a transformer of so many layers, in a VAE of a family."""
    with torch.device("meta"):
        modules = {
            28: Transformer(TRANSFORMER_2B),
            48: Transformer(TRANSFORMER_13B),
            "0.9": VAE(VAE_0_9),
            "0.9.1": VAE(VAE_0_9_1),
            "0.9.5": VAE(VAE_0_9_5),
        }
    return {key: sum(tensor.numel() for tensor in module.state_dict().values()) for key, module in modules.items()}


def test_every_name_finds_its_model() -> None:
    assert len(BY_NAME) == len(RELEASED) == 11
    assert all(find(released.name) is released for released in RELEASED)


@pytest.mark.parametrize(
    ("asked", "near"),
    [("ltxv-2b-0.9.6", "ltxv-2b-0.9.6-dev"), ("ltx-13b-0.9.8-dev", "ltxv-13b-0.9.8-dev"), ("Demo", "demo")],
)
def test_an_unknown_name_is_answered_with_the_nearest(asked: str, near: str) -> None:
    with pytest.raises(RequestError, match=rf"{asked}.*Did you mean .*{near}"):
        find(asked)


def test_a_name_near_to_none_is_answered_with_all() -> None:
    with pytest.raises(RequestError, match=r"Known are demo, ltxv-2b-0\.9,"):
        find("zzzzzzzz")


@pytest.mark.parametrize("released", HOSTED, ids=lambda released: released.name)
def test_a_model_is_known_by_its_file_and_by_its_name(released: Released) -> None:
    assert by_file(released.stem) is by_file(released.stem.upper()) is by_file(released.name) is released
    assert by_file(released.stem + "-fp8") is None


def test_a_file_that_happens_to_be_called_demo_is_not_the_demo() -> None:
    assert by_file("demo") is None


@pytest.mark.parametrize("released", HOSTED, ids=lambda released: released.name)
def test_the_size_of_a_file_follows_from_its_tensors(released: Released, numbers: dict[int | str, int]) -> None:
    width = 4 if released.version == "0.9" else 2
    counted = (numbers[released.layers] + numbers[released.vae_family]) * width
    assert released.size_bytes == pytest.approx(counted, rel=0.001)


@pytest.mark.parametrize("released", RELEASED, ids=lambda released: released.name)
def test_a_recipe_can_be_sampled(released: Released) -> None:
    recipe = released.recipe
    assert recipe.size.snapped() == recipe.size
    assert snap_frames(recipe.frames) == recipe.frames
    assert recipe.levels is None or len(explicit(recipe.levels)) == recipe.steps
    assert (recipe.guidance == 1.0) == ("distilled" in released.name)


def test_the_distilled_levels_are_the_linear_quadratic_ones_rounded_down() -> None:
    made = Schedule(sampler="LinearQuadratic").levels(8, tokens=1)
    levels = torch.tensor(find("ltxv-2b-0.9.8-distilled").recipe.levels)
    assert torch.allclose(made, levels, atol=1e-4)


def test_a_recipe_with_other_levels_than_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="3 steps, but 2 levels"):
        Recipe(steps=3, levels=(1.0, 0.5))


def test_every_model_says_its_licence() -> None:
    assert find("demo").licence == "Apache-2.0"
    assert "research" in find("ltxv-2b-0.9").licence
    assert "v0.9.1.license" in find("ltxv-2b-0.9.1").licence
    assert all(released.licence for released in RELEASED)
