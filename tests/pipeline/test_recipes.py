"""Every released model's own recipe, whole, against the official pipeline: tiny layers, but as many as the model has.

So the steps, their levels, guidance, disturbed blocks, passes and tone mapping are those that a user gets.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kadr import Engine, Request
from kadr.models.registry import DISTILLED_SIGMAS, MODEL_RELEASES, RELEASES_BY_NAME
from kadr.request.resolve import resolve
from kadr.sampling.schedules import Schedule
from kadr.shapes import Size
from tests.oracles import relative_error
from tests.pipeline import official_pipeline
from tests.tiny_models import LINEAR_QUADRATIC, MODEL_FILE, SHIFTED, write_model, write_random_upscaler

NAMES = [model.name for model in MODEL_RELEASES if model.repo is not None and not model.name.endswith("-fp8")]
LATENTS = 1e-5  # relative; 26 steps of up to three evaluations, guided by up to 8


def written(folder: Path, name: str) -> Path:
    """The checkpoint of a released model, but for the widths."""
    released = RELEASES_BY_NAME[name]
    old = released.version in ("0.9", "0.9.1")
    few = Schedule(sampler="LinearQuadratic", allowed_sigmas=DISTILLED_SIGMAS)
    stated = few if released.is_distilled and released.version != "0.9.6-distilled" else LINEAR_QUADRATIC
    return write_model(
        folder,
        family=released.vae_family or "",
        is_causal=not old,
        num_layers=released.num_layers or 0,
        schedule=SHIFTED if old else stated,
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_released_recipe_gives_the_official_latents(name: str, tmp_path: Path, parity: Any) -> None:
    recipe = RELEASES_BY_NAME[name].recipe
    home = written(tmp_path, name)
    upscaler = write_random_upscaler(tmp_path / "upscaler.safetensors") if recipe.multi_scale else None
    engine = Engine.open(home / MODEL_FILE, upscaler=upscaler or (), recipe=recipe, device="cpu")
    request = resolve(Request(prompt="a red circle moving right", size=Size(96, 96), frames=9, seed=3), recipe)
    upsampler = official_pipeline.open_upsampler(upscaler) if upscaler else None
    expected = official_pipeline.run_official(official_pipeline.open_pipeline(home), request, upsampler=upsampler)
    made = engine.denoise(request)
    assert torch.isfinite(made).all()
    assert parity("recipe", name, "official", relative_error(made, expected.latents)) <= LATENTS


@pytest.mark.parametrize("name", [model.name for model in MODEL_RELEASES if model.name.endswith("-fp8")])
def test_an_fp8_twin_has_the_recipe_of_the_model_it_was_made_from(name: str) -> None:
    assert RELEASES_BY_NAME[name].recipe == RELEASES_BY_NAME[name.removesuffix("-fp8")].recipe
