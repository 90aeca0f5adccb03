"""AdaIN and tone mapping, against the official code and in closed form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ltx_video.pipelines.pipeline_ltx_video import LTXVideoPipeline, adain_filter_latent

from kadr.sampling.latents import adain, tone_map
from tests.oracles import relative_error

LATENTS = torch.randn(2, 6, 3, 4, 5, generator=torch.Generator().manual_seed(1)) * 2 + 0.5
REFERENCE = torch.randn(2, 6, 3, 2, 3, generator=torch.Generator().manual_seed(2)) * 0.7 - 1


@pytest.mark.parametrize("factor", [0.0, 0.3, 1.0])
def test_adain_equals_the_official_filter(factor: float, parity: Any) -> None:
    error = relative_error(adain(LATENTS, REFERENCE, factor), adain_filter_latent(LATENTS, REFERENCE, factor))
    assert parity("AdaIN", "two passes", "official", error) <= 1e-6


def test_adain_gives_each_channel_the_mean_and_std_of_the_reference() -> None:
    statistics = torch.std_mean(adain(LATENTS, REFERENCE), (2, 3, 4))
    for statistic, expected in zip(statistics, torch.std_mean(REFERENCE, (2, 3, 4)), strict=True):
        torch.testing.assert_close(statistic, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sizes", [((1, 1, 1), (1, 1, 1)), ((1, 2, 2), (1, 1, 1)), ((1, 1, 1), (3, 2, 3))])
@pytest.mark.parametrize("factor", [0.3, 1.0])
def test_adain_of_one_position_takes_the_mean_alone(sizes: tuple[Any, Any], factor: float) -> None:
    latents, reference = LATENTS.flatten(2), REFERENCE.flatten(2)
    latents = latents[..., : torch.Size(sizes[0]).numel()].reshape(2, 6, *sizes[0])
    reference = reference[..., : torch.Size(sizes[1]).numel()].reshape(2, 6, *sizes[1])
    means = torch.lerp(latents.mean((2, 3, 4)), reference.mean((2, 3, 4)), factor)
    result = adain(latents, reference, factor)
    torch.testing.assert_close(result.mean((2, 3, 4)), means)
    torch.testing.assert_close(result - result.mean((2, 3, 4), keepdim=True), latents - latents.mean((2, 3, 4), True))


def test_adain_of_a_constant_channel_gives_the_mean_of_the_reference() -> None:
    latents = LATENTS.clone()
    latents[:, 2] = 0.5
    result, expected = adain(latents, REFERENCE), adain(LATENTS, REFERENCE)
    torch.testing.assert_close(result[:, 2], REFERENCE.mean((2, 3, 4))[:, 2, None, None, None].expand_as(result[:, 2]))
    assert torch.equal(result[:, 3:], expected[:, 3:])


@pytest.mark.parametrize("compression", [0.1, 0.6, 1.0])
def test_tone_map_equals_the_official_one(compression: float, parity: Any) -> None:
    error = relative_error(tone_map(LATENTS, compression), LTXVideoPipeline.tone_map_latents(LATENTS, compression))
    assert parity("tone map", "13B 0.9.8 distilled", "official", error) <= 1e-6


def test_tone_map_has_the_known_values() -> None:
    latents = torch.tensor([-3, -1, -0.1, 0, 0.5, 2, 5])
    expected = torch.tensor([-1.948725, -0.82, -0.094053, 0, 0.447971, 1.382133, 3.201343])
    torch.testing.assert_close(tone_map(latents, 0.6), expected, rtol=0, atol=1e-6)


def test_compression_0_changes_nothing() -> None:
    assert tone_map(LATENTS, 0.0) is LATENTS
