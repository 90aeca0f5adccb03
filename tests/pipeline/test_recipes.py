"""Complete recipes of all releases against the official pipeline, on tiny models with as many blocks as the release.

So steps, sigmas, guidance, perturbed blocks, passes and tone mapping are those that a user gets.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kadr import Engine, Request
from kadr.models.registry import DISTILLED_SIGMAS, MODEL_RELEASES, RELEASES_BY_NAME
from kadr.request.complete import complete_request
from kadr.sampling.schedules import Schedule
from kadr.shapes import Size
from tests.oracles import relative_error
from tests.pipeline import official_pipeline
from tests.tiny_models import LINEAR_QUADRATIC, MODEL_FILE, SHIFTED, write_model, write_random_upscaler

NAMES = [model.name for model in MODEL_RELEASES if model.repo is not None and not model.name.endswith("-fp8")]
MAX_ERROR = 1e-5  # relative; 26 steps of up to three model evaluations, CFG scale up to 8


def write_tiny_release(folder: Path, name: str) -> Path:
    """Writes a checkpoint like that of a release, but of tiny widths."""
    release = RELEASES_BY_NAME[name]
    is_old = release.version in ("0.9", "0.9.1")
    distilled_schedule = Schedule(sampler="LinearQuadratic", allowed_sigmas=DISTILLED_SIGMAS)
    has_allowed_sigmas = release.is_distilled and release.version != "0.9.6-distilled"
    schedule = distilled_schedule if has_allowed_sigmas else LINEAR_QUADRATIC
    return write_model(
        folder,
        family=release.vae_family or "",
        is_causal=not is_old,
        num_layers=release.num_layers or 0,
        schedule=SHIFTED if is_old else schedule,
    )


@pytest.mark.parametrize("name", NAMES)
def test_recipe_of_a_release_gives_the_official_latents(name: str, tmp_path: Path, parity: Any) -> None:
    recipe = RELEASES_BY_NAME[name].recipe
    home = write_tiny_release(tmp_path, name)
    upscaler = write_random_upscaler(tmp_path / "upscaler.safetensors") if recipe.multi_scale else None
    engine = Engine.open(home / MODEL_FILE, upscaler=upscaler or (), recipe=recipe, device="cpu")
    request = complete_request(Request(prompt="a red circle moving right", size=Size(96, 96), frames=9, seed=3), recipe)
    upsampler = official_pipeline.open_upsampler(upscaler) if upscaler else None
    expected = official_pipeline.run_official(official_pipeline.open_pipeline(home), request, upsampler=upsampler)
    latents = engine.denoise(request)
    assert torch.isfinite(latents).all()
    assert parity("recipe", name, "official", relative_error(latents, expected.latents)) <= MAX_ERROR


@pytest.mark.parametrize("name", [model.name for model in MODEL_RELEASES if model.name.endswith("-fp8")])
def test_fp8_release_has_the_recipe_of_its_bf16_release(name: str) -> None:
    assert RELEASES_BY_NAME[name].recipe == RELEASES_BY_NAME[name.removesuffix("-fp8")].recipe
