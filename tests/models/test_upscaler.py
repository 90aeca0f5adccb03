"""The latent upscaler against the official and the diffusers module, and its config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from diffusers.pipelines.ltx.modeling_latent_upsampler import LTXLatentUpsamplerModel
from ltx_video.models.autoencoders.latent_upsampler import LatentUpsampler as OfficialUpsampler
from torch import nn

from kadr.checkpoints import keys
from kadr.errors import CheckpointError
from kadr.models.registry import RELEASES
from kadr.models.upscaler import SPATIAL_UPSCALER_CONFIG, TEMPORAL_UPSCALER_CONFIG, LatentUpscaler, UpscalerConfig
from tests.oracles import randn, relative_error
from tests.tiny_models import build_random

AXES = {"space": (True, False), "time": (False, True), "both": (True, True)}
ORACLES = {"official": OfficialUpsampler, "diffusers": LTXLatentUpsamplerModel}
KINDS = ("spatial upscaler", "temporal upscaler", "spatial and temporal upscaler")
RELEASED_HEADER = {
    "_class_name": "LatentUpsampler",
    "in_channels": 128,
    "mid_channels": 512,
    "num_blocks_per_stage": 4,
    "dims": 3,
    "spatial_upsample": True,
    "temporal_upsample": False,
}


def small_config(axes: str, width: int = 32) -> UpscalerConfig:
    spatial, temporal = AXES[axes]
    return UpscalerConfig(
        in_channels=12, mid_channels=width, num_blocks_per_stage=2, spatial_upsample=spatial, temporal_upsample=temporal
    )


@pytest.fixture(params=AXES)
def ours(request: pytest.FixtureRequest) -> LatentUpscaler:
    return build_random(lambda: LatentUpscaler(small_config(request.param)))


def build_oracle(ours: LatentUpscaler, build: Any) -> nn.Module:
    """Builds another implementation from our header, with our weights."""
    entries = {key: value for key, value in ours.config.to_header().items() if key != "_class_name"}
    with torch.device("meta"):
        oracle = build(**entries)
    names = keys.map_keys(keys.UPSCALER_KEYS, ours.state_dict())
    state = {names[name]: weight for name, weight in ours.state_dict().items()}
    nn.Module.load_state_dict(oracle, state, strict=True, assign=True)
    return oracle.eval()


# Numbers


@torch.no_grad()
@pytest.mark.parametrize("oracle", ORACLES)
@pytest.mark.parametrize("axes", AXES)
def test_upscaler_equals_official_and_diffusers(axes: str, oracle: str, parity: Any) -> None:
    ours = build_random(lambda: LatentUpscaler(small_config(axes, width=64)))  # two channels per group
    latents = randn(1, 12, 3, 3, 4)
    expected = build_oracle(ours, ORACLES[oracle])(latents)
    assert parity("upscaler", ours.config.kind, oracle, relative_error(ours(latents), expected)) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 2, 4])
def test_sides_double_and_f_frames_become_2f_minus_1(ours: LatentUpscaler, frames: int) -> None:
    config = ours.config
    sides = (8, 6) if config.spatial_upsample else (4, 3)
    expected_frames = 2 * frames - 1 if config.temporal_upsample else frames
    assert ours(randn(1, 12, frames, 4, 3)).shape == (1, 12, expected_frames, *sides)


@torch.no_grad()
def test_samples_of_a_batch_are_independent(ours: LatentUpscaler) -> None:
    batch = randn(2, 12, 2, 4, 3)
    separate = torch.cat([ours(video[None]) for video in batch])
    assert relative_error(ours(batch), separate) < 1e-5


def test_every_parameter_gets_a_gradient(ours: LatentUpscaler) -> None:
    ours = LatentUpscaler(ours.config)
    ours(randn(1, 12, 2, 3, 3)).square().mean().backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in ours.parameters())


# Sizes


@pytest.mark.parametrize(
    ("config", "parameters"), [(SPATIAL_UPSCALER_CONFIG, 126_250_624), (TEMPORAL_UPSCALER_CONFIG, 130_968_192)]
)
def test_released_upscalers_have_the_published_parameter_count(config: UpscalerConfig, parameters: int) -> None:
    with torch.device("meta"):
        module = LatentUpscaler(config)
    assert sum(weight.numel() for weight in module.parameters()) == parameters
    released = [entry for entry in RELEASES if entry.kind == config.kind and entry.repo is not None]
    assert [entry.size_bytes for entry in released] == [pytest.approx(4 * parameters, rel=0.01)] * 2


@pytest.mark.parametrize(("axes", "kind"), zip(AXES, KINDS, strict=True))
def test_kind_is_that_of_the_registry(axes: str, kind: str) -> None:
    assert small_config(axes).kind == kind


# Headers


def test_released_header_is_read_and_written() -> None:
    assert UpscalerConfig.from_header(RELEASED_HEADER) == SPATIAL_UPSCALER_CONFIG
    assert SPATIAL_UPSCALER_CONFIG.to_header() == RELEASED_HEADER


@pytest.mark.parametrize("axes", AXES)
def test_header_round_trips(axes: str) -> None:
    assert UpscalerConfig.from_header(small_config(axes).to_header()) == small_config(axes)


@pytest.mark.parametrize("axes", AXES)
def test_official_class_reads_and_writes_the_same_header(axes: str) -> None:
    header = small_config(axes).to_header()
    with torch.device("meta"):
        official = OfficialUpsampler.from_config(header)
    assert OfficialUpsampler.config(official) == header


def test_missing_header_keys_have_the_common_defaults() -> None:
    header = {"in_channels": 12, "mid_channels": 64, "dims": 3}
    assert UpscalerConfig.from_header(header) == UpscalerConfig(
        in_channels=12, mid_channels=64, spatial_upsample=True, temporal_upsample=False
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dims": 2}, "dims = 2; kadr knows only 3"),
        ({"dims": None}, "dims = None"),
        ({"_class_name": "LatentDownsampler"}, "_class_name = 'LatentDownsampler'"),
        ({"spatial_upsample": False}, "enlarges neither space nor time"),
        ({"spatial_upsample": 1}, "spatial_upsample = 1; it must be true or false"),
        ({"mid_channels": 48}, "mid_channels = 48.*multiple of 32"),
        ({"mid_channels": None}, "mid_channels = None; it must be a positive whole number"),
        ({"in_channels": 0}, "in_channels = 0"),
        ({"num_blocks_per_stage": True}, "num_blocks_per_stage = True"),
        ({"spatial_scale": 1.5, "rational_resampler": True}, "has spatial_scale, rational_resampler.*LTX-2"),
    ],
)
def test_unreleased_header_is_refused(change: Mapping[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        UpscalerConfig.from_header({**RELEASED_HEADER, **change})
