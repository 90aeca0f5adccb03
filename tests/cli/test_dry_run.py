"""`kadr generate --dry-run`: what would be made, step by step, from headers and names alone."""

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
from kadr.pipeline import dry_run
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
    """An empty working directory, and no model but the demo."""

    def on_disk(released: Release) -> Path | None:
        return locate.find_release_on_disk(released) if released.repo is None else None

    monkeypatch.setattr(dry_run, "find_release_on_disk", on_disk)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def media() -> None:
    """photo.png, one of a single pixel, and a clip of 30 frames."""
    Image.new("RGB", (64, 64)).save("photo.png")
    Image.new("RGB", (1, 1)).save("dot.png")
    with VideoWriter("clip.mp4", Size(64, 64), 24) as writer:
        writer.write(np.zeros((30, 64, 64, 3), np.uint8))


def tables(text: str) -> Iterator[list[list[str]]]:
    """Rows of each pass: step, sigma, guidance, stg, rescale, blocks."""
    for block in text.split("\n\n"):
        if block.startswith("pass "):
            yield [line.split() for line in block.splitlines()[2:]]


def test_plan_of_the_demo_reads_so(kadr: Run) -> None:
    flags = "--steps 3 --size 100x70 --frames 20 --fps 24 --seed 7 --negative-prompt blue --cfg-star --single-pass"
    guidance = "--guidance 1,5 --stg 0,1 --rescale 1,.7 --skip-blocks /1,2 --guidance-sigmas 1,0.5"
    guidance += " --stg-mode attention_skip"
    assert kadr("generate", "a red circle", *flags.split(), *guidance.split(), "--dry-run") == (0, DEMO, "")
    assert os.listdir() == []


@pytest.mark.parametrize("words", [["--model", "ltxv-13b-0.9.8-dev"], ["--config", "config.yaml"]])
def test_steps_of_13b_dev_are_the_official_ones(kadr: Run, words: list[str]) -> None:
    Path("config.yaml").write_text(OFFICIAL_CONFIGS["ltxv-13b-0.9.8-dev"], "utf-8")
    ended = kadr("generate", "x", *words, "--dry-run")
    assert (ended.code, ended.err) == (0, "")
    for rows, table in zip(tables(ended.out), (FIRST, SECOND), strict=True):
        expected = [(f"{sigma:g}", values) for *values, sigmas in table for sigma in sigmas]
        assert [int(row[0]) for row in rows] == list(range(1, len(expected) + 1))
        for row, (sigma, (scale, stg, rescale, blocks)) in zip(rows, expected, strict=True):
            numbers = [sigma, f"{scale:g}", f"{stg:g}", f"{rescale:g}"]
            assert row[1:] == [*numbers, ",".join(map(str, blocks)) or "-"]
    assert "ltxv-13b-0.9.8-dev, not on disk: 28.6 G bytes to fetch" in ended.out
    assert ended.out.endswith("\n\n88 model evaluations.\n")


@pytest.mark.parametrize("name", OFFICIAL_CONFIGS)
def test_every_official_config_has_a_plan(kadr: Run, name: str) -> None:
    Path("config.yaml").write_text(OFFICIAL_CONFIGS[name], "utf-8")
    ended = kadr("generate", "x", "--pipeline_config", "config.yaml", "--dry-run", "--json")
    assert (ended.code, ended.err) == (0, "")
    told = json.loads(ended.out)
    assert [part["name"] for part in told["components"] if part["role"] == "model"] == [name]
    assert len(told["passes"]) == (2 if "second_pass" in OFFICIAL_CONFIGS[name] else 1)


def test_loras_are_listed_and_looked_into_where_they_are_here(kadr: Run, tmp_path: Path) -> None:
    lora = tmp_path / "style.safetensors"
    lora_files.write_lora_file(lora, lora_files.block_pairs(("attn1.to_q",), num_layers=1, width=192))
    ended = kadr("generate", "a", "--lora", lora, "0.5", "--lora", "ltxv-13b-0.9.7-ic-lora-pose", "1", "0", "--dry-run")
    assert ended.code == 0, ended.err
    told = [" ".join(line.split()) for line in ended.out.splitlines() if line.startswith("LoRA")]
    absent = "LoRA ltxv-13b-0.9.7-ic-lora-pose, not on disk: 151 M bytes to fetch, strength 1, 0 in a second pass"
    assert told == [f"LoRA {lora}, strength 0.5", absent]
    lora_files.write_lora_file(lora, lora_files.block_pairs(("attn1.to_q",), num_layers=1, width=2048))
    ended = kadr("generate", "a", "--lora", lora, "--dry-run")
    assert (ended.code, "does not fit" in ended.err) == (1, True)


