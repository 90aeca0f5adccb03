"""`kadr generate --dry-run`: the resolved request, step by step, from headers and names alone."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kadr.media.writer import VideoWriter
from kadr.models.registry import Release
from kadr.shapes import Size
from kadr.spec import locate
from tests import lora_files
from tests.cli.conftest import CommandResult
from tests.pipeline.test_dry_run import FIRST, SECOND
from tests.request.official_configs import OFFICIAL_CONFIGS

Run = Callable[..., CommandResult]
DEMO = """\
model            demo
text encoder     beside the model
prompt           a red circle
negative prompt  blue
size             100x70, sampled at 128x96
frames           20, sampled as 25
fps              24
seed             7
decoding         at timestep 0.05, noise 0.025

pass 1: 128x96, 25 frames at 24 per second; 4x3x4 latents, 48 tokens; STG by attention_skip; CFG*
step  sigma    guidance  stg  rescale  blocks
1     1        1         0    1        -
2     0.975    5         1    0.7      1,2
3     0.71875  5         1    0.7      1,2

7 model evaluations.
"""


@pytest.fixture(autouse=True)
def nothing_on_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty working directory, and no model on disk but the demo."""

    find_on_disk = locate.find_release_on_disk

    def find_bundled(release: Release) -> Path | None:
        return find_on_disk(release) if release.repo is None else None

    monkeypatch.setattr(locate, "find_release_on_disk", find_bundled)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def media() -> None:
    """photo.png, dot.png of a single pixel, and clip.mp4 of 30 frames."""
    Image.new("RGB", (64, 64)).save("photo.png")
    Image.new("RGB", (1, 1)).save("dot.png")
    with VideoWriter("clip.mp4", Size(64, 64), 24) as writer:
        writer.write(np.zeros((30, 64, 64, 3), np.uint8))


def step_tables(text: str) -> Iterator[list[list[str]]]:
    """Yields the rows of each pass: step, sigma, guidance, stg, rescale, blocks."""
    for block in text.split("\n\n"):
        if block.startswith("pass "):
            yield [line.split() for line in block.splitlines()[2:]]


def test_dry_run_of_the_demo_prints_this_text(kadr: Run) -> None:
    flags = "--steps 3 --size 100x70 --frames 20 --fps 24 --seed 7 --negative-prompt blue --cfg-star --single-pass"
    guidance = "--guidance 1,5 --stg 0,1 --rescale 1,.7 --skip-blocks /1,2 --guidance-sigmas 1,0.5"
    guidance += " --stg-mode attention_skip"
    assert kadr("generate", "a red circle", *flags.split(), *guidance.split(), "--dry-run") == (0, DEMO, "")
    assert os.listdir() == []


@pytest.mark.parametrize("args", [["--model", "ltxv-13b-0.9.8-dev"], ["--config", "config.yaml"]])
def test_steps_of_13b_dev_are_the_official_ones(kadr: Run, args: list[str]) -> None:
    Path("config.yaml").write_text(OFFICIAL_CONFIGS["ltxv-13b-0.9.8-dev"], "utf-8")
    result = kadr("generate", "x", *args, "--dry-run")
    assert (result.code, result.err) == (0, "")
    for rows, table in zip(step_tables(result.out), (FIRST, SECOND), strict=True):
        expected = [(f"{sigma:g}", values) for *values, sigmas in table for sigma in sigmas]
        assert [int(row[0]) for row in rows] == list(range(1, len(expected) + 1))
        for row, (sigma, (scale, stg, rescale, blocks)) in zip(rows, expected, strict=True):
            numbers = [sigma, f"{scale:g}", f"{stg:g}", f"{rescale:g}"]
            assert row[1:] == [*numbers, ",".join(map(str, blocks)) or "-"]
    assert "ltxv-13b-0.9.8-dev, not on disk: 28.6 GB to fetch" in result.out
    assert result.out.endswith("\n\n88 model evaluations.\n")


@pytest.mark.parametrize("name", OFFICIAL_CONFIGS)
def test_every_official_config_has_a_dry_run(kadr: Run, name: str) -> None:
    Path("config.yaml").write_text(OFFICIAL_CONFIGS[name], "utf-8")
    result = kadr("generate", "x", "--pipeline_config", "config.yaml", "--dry-run", "--json")
    assert (result.code, result.err) == (0, "")
    report = json.loads(result.out)
    assert [component["name"] for component in report["components"] if component["role"] == "model"] == [name]
    assert len(report["passes"]) == (2 if "second_pass" in OFFICIAL_CONFIGS[name] else 1)


