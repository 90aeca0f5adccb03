"""Each check of a request: one that it finds, with the fix, and one that it leaves alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kadr.diagnosis.diagnose import diagnose_request
from kadr.diagnosis.finding import ERROR, NOTE, QUALITY, SPEED, Finding, Findings
from kadr.media.writer import VideoWriter
from kadr.models.registry import DISTILLED_SIGMAS
from kadr.planning import planner, suggest
from kadr.request.inputs import Condition, Control
from kadr.request.request import Request
from kadr.request.windows import Windows
from kadr.sampling.settings import Guidance, Pass
from kadr.sampling.step_cache import StepCache
from kadr.shapes import Size
from kadr.spec.model import ModelSpec, SpecOptions
from kadr.spec.open import open_spec

DEMO, DISTILLED_DEMO = "demo", "demo-distilled"
DEV_2B, STOCHASTIC_2B, DISTILLED_2B = "ltxv-2b-0.9.5", "ltxv-2b-0.9.6-distilled", "ltxv-2b-0.9.8-distilled"
DEV_13B, DISTILLING_LORA = "ltxv-13b-0.9.7-dev", "ltxv-13b-0.9.7-distilled-lora"
KNOWN = "a red circle moving right on a black background"
PARAGRAPH = (
    "A red fox runs through deep snow towards the camera, its fur lit by a low winter sun from the left. Snow flies up "
    "behind its paws. The camera stays near the ground and moves back slowly, and bare trees stand out of focus behind."
)
SIGMAS = "1,0.9937,0.9875,0.9812,0.975,0.9094,0.725,0.4219"
ENHANCE = "--enhance http://localhost:11434/v1"


@dataclass(frozen=True)
class Case:
    """A request that a check finds, and how it differs from one that the check leaves alone.

    Args:
        kind, topic, fix: of the finding.
        bad: the fields of the request that are wrong.
        model, options: of both.
        good: those of the request that is right, by default none.
        good_options: instead of `options`, for a check of the model.
    """

    kind: str
    topic: str
    fix: str
    bad: Mapping[str, Any] = field(default_factory=dict)
    model: str = DEMO
    options: Mapping[str, Any] = field(default_factory=dict)
    good: Mapping[str, Any] = field(default_factory=dict)
    good_options: Mapping[str, Any] | None = None


CASES = {
    "cfg on a distilled model": Case(
        QUALITY, "guidance", "--guidance 1", {"guidance": Guidance(cfg_scale=4.0)}, DISTILLED_DEMO
    ),
    "cfg in the second pass of a distilled model": Case(
        QUALITY,
        "guidance",
        "--second-guidance 1",
        {"second_pass": Pass(guidance=Guidance(cfg_scale=4.0))},
        DISTILLED_DEMO,
    ),
    "no cfg": Case(QUALITY, "guidance", "--guidance 3", {"guidance": Guidance(cfg_scale=1.0)}),
    "no cfg where the recipe has a list": Case(
        QUALITY,
        "guidance",
        "--guidance 1,1,6,8,6,1,1 --guidance-sigmas 1,0.996,0.9933,0.985,0.9767,0.9008,0.618",
        {"guidance": Guidance(cfg_scale=1.0)},
        DEV_13B,
    ),
    "high cfg": Case(
        QUALITY,
        "guidance",
        "--guidance 3",
        {"guidance": Guidance(cfg_scale=12.0)},
        good={"guidance": Guidance(cfg_scale=6.0)},
    ),
    "stg on a distilled model": Case(
        QUALITY,
        "STG",
        "--stg 0",
        {"guidance": Guidance(stg_scale=1.0, skip_blocks=(2,))},
        DISTILLED_DEMO,
    ),
    "stg without blocks": Case(
        SPEED,
        "STG",
        "--stg 0",
        {"guidance": Guidance(stg_scale=1.0)},
        good={"guidance": Guidance(stg_scale=1.0, skip_blocks=(2,))},
    ),
    "high stg": Case(QUALITY, "STG", "--stg 1", {"guidance": Guidance(stg_scale=3.0)}, DEV_2B),
    "negative prompt without cfg": Case(
        NOTE,
        "negative prompt",
        "--guidance 3",
        {"negative_prompt": "blue", "guidance": Guidance(cfg_scale=1.0)},
        good={"negative_prompt": "blue"},
    ),
    "negative prompt of a distilled model": Case(
        NOTE, "negative prompt", "", {"negative_prompt": "blue"}, DISTILLED_DEMO
    ),
    "few steps": Case(QUALITY, "steps", "--steps 24", {"steps": 6}, good={"steps": 16}),
    "few steps of a distilled model": Case(QUALITY, "steps", "--steps 8", {"steps": 4}, STOCHASTIC_2B),
    "many steps of a distilled model": Case(
        QUALITY, "steps", "--steps 8", {"steps": 30}, STOCHASTIC_2B, good={"steps": 10}
    ),
    "many steps": Case(SPEED, "steps", "--steps 24", {"steps": 60}),
    "few steps where the recipe skips some": Case(
        QUALITY, "steps", "--steps 30 --skip-final 3", {"steps": 10, "skip_final": 3}, DEV_13B
    ),
    "many steps in the second pass": Case(
        SPEED,
        "steps",
        "--second-steps 30 --second-skip-initial 17",
        {"second_pass": Pass(steps=60, skip_initial=17)},
        DEV_13B,
    ),
    "noise and a low first sigma": Case(
        QUALITY,
        "sigmas",
        "--steps 24",
        {"sigmas": tuple(0.5 - step / 50 for step in range(20))},
        good={"sigmas": tuple(1.0 - step / 25 for step in range(20))},
    ),
    "last sigmas skipped": Case(QUALITY, "sigmas", "--skip-final 0", {"steps": 24, "skip_final": 5}),
    "stochastic sampler": Case(QUALITY, "sampler", "--sampler euler", {"sampler": "euler_stochastic"}),
    "another sampler than the stochastic one": Case(
        QUALITY, "sampler", "--sampler euler_stochastic", {"sampler": "euler"}, STOCHASTIC_2B
    ),
    "single pass": Case(NOTE, "passes", "--multi-scale", {"multi_scale": False}, DISTILLED_DEMO),
    "windows of a recipe of two passes": Case(
        NOTE,
        "windows",
        "--single-pass",
        {"windows": Windows(frames=25), "frames": 41},
        DISTILLED_DEMO,
        good={"windows": Windows(frames=25), "frames": 41, "multi_scale": False},
    ),
    "small": Case(QUALITY, "size", "--size 1216x704", {"size": (304, 176)}, DEV_2B, good={"size": (512, 320)}),
    "large": Case(QUALITY, "size", "--size 256x256", {"size": (512, 512)}, DISTILLED_DEMO, good={"size": (224, 256)}),
    "long": Case(QUALITY, "frames", "--window 25", {"frames": 49}, good={"windows": Windows(frames=25), "frames": 49}),
    "long, with two passes": Case(
        QUALITY, "frames", "--window 121 --single-pass", {"frames": 265}, DISTILLED_2B, good={"frames": 257}
    ),
    "long windows": Case(
        QUALITY,
        "frames",
        "--window 121",
        {"windows": Windows(frames=289), "frames": 600},
        DEV_2B,
        good={"windows": Windows(frames=121), "frames": 600},
    ),
    "high frame rate": Case(QUALITY, "frame rate", "--fps 30", {"fps": 60}, DEV_2B, good={"fps": 23.976}),
    "low frame rate": Case(QUALITY, "frame rate", "--fps 24", {"fps": 12}),
    "few words": Case(QUALITY, "prompt", ENHANCE, {"prompt": "a fox"}, DEV_2B, good={"prompt": PARAGRAPH}),
    "another language": Case(
        QUALITY, "prompt", ENHANCE, {"prompt": "лиса бежит по снегу " * 6}, DEV_2B, good={"prompt": PARAGRAPH}
    ),
    "words that the demo does not know": Case(QUALITY, "prompt", f"--model {DISTILLED_2B}", {"prompt": "a fox"}),
    "empty prompt": Case(QUALITY, "prompt", "", {"prompt": " "}),
    "long prompt": Case(QUALITY, "prompt", "", {"prompt": "red circle " * 200}, good={"prompt": "red circle " * 20}),
    "long prompt without a tokenizer": Case(
        QUALITY, "prompt", "", {"prompt": "word " * 300}, DEV_2B, good={"prompt": PARAGRAPH}
    ),
    "step cache of few steps": Case(
        QUALITY, "step cache", "--cache none", {"cache": StepCache("taylor")}, DISTILLED_DEMO
    ),
    "few bits": Case(
        QUALITY, "quantization", "--quant Q8_0", options={"quant": "Q2_K"}, good_options={"quant": "Q5_K"}
    ),
    "four bits": Case(NOTE, "quantization", "--quant Q8_0", options={"quant": "Q4_0"}, good_options={"quant": "int8"}),
    "distilling lora by the recipe": Case(
        QUALITY,
        "LoRA",
        f"--single-pass --guidance 1 --stg 0 --sigmas {SIGMAS}",
        model=DEV_13B,
        options={"loras": (DISTILLING_LORA,)},
        good={
            "multi_scale": False,
            "guidance": Guidance(cfg_scale=1.0, stg_scale=0.0),
            "sigmas": DISTILLED_SIGMAS,
        },
    ),
    "distilling lora on a distilled model": Case(
        QUALITY,
        "LoRA",
        "",
        model="ltxv-13b-0.9.7-distilled",
        options={"loras": (DISTILLING_LORA,)},
        good_options={},
    ),
    "not on disk": Case(
        NOTE, "files", "kadr models pull ltxv-spatial-upscaler-0.9.8", model=DISTILLED_2B, good={"multi_scale": False}
    ),
    "upscaler for a single pass": Case(
        QUALITY, "passes", "--multi-scale", options={"upscaler": ("demo-upscaler",)}, good={"multi_scale": True}
    ),
}


@cache
def _open(options: SpecOptions) -> ModelSpec:
    return open_spec(options)


def diagnose(
    model: str | Path, options: Mapping[str, Any], fields: Mapping[str, Any], **flags: bool
) -> tuple[Finding, ...]:
    findings = Findings()
    with findings.record():
        spec = _open(SpecOptions(model=model, device="cpu", **options))
        prompt = KNOWN if spec.release is None or spec.release.words else PARAGRAPH
        diagnose_request(spec, Request(**{"prompt": prompt, **fields}), findings, **flags)
    return findings.sorted()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_check_finds_one_request_and_leaves_another_alone(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    if case.topic != "prompt":  # of plans there is a test of its own
        monkeypatch.setattr("kadr.diagnosis.diagnose._plan", lambda spec, resolved: None)
    found = diagnose(case.model, case.options, case.bad)
    assert (case.kind, case.topic, case.fix) in {(item.kind, item.topic, item.fix) for item in found}, found
    assert ERROR not in {finding.kind for finding in found}, found
    good = diagnose(case.model, case.options if case.good_options is None else case.good_options, case.good)
    assert ERROR not in {finding.kind for finding in good}, good
    assert (case.kind, case.topic, case.fix) not in {(item.kind, item.topic, item.fix) for item in good}, good


def test_a_plan_gives_findings_of_time_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not {finding.topic for finding in diagnose(DEMO, {}, {})} & {"time", "memory"}
    monkeypatch.setattr(suggest, "LONG_SECONDS", 0.0)
    (long,) = [finding for finding in diagnose(DEMO, {}, {}) if finding.topic == "time"]
    assert (long.kind, long.fix) == (SPEED, "--model demo-distilled")
    monkeypatch.setattr(planner, "free_bytes", lambda device: 1000)
    (full,) = [finding for finding in diagnose(DEMO, {}, {}) if finding.topic == "memory"]
    assert (full.kind, full.is_bad) == (ERROR, True)


def test_a_request_by_the_recipe_has_no_findings() -> None:
    for model in (DEMO, DISTILLED_DEMO):
        assert diagnose(model, {}, {}) == ()


def test_a_cropped_image_is_found_with_the_size_that_fits(tmp_path: Path) -> None:
    path = tmp_path / "tall.png"
    Image.new("RGB", (300, 900)).save(path)
    condition = Condition(media=str(path))
    (found,) = diagnose(DEMO, {}, {"conditions": (condition,)})
    assert (found.kind, found.topic, found.fix) == (QUALITY, "images and clips", "--size 64x192")
    for size in ((96, 288), "auto"):
        assert diagnose(DEMO, {}, {"conditions": (condition,), "size": size}) == ()


def test_a_clip_that_is_too_long_is_noted(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    with VideoWriter(path, Size(128, 128), 24) as writer:
        writer.write(np.zeros((30, 128, 128, 3), np.uint8))
    found = diagnose(DEMO, {"loras": ("demo-ic-lora-canny",)}, {"controls": (Control(media=str(path)),)})
    assert [(finding.kind, finding.topic) for finding in found] == [(NOTE, "clip")]
    (found_condition,) = diagnose(DEMO, {}, {"conditions": (Condition(media=str(path), is_clip=True),)})
    assert (found_condition.kind, found_condition.topic) == (NOTE, "clip")


def test_an_error_is_a_finding_and_the_checks_of_the_model_go_on(tmp_path: Path) -> None:
    found = diagnose(DEMO, {"quant": "Q2_K"}, {"conditions": (Condition(media=str(tmp_path / "none.png")),)})
    assert [(finding.kind, finding.topic) for finding in found] == [
        (ERROR, "images and clips"),
        (QUALITY, "quantization"),
    ]


def test_a_prompt_yet_to_be_written_is_not_looked_at() -> None:
    assert diagnose(DEMO, {}, {"prompt": ""}, has_prompt=False) == ()
    assert diagnose(DEMO, {}, {"prompt": "a fox"}, is_enhanced=True) == ()