def test_plan_in_json_holds_request_and_steps(kadr: Run) -> None:
    told = json.loads(kadr("generate", "x", "--model", "ltxv-13b-0.9.8-distilled", "--dry-run", "--json").out)
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
    assert set(told) == keys
    assert [len(one["steps"]) for one in told["passes"]] == [7, 3]
    step = {
        "sigma": pytest.approx(0.9094),
        "cfg_scale": 1,
        "stg_scale": 0,
        "rescale": 1,
        "skip_blocks": [42],
        "evaluations": 1,
    }
    assert told["passes"][1]["steps"][0] == step
    assert (told["passes"][1]["tone_map"], told["request"]["prompt"]) == (0.6, "x")


@pytest.mark.usefixtures("media")
def test_conditions_are_shown_where_they_will_stand(kadr: Run) -> None:
    media = "--image photo.png 0 --image photo.png -1 0.5 --video clip.mp4#-25: 32 --size 64x64 --frames 81"
    ended = kadr("generate", "x", *media.split(), "--dry-run")
    assert ended.code == 0, ended.err
    shown = [line.replace(os.getcwd() + os.sep, "") for line in ended.out.splitlines()]
    assert [" ".join(line.split()) for line in shown if line.startswith(("image ", "clip ", "images "))] == [
        "image photo.png (frame 0), strength 1",
        "image photo.png (frame 80), strength 0.5",
        "clip clip.mp4 (frames 32 to 56), strength 1",
        "images through H.264 at quality 29, noise 0.15",
    ]
    assert ended.err == ""


@pytest.mark.usefixtures("media")
def test_an_input_video_gives_its_length_and_the_first_sigma(kadr: Run) -> None:
    words = "--input-video clip.mp4 --denoise-strength 0.6 --steps 10 --size 64x64 --dry-run --json"
    told = json.loads(kadr("generate", "x", *words.split()).out)
    assert told["frames"] == {"requested": 30, "sampled": 33}
    sigmas = [step["sigma"] for step in told["passes"][0]["steps"]]
    assert max(sigmas) <= 0.6


def test_seconds_are_frames_at_the_rate_of_the_model(kadr: Run) -> None:
    for fps, frames in (([], 60), (["--fps", "10"], 20)):
        words = ["--model", "ltxv-2b-0.9.5", "--seconds", "2", *fps, "--dry-run", "--json"]
        assert json.loads(kadr("generate", "x", *words).out)["frames"]["requested"] == frames


def test_only_what_a_single_pass_needs_is_listed(kadr: Run) -> None:
    Path("config.yaml").write_text(OFFICIAL_CONFIGS["ltxv-13b-0.9.8-distilled"], "utf-8")
    ended = kadr("generate", "x", "--config", "config.yaml", "--single-pass", "--dry-run")
    assert ended.code == 0, ended.err
    assert "upscaler" not in ended.out
    assert [len(rows) for rows in tables(ended.out)] == [8]


@pytest.mark.parametrize(
    "words, named",
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
def test_what_cannot_work_ends_with_1_and_is_explained(kadr: Run, words: str, named: str) -> None:
    ended = kadr("generate", "x", *words.split(), "--dry-run")
    assert (ended.code, ended.out) == (1, "")
    assert ended.err.splitlines()[-1].startswith("error: ")
    assert named in ended.err


def test_no_weight_is_read(kadr: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were asked for")

    for name in ("load_transformer", "load_vae", "load_upscaler"):
        monkeypatch.setattr(f"kadr.checkpoints.checkpoint.{name}", refuse)
    monkeypatch.setattr("kadr.checkpoints.hub.fetch", refuse)
    assert kadr("generate", "x", "--dry-run").code == 0
