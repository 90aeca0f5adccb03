"""The bundled LoRAs of the demo, as `kadr train-lora` made them: they do what they were taught, as much as is asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import lora as measured
from kadr.checkpoints.lora.file import LoraFile
from kadr.spec.locate import locate_lora

TEAL, CANNY = "demo-lora-teal", "demo-ic-lora-canny"
VIDEOS = 5


@pytest.fixture(scope="module")
def told() -> dict:
    return measured.measure_teal(locate_lora(TEAL), VIDEOS)[0]


@pytest.mark.slow
def test_what_is_called_red_is_teal_at_strength_1_between_at_a_half_and_red_at_0(told: dict) -> None:
    at = {float(strength): each["median"] for strength, each in told["from_red_to_teal"].items()}
    assert abs(at[0.0]) < 0.1
    assert 0.3 < at[0.5] < 0.8
    assert 0.9 < at[1.0] < 1.15


@pytest.mark.slow
def test_at_strength_0_the_frames_are_those_without_it(told: dict) -> None:
    assert told["frames_at_0_are_those_without"]


@pytest.mark.slow
def test_outlines_lie_on_those_of_the_clip_that_is_followed(tmp_path: Path) -> None:
    told, _ = measured.measure_edges(locate_lora(CANNY), VIDEOS, tmp_path)
    scores = told["outlines_on_each_other"]
    assert told["better_with"] == VIDEOS
    assert scores["with"] > 0.4
    assert scores["with"] > 2.5 * max(scores["without"], scores["without_lora"])


@pytest.mark.parametrize("name", [TEAL, CANNY])
def test_they_are_ordinary_files_of_the_trainer(name: str) -> None:
    described = LoraFile.open(locate_lora(name)).describe()
    assert (described.key_format, described.metadata["kadr_base_model"], described.unexpected_keys) == (
        "Comfy",
        "demo",
        (),
    )
    assert described.size_bytes < 1_500_000
    assert (described.reference_downscale == 1) is (name == CANNY)
