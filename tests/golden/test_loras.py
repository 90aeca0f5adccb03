"""The demo's bundled LoRAs, trained with `kadr train-lora`: they do what they learned, as far as the strength says."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import lora as lora_benchmark
from kadr.checkpoints.lora.file import LoraFile
from kadr.models.registry import find_release
from kadr.spec.locate import fetch_release

TEAL, CANNY = "demo-lora-teal", "demo-ic-lora-canny"
VIDEOS = 5


@pytest.fixture(scope="module")
def figures() -> dict:
    return lora_benchmark.measure_teal(fetch_release(find_release(TEAL)), VIDEOS)[0]


@pytest.mark.slow
def test_red_turns_teal_in_proportion_to_the_strength(figures: dict) -> None:
    share = {float(strength): shares["median"] for strength, shares in figures["teal_share"].items()}
    assert abs(share[0.0]) < 0.1
    assert 0.3 < share[0.5] < 0.8
    assert 0.9 < share[1.0] < 1.15


@pytest.mark.slow
def test_strength_0_gives_the_frames_without_the_lora(figures: dict) -> None:
    assert figures["strength_0_is_identical"]


@pytest.mark.slow
def test_outlines_match_those_of_the_control_clip(tmp_path: Path) -> None:
    figures, _ = lora_benchmark.measure_edges(fetch_release(find_release(CANNY)), VIDEOS, tmp_path)
    scores = figures["outline_overlap"]
    assert figures["wins_with_control"] == VIDEOS
    assert scores["with"] > 0.4
    assert scores["with"] > 2.5 * max(scores["without"], scores["without_lora"])


@pytest.mark.parametrize("name", [TEAL, CANNY])
def test_bundled_loras_are_ordinary_files_of_the_trainer(name: str) -> None:
    described = LoraFile.open(fetch_release(find_release(name))).describe()
    assert (described.key_format, described.metadata["kadr_base_model"], described.unexpected_keys) == (
        "Comfy",
        "demo",
        (),
    )
    assert described.size_bytes < 1_500_000
    assert (described.reference_downscale == 1) is (name == CANNY)
