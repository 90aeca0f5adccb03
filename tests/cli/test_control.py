"""`--control`: its syntax, refusals, and its lines in --dry-run."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kadr import Control, Request
from kadr.media.writer import VideoWriter
from kadr.shapes import Size
from tests.cli.conftest import CommandResult, FakeEngine

Run = Callable[..., CommandResult]
PROMPT = "a red circle"


@pytest.fixture
def clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """walk.mp4, nine frames; also clips whose names contain a colon or #."""
    monkeypatch.chdir(tmp_path)
    for name in ("walk.mp4", "canny:odd.mp4", "dog:odd.mp4", "walk#1:2.mp4"):
        with VideoWriter(name, Size(64, 64), 24) as writer:
            writer.write(np.zeros((9, 64, 64, 3), np.uint8))
    return "walk.mp4"


@pytest.mark.parametrize(
    ("args", "name", "fields"),
    [
        ("walk.mp4", "walk.mp4", {}),
        ("ready:walk.mp4", "walk.mp4", {}),
        ("canny:walk.mp4", "walk.mp4", {"kind": "canny"}),
        ("depth:walk.mp4#0:9", "walk.mp4", {"kind": "depth", "frame_range": (0, 9)}),
        ("pose:walk.mp4#-5:", "walk.mp4", {"kind": "pose", "frame_range": (-5, None)}),
        ("canny:./canny:odd.mp4", "canny:odd.mp4", {"kind": "canny"}),
        ("dog:odd.mp4", "dog:odd.mp4", {}),
        ("dog:odd.mp4#0:5", "dog:odd.mp4", {"frame_range": (0, 5)}),
        ("canny:odd.mp4", "canny:odd.mp4", {}),  # an existing file of that name
        ("canny:odd.mp4#-3:", "canny:odd.mp4", {"frame_range": (-3, None)}),
        ("canny:walk#1:2.mp4", "walk#1:2.mp4", {"kind": "canny"}),
    ],
)
def test_a_control_may_have_a_kind_and_a_frame_range(
    kadr: Run, engine: FakeEngine, clip: str, args: str, name: str, fields: dict[str, Any]
) -> None:
    assert kadr("generate", PROMPT, "--control", args).code == 0
    assert engine.requests == [Request(prompt=PROMPT, controls=(Control(os.path.abspath(name), **fields),))]


def test_several_controls_go_with_a_condition(kadr: Run, engine: FakeEngine, clip: str) -> None:
    args = ("--control", f"canny:{clip}", "--control", clip, "--video", clip)
    assert kadr("plan", PROMPT, *args, "--frames", "9").code == 0
    (request,) = engine.requests
    assert [control.kind for control in request.controls] == ["canny", "ready"]
    assert len(request.conditions) == 1


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        ("dog:walk.mp4", 2, "'dog' is not a kind of control: give one of canny, depth, pose, ready"),
        ("canny:gone.mp4", 1, "there is no file"),
        ("canny:walk.mp4#3", 2, "'3' is not a range of frames"),
        ("canny:", 2, "'canny:' names no clip"),
        ("", 2, "'' names no clip"),
    ],
)
def test_malformed_control_is_refused(
    kadr: Run, engine: FakeEngine, clip: str, args: str, code: int, message: str
) -> None:
    result = kadr("generate", PROMPT, "--control", args)
    assert result.code == code
    assert message in " ".join(result.err.replace("│", " ").split())
    assert engine.requests == []


def test_missing_clip_that_is_given_twice_is_named_once(kadr: Run, engine: FakeEngine, tmp_path: Path) -> None:
    result = kadr("generate", PROMPT, "--input-video", tmp_path / "gone.mp4", "--control", tmp_path / "gone.mp4")
    assert result.code == 1
    assert result.err.count("gone.mp4") == 1


def test_dry_run_lists_controls(kadr: Run, clip: str) -> None:
    args = ("generate", PROMPT, "--frames", "9", "--control", f"canny:{clip}", "--dry-run")
    result = kadr(*args)
    path = os.path.abspath(clip)
    assert result.code == 0
    assert f"control          canny of {path} (frames 0 to 8)" in result.out.splitlines()
    assert "a control is given, but no LoRA" in result.err
    report = json.loads(kadr(*args, "--json", "--lora", "demo-ic-lora-canny").out)
    assert report["controls"] == [{"media": path, "kind": "canny", "frames": 9}]
    assert report["request"]["controls"] == [{"media": path, "kind": "canny", "frame_range": None}]


def test_dry_run_refuses_a_clip_that_is_too_short(kadr: Run, clip: str) -> None:
    result = kadr("generate", PROMPT, "--frames", "17", "--control", clip, "--dry-run")
    assert (result.code, result.out) == (1, "")
    assert "has 9 frames, but the video has 17: a control must be at least as long. Ask for 9 or fewer." in result.err
