"""Suggestions: what fits, for a request that does not, and what takes less than an hour, for one that takes more."""

from __future__ import annotations

import re
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kadr.cli.main import main
from kadr.errors import Cancelled, KadrWarning, PlanError
from kadr.media.writer import VideoWriter
from kadr.pipeline.engine import Engine
from kadr.pipeline.generation import Generation
from kadr.planning import planner, suggest
from kadr.planning.plan import Plan
from kadr.planning.planner import Planner
from kadr.request.inputs import Condition
from kadr.request.request import Request
from kadr.request.windows import Windows
from kadr.shapes import Size

PROMPT = "a red circle moving right on a black background"
LONG = Request(PROMPT, size=(4096, 4096), frames=257)
ONE_HOUR = 3600


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    monkeypatch.setattr(planner, "free_bytes", lambda device: 64 * 10**9)
    monkeypatch.setattr(Generation, "denoise", lambda *args: pytest.fail("it has begun"))
    return Engine.open("demo", device="cpu", prompt_cache=False)


def limit_frames(monkeypatch: pytest.MonkeyPatch, max_frames: int) -> None:
    """Lets no plan fit whose videos or windows have more frames."""
    plan = Planner.plan

    def plan_short(self: Planner) -> Plan:
        windows = [window.resolved_pass.frames for window in self.workload.windows]
        if max(windows, default=self.workload.passes[0].frames) > max_frames:
            raise PlanError("it does not fit.", shortfall=1)
        return plan(self)

    monkeypatch.setattr(Planner, "plan", plan_short)


def test_a_long_video_that_does_not_fit_gets_shorter_windows(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    windows = Windows(frames=121, overlap=8, adain=0.5)
    request = Request(PROMPT, frames=500, windows=windows)
    limit_frames(monkeypatch, 100)
    with pytest.raises(PlanError, match=r"These would fit: windows=97\.") as raised:
        engine.plan(request)
    assert raised.value.smaller == {"windows": replace(windows, frames=97, anchor_strength=0.0)}
    assert engine.plan(replace(request, **raised.value.smaller)).stages


def test_a_video_that_does_not_fit_keeps_its_images(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    plain = Request(PROMPT, size=(256, 256), frames=121)
    shown = replace(plain, conditions=[Condition(str(tmp_path / "a.png"), frame=frame) for frame in (104, -1)])
    limit_frames(monkeypatch, 100)
    with pytest.raises(PlanError, match=r"These would fit: size=256x256 frames=97\.") as raised:
        engine.plan(plain)
    assert raised.value.smaller == {"size": Size(256, 256), "frames": 97}
    with pytest.raises(PlanError, match="Nothing smaller fits") as raised:  # the image would lie outside of it
        engine.plan(shown)
    assert raised.value.smaller == {}


def long_run_warning(engine: Engine, request: Request) -> str | None:
    """Starts a generation and returns what it warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with engine.start(request) as generation:
            assert generation.plan.stages
    texts = [str(warning.message) for warning in caught if issubclass(warning.category, KadrWarning)]
    return next((text for text in texts if "this will take" in text), None)


@pytest.mark.parametrize(
    "request_", [LONG, Request(PROMPT, size=(2048, 2048), frames=2000, windows=Windows(frames=49))]
)
def test_a_long_run_warns_and_its_suggestion_takes_under_an_hour(engine: Engine, request_: Request) -> None:
    assert engine.plan(request_).seconds > ONE_HOUR
    text = long_run_warning(engine, request_)
    assert text is not None
    assert "\n" not in text
    width, height, frames = map(int, re.findall(r"size=(\d+)x(\d+) frames=(\d+) would take", text)[0])
    assert "model=demo-distilled takes fewer steps" in text
    shorter = Request(PROMPT, size=(width, height), frames=frames, windows=request_.windows)
    assert engine.plan(shorter).seconds <= ONE_HOUR
    assert long_run_warning(engine, shorter) is None


def test_only_generations_over_an_hour_warn(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    short = Request(PROMPT, size=(64, 64), frames=9)
    assert suggest.LONG_SECONDS == ONE_HOUR
    assert long_run_warning(engine, short) is None
    monkeypatch.setattr(suggest, "LONG_SECONDS", 0)
    text = long_run_warning(engine, short)
    assert text is not None
    assert text.startswith("this will take about")


def test_an_uncalibrated_machine_says_a_range(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KADR_CACHE", str(tmp_path))
    assert not engine.plan(LONG).is_calibrated
    assert re.match(r"this will take about \d+ (days|h) to \d+ (days|h)\.", long_run_warning(engine, LONG) or "")


def write_long_video(path: Path) -> None:
    record = {"request": LONG.to_json(), "model_name": "demo", "device": "cpu"}
    with VideoWriter(path, Size(64, 64), 24, metadata=record) as writer:
        writer.write(np.zeros((1, 64, 64, 3), np.uint8))


@pytest.mark.parametrize("verb", ["generate", "rerun"])
def test_commands_say_so_in_one_line_before_they_begin(
    verb: str, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def begin(*args: object) -> None:
        raise Cancelled("it begins")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Generation, "denoise", begin)
    write_long_video(tmp_path / "long.mp4")
    args = {
        "generate": ["generate", PROMPT, "--size", "4096x4096", "--frames", "257"],
        "rerun": ["rerun", "long.mp4"],
    }
    with pytest.raises(SystemExit) as exit_info:
        main([*args[verb], "--model", "demo", "--device", "cpu"])
    assert exit_info.value.code == 130
    lines = capfd.readouterr().err.splitlines()
    assert sum("this will take" in line for line in lines) == 1
    begins = next(index for index, line in enumerate(lines) if line.startswith("plan: "))
    assert any(line.startswith("warning: this will take") and "--size" in line for line in lines[:begins])
