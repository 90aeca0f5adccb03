"""Long videos: windows against the pipeline of diffusers, and the laws that hold whatever a model makes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kadr import Condition, Engine, Request
from kadr.pipeline.windows import Windows
from kadr.sampling.settings import Guidance
from kadr.shapes import Size
from tests.oracles import relative
from tests.pipeline import long_diffusers

LATENTS = 1e-5  # relative error; asked were 1e-4
PROMPTS = "a red circle | birds fly slowly | blue sea"
LEVELS = (1.0, 0.95, 0.7, 0.4, 0.2)


def asked(*conditions: Condition, **fields: Any) -> Request:
    """A long video of few tokens."""
    given: dict[str, Any] = {
        "prompt": PROMPTS,
        "negative_prompt": "evening",
        "size": Size(64, 96),
        "frames": 97,
        "fps": 24.0,
        "seed": 5,
        "levels": LEVELS,
        "guidance": Guidance(scale=3.0, stg=0.0),
        "stochastic": False,
        "image_noise": 0.0,
        "windows": Windows(frames=41, overlap=24, strength=1.0, adain=0.25),
    }
    return Request(conditions=conditions, **{**given, **fields})


CASES: dict[str, dict[str, Any]] = {
    "windows": {},
    "windows, held half": {"windows": Windows(frames=41, overlap=24, strength=0.5, adain=0.25)},
    "windows, all the statistics of the first": {"windows": Windows(frames=41, overlap=32, strength=1.0, adain=1.0)},
    "windows, no statistics": {"windows": Windows(frames=41, overlap=24, strength=0.8, adain=0.0)},
    "windows, one latent of overlap": {"windows": Windows(frames=33, overlap=8, strength=1.0)},
    "windows, no guidance": {"guidance": Guidance(scale=1.0), "prompt": "birds fly"},
    "windows, a shorter last one": {"frames": 89},
    "windows with a picture": {"picture": True},
    "windows with a picture remembered half": {
        "picture": True,
        "windows": Windows(frames=41, overlap=24, strength=0.5, remember=0.5),
    },
}


@pytest.mark.parametrize("name", CASES)
def test_a_long_video_has_the_latents_of_diffusers(
    name: str, engine: Engine, photo: Condition, parity: Callable[[str, str, str, float], float]
) -> None:
    fields = dict(CASES[name])
    request = asked(*[photo] * fields.pop("picture", False), **fields)
    expected = long_diffusers.run(engine, request)
    made = engine.denoise(request)
    assert made.shape == expected.shape
    assert parity("long video", "0.9.5", "diffusers", relative(made, expected)) <= LATENTS
