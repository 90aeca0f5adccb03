"""Requests of the demo model that the tests on an emulated GPU share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kadr import Condition, Engine, Request
from kadr.media.writer import VideoWriter
from kadr.sampling.settings import Guidance
from kadr.shapes import Size

PROMPT = "a blue square moving left on a gray background"
TEAL_LORA = Path("src/kadr/assets/demo/demo-lora-teal.safetensors")
GUIDANCE = Guidance(cfg_scale=3, stg_scale=1, rescale=0.7, skip_blocks=(1,), apg=0.0, cfg_star=True)


@pytest.fixture(scope="session")
def media(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Paths of an image and a clip of 9 frames."""
    folder = tmp_path_factory.mktemp("media")
    pixels = np.random.default_rng(0).integers(0, 256, (9, 128, 128, 3), dtype=np.uint8)
    Image.fromarray(pixels[0]).save(folder / "image.png")
    with VideoWriter(folder / "clip.mp4", Size(128, 128), 24) as writer:
        writer.write(pixels)
    return {"IMAGE": str(folder / "image.png"), "CLIP": str(folder / "clip.mp4")}


def build_request(options: dict[str, Any], media: dict[str, str]) -> Request:
    """Returns a request of 6 steps with these options; conditions are (name in `media`, frame, strength)."""
    options = {"steps": 6, **options}
    options["conditions"] = [
        Condition(media[name], frame=frame, strength=strength)
        for name, frame, strength in options.get("conditions", ())
    ]
    return Request(prompt=PROMPT, seed=5, **options)


def open_engine(device: str, options: dict[str, Any]) -> Engine:
    """Opens the demo model in float32, unless `options` say otherwise."""
    return Engine.open("demo", device=device, prompt_cache=False, **{"dtype": "float32", **options})
