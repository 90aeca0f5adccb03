"""Long videos on the command line: flags, several prompts, and a run that is killed and gone on with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kadr.errors import RequestError
from kadr.media.clip import read_video
from kadr.pipeline.longvideo.window_folder import finished_windows
from kadr.request.windows import Windows
from tests.cli.conftest import CommandResult, FakeEngine

Run = Callable[..., CommandResult]
PROMPT = "a red circle"


@pytest.mark.parametrize(
    ("flags", "windows"),
    [
        ("--window 9", Windows(frames=9)),
        ("--window 10", Windows(frames=17)),
        ("--overlap 8", Windows(overlap=8)),
        ("--overlap-strength .75", Windows(overlap_strength=0.75)),
        ("--adain 0", Windows(adain=0.0)),
        ("--anchor-strength 0", Windows(anchor_strength=0.0)),
        ("--window 121 --overlap 32 --adain 1", Windows(frames=121, overlap=32, adain=1.0)),
    ],
)
def test_any_flag_of_windows_makes_them(kadr: Run, engine: FakeEngine, flags: str, windows: Windows) -> None:
    ended = kadr("generate", PROMPT, *flags.split())
    assert ended.code == 0, ended.err
    assert engine.requests[0].windows == windows


def test_several_prompts_make_windows_and_a_single_one_with_a_bar_does_not(kadr: Run, engine: FakeEngine) -> None:
    assert kadr("generate", "--prompt", "one", "--seed", "3", "--prompt=two", "--prompt", "three").code == 0
    assert kadr("generate", "one | two").code == 0
    assert kadr("generate", "one | two", "--window", "9").code == 0
    assert kadr("generate", "--prompt", "one").code == 0
    assert [request.prompts for request in engine.requests] == [
        ("one", "two", "three"),
        ("one | two",),
        ("one", "two"),
        ("one",),
    ]
    assert [request.windows is not None for request in engine.requests] == [True, False, True, False]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("one", "--prompt", "two"), "unexpected extra argument"),
        (("--prompt", "two", "--", "one"), "a prompt is given as 'one' too"),
        (("--prompt", "two", "--prompt"), "a value must follow"),
        (("--", "one", "two"), "unexpected extra argument"),
    ],
)
def test_a_prompt_given_in_two_ways_is_bad_usage(
    kadr: Run, engine: FakeEngine, words: tuple[str, ...], said: str
) -> None:
    ended = kadr("generate", *words)
    assert ended.code == 2
    assert said in " ".join(ended.err.replace("│", " ").split())
    assert engine.requests == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((PROMPT, "--overlap", "12"), "must be a multiple of 8"),
        ((PROMPT, "--window", "25", "--overlap", "32"), "no window would add a frame"),
        ((PROMPT, "--adain", "2"), "adain of windows is 2.0"),
        (("--prompt", "one", "--prompt", " "), "prompt 2 of 2 is empty"),
        ((PROMPT, "--frames", "5000"), "Use windows: --window"),
    ],
)
def test_what_windows_cannot_be_is_an_error_that_says_what_they_can(
    kadr: Run, engine: FakeEngine, words: tuple[str, ...], said: str
) -> None:
    ended = kadr("generate", *words)
    assert ended.code == 1
    assert said in ended.err


@pytest.mark.parametrize("verb", ["generate", "plan"])
@pytest.mark.parametrize("flag", ["--upscaler", "--second-model"])
def test_what_is_for_a_second_pass_is_refused_beside_windows(
    kadr: Run, engine: FakeEngine, verb: str, flag: str
) -> None:
    ended = kadr(verb, PROMPT, "--window", "9", flag, "demo-upscaler")
    assert ended.code == 2
    assert "for a second pass, and windows are made in one" in " ".join(ended.err.replace("│", " ").split())
    assert engine.open_calls == []


def test_minutes_are_allowed_in_windows(kadr: Run, engine: FakeEngine) -> None:
    assert kadr("generate", PROMPT, "--seconds", "600", "--fps", "30", "--window", "121").code == 0
    assert engine.requests[0].frames == 18000


def test_resume_reaches_the_engine(kadr: Run, engine: FakeEngine) -> None:
    assert kadr("generate", PROMPT, "--window", "9", "--resume").code == 0
    assert kadr("generate", PROMPT).code == 0
    assert engine.resume_flags == [True, False]


def begun(tmp_path: Path, name: str) -> None:
    """A folder with a finished window."""
    (tmp_path / name).mkdir()
    (tmp_path / name / "window-0001.safetensors").touch()


def test_a_video_that_is_not_finished_keeps_its_name_and_is_found_again(
    kadr: Run, engine: FakeEngine, tmp_path: Path
) -> None:
    begun(tmp_path, "out.windows")
    begun(tmp_path, "outdoor.windows")
    (tmp_path / "out-2.windows").mkdir()  # of a run that ended before it had a window
    assert kadr("generate", PROMPT).out == "out-2.mp4\n"
    assert kadr("generate", PROMPT, "--window", "9", "--resume").out == "out.mp4\n"
    begun(tmp_path, "out-3.windows")
    ended = kadr("generate", PROMPT, "--window", "9", "--resume")
    assert (ended.code, "several videos are unfinished: out-3.mp4, out.mp4." in ended.err) == (1, True)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device"), RequestError("seed")])
def test_what_is_kept_is_told_where_a_run_ends_early(
    kadr: Run, engine: FakeEngine, tmp_path: Path, error: BaseException
) -> None:
    def during() -> None:
        folder = tmp_path / "out.windows"
        folder.mkdir()
        for number in (1, 2):
            (folder / f"window-{number:04}.safetensors").touch()
        raise error

    engine.on_half_written = during
    ended = kadr("generate", PROMPT, "--window", "9", "--frames", "25")
    assert ended.code != 0
    told = "2 finished windows are kept; resume the video with --resume" in ended.err
    assert told is not isinstance(error, RequestError)


def test_dry_run_tells_the_windows(kadr: Run) -> None:
    words = ("--model", "ltxv-2b-0.9.5", "--seconds", "60", "--window", "121", "--size", "704x480", "--json")
    ended = kadr("generate", "--prompt", "one", "--prompt", "two", *words, "--dry-run")
    assert ended.code == 0, ended.err
    told: dict[str, Any] = json.loads(ended.out)
    assert told["window_count"] == 18
    assert told["passes"][0]["frames"] == 121
    assert told["frames"]["requested"] == 1800
    assert told["evaluations"] == 18 * sum(step["evaluations"] for step in told["passes"][0]["steps"])
    plain = kadr("generate", "--prompt", "one", "--prompt", "two", *words[:-1], "--dry-run").out
    assert "one (window 1)" in plain
    assert "two (from window 2 on)" in plain
    assert "18 of up to 121 frames, of which 24 overlap; AdaIN 0.25, strength 1" in plain
    assert "each of 18 windows: 704x480, 121 frames" in plain


def test_plan_tells_the_windows(kadr: Run) -> None:
    ended = kadr("plan", PROMPT, "--window", "25", "--frames", "105")
    assert ended.code == 0, ended.err
    assert "denoise: 6 windows, one after the other" in ended.out


def test_a_run_that_is_killed_in_a_later_window_goes_on_to_the_same_frames(tmp_path: Path, kadr: Run) -> None:
    words = ["--prompt", "a red circle moving right on a black background", "--prompt", "a red circle growing"]
    words += ["--window", "25", "--frames", "73", "--size", "64x64", "--steps", "6", "--device", "cpu"]
    folder, clip, whole = tmp_path / "clip.windows", tmp_path / "clip.mp4", tmp_path / "whole.mp4"
    command = [sys.executable, "-m", "kadr", "generate", *words, "--output", str(clip)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while len(finished_windows(folder)) < 2 and process.poll() is None and time.monotonic() < until:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    count = len(finished_windows(folder))
    assert 2 <= count < 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip.windows"]  # and nothing that looks like a video
    refused = kadr("generate", *words, "--output", clip)
    assert refused.code == 1
    assert f"clip.windows holds {count} finished windows" in refused.err
    resumed = kadr("generate", *words, "--output", clip, "--resume")
    assert resumed.code == 0, resumed.err
    assert "denoising, window 4 of 4: 24 of 24" in resumed.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip.mp4"]
    assert kadr("generate", *words, "--output", whole).code == 0
    own, others = read_video(clip).frames, read_video(whole).frames
    assert len(own) == 73
    assert (own == others).all()


def test_rerun_makes_a_long_video_again(tmp_path: Path, kadr: Run) -> None:
    words = ["--window", "25", "--frames", "41", "--size", "64x64", "--steps", "2", "--device", "cpu"]
    clip, again = tmp_path / "clip.mp4", tmp_path / "again.mp4"
    assert kadr("generate", PROMPT, *words, "--output", clip).code == 0
    assert kadr("rerun", clip, "--output", again).code == 0
    assert (read_video(clip).frames == read_video(again).frames).all()