def test_loras_are_listed_and_those_on_disk_are_checked(kadr: Run, tmp_path: Path) -> None:
    lora = tmp_path / "style.safetensors"
    lora_files.write_lora_file(lora, lora_files.block_pairs(("attn1.to_q",), num_layers=1, width=4096))
    model, absent_lora = "ltxv-13b-0.9.7-dev", "ltxv-13b-0.9.7-ic-lora-pose"
    result = kadr(
        "generate", "a", "--model", model, "--lora", lora, "0.5", "--lora", absent_lora, "1", "0", "--dry-run"
    )
    assert result.code == 0, result.err
    lora_lines = [" ".join(line.split()) for line in result.out.splitlines() if line.startswith("LoRA")]
    absent = "LoRA ltxv-13b-0.9.7-ic-lora-pose, not on disk: 151 MB to fetch, strength 1, 0 in a second pass"
    assert lora_lines == [f"LoRA {lora}, strength 0.5", absent]
    for other in (lora, absent_lora):
        result = kadr("generate", "a", "--model", "demo", "--lora", other, "--dry-run")
        assert (result.code, "does not fit" in result.err) == (1, True)


def test_json_holds_request_and_steps(kadr: Run) -> None:
    report = json.loads(kadr("generate", "x", "--model", "ltxv-13b-0.9.8-distilled", "--dry-run", "--json").out)
    keys = {
        "components",
        "size",
        "frames",
        "fps",
        "evaluations",
        "window_count",
        "passes",
        "conditions",
        "controls",
        "request",
    }
    assert set(report) == keys
    assert [len(resolved_pass["steps"]) for resolved_pass in report["passes"]] == [7, 3]
    step = {
        "sigma": pytest.approx(0.9094),
        "cfg_scale": 1,
        "stg_scale": 0,
        "rescale": 1,
        "skip_blocks": [42],
        "evaluations": 1,
        "intermediate": [],
    }
    assert report["passes"][1]["steps"][0] == step
    assert (report["passes"][1]["tone_map"], report["request"]["prompt"]) == (0.6, "x")


@pytest.mark.usefixtures("media")
def test_conditions_are_listed_with_their_frames(kadr: Run) -> None:
    media = "--image photo.png 0 --image photo.png -1 0.5 --video clip.mp4#-25: 32 --size 64x64 --frames 81"
    result = kadr("generate", "x", *media.split(), "--dry-run")
    assert result.code == 0, result.err
    lines = [line.replace(os.getcwd() + os.sep, "") for line in result.out.splitlines()]
    assert [" ".join(line.split()) for line in lines if line.startswith(("image ", "clip ", "images "))] == [
        "image photo.png (frame 0), strength 1",
        "image photo.png (frame 80), strength 0.5",
        "clip clip.mp4 (frames 32 to 56), strength 1",
        "images through H.264 at quality 29, noise 0.15",
    ]
    assert result.err == ""


@pytest.mark.usefixtures("media")
def test_input_video_sets_frames_and_first_sigma(kadr: Run) -> None:
    args = "--input-video clip.mp4 --denoise-strength 0.6 --steps 10 --size 64x64 --dry-run --json"
    report = json.loads(kadr("generate", "x", *args.split()).out)
    assert report["frames"] == {"requested": 30, "sampled": 33}
    sigmas = [step["sigma"] for step in report["passes"][0]["steps"]]
    assert max(sigmas) <= 0.6


def test_seconds_become_frames_at_the_models_frame_rate(kadr: Run) -> None:
    for fps, frames in (([], 60), (["--fps", "10"], 20)):
        args = ["--model", "ltxv-2b-0.9.5", "--seconds", "2", *fps, "--dry-run", "--json"]
        assert json.loads(kadr("generate", "x", *args).out)["frames"]["requested"] == frames


def test_single_pass_lists_no_upscaler(kadr: Run) -> None:
    Path("config.yaml").write_text(OFFICIAL_CONFIGS["ltxv-13b-0.9.8-distilled"], "utf-8")
    result = kadr("generate", "x", "--config", "config.yaml", "--single-pass", "--dry-run")
    assert result.code == 0, result.err
    assert "upscaler" not in result.out
    assert [len(rows) for rows in step_tables(result.out)] == [8]


@pytest.mark.parametrize(
    "args, message",
    [
        ("--model ltxv-13b", "Did you mean"),
        ("--model gone.safetensors", "gone.safetensors"),
        ("--model ltxv-2b-0.9.5 --second-sigmas 0.9", "--upscaler"),
        ("--model ltxv-2b-0.9.8-distilled --steps 9", "distilled"),
        ("--model ltxv-13b-0.9.8-dev --guidance 1,2 --guidance-sigmas 1,0.9", "7 values for 2 sigmas"),
        ("--video clip.mp4 4 --size 64x64 --frames 49", "multiple of 8"),
        ("--image dot.png --size 64x64 --frames 9", "dot.png is 1x1 pixels"),
    ],
)
@pytest.mark.usefixtures("media")
def test_impossible_request_ends_with_1_and_is_explained(kadr: Run, args: str, message: str) -> None:
    result = kadr("generate", "x", *args.split(), "--dry-run")
    assert (result.code, result.out) == (1, "")
    assert result.err.splitlines()[-1].startswith("error: ")
    assert message in result.err


def test_no_weight_is_read(kadr: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("weights are loaded")

    for name in ("load_transformer", "load_vae", "load_upscaler"):
        monkeypatch.setattr(f"kadr.checkpoints.checkpoint.{name}", refuse)
    monkeypatch.setattr("kadr.checkpoints.hub.fetch", refuse)
    assert kadr("generate", "x", "--dry-run").code == 0
