"""Long videos on the command line: flags, several prompts, and a killed process that is resumed."""

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
def test_any_window_flag_enables_windows(kadr: Run, engine: FakeEngine, flags: str, windows: Windows) -> None:
    result = kadr("generate", PROMPT, *flags.split())
    assert result.code == 0, result.err
    assert engine.requests[0].windows == windows


def test_several_prompts_enable_windows_and_a_bar_alone_does_not(kadr: Run, engine: FakeEngine) -> None:
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
    ("args", "message"),
    [
        (("one", "--prompt", "two"), "unexpected extra argument"),
        (("--prompt", "two", "--", "one"), "a prompt is given as 'one' too"),
        (("--prompt", "two", "--prompt"), "a value must follow"),
        (("--", "one", "two"), "unexpected extra argument"),
    ],
)
def test_prompt_as_argument_and_flag_is_bad_usage(
    kadr: Run, engine: FakeEngine, args: tuple[str, ...], message: str
) -> None:
    result = kadr("generate", *args)
    assert result.code == 2
    assert message in " ".join(result.err.replace("│", " ").split())
    assert engine.requests == []


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((PROMPT, "--overlap", "12"), "must be a multiple of 8"),
        ((PROMPT, "--window", "25", "--overlap", "32"), "no window would add a frame"),
        ((PROMPT, "--adain", "2"), "adain of windows is 2.0"),
        (("--prompt", "one", "--prompt", " "), "prompt 2 of 2 is empty"),
        ((PROMPT, "--frames", "5000"), "Use windows: --window"),
    ],
)
def test_bad_window_settings_are_an_error_with_the_limit(
    kadr: Run, engine: FakeEngine, args: tuple[str, ...], message: str
) -> None:
    result = kadr("generate", *args)
    assert result.code == 1
    assert message in result.err


@pytest.mark.parametrize("verb", ["generate", "plan"])
@pytest.mark.parametrize("flag", ["--upscaler", "--second-model"])
def test_second_pass_flags_are_refused_with_windows(kadr: Run, engine: FakeEngine, verb: str, flag: str) -> None:
    result = kadr(verb, PROMPT, "--window", "9", flag, "demo-upscaler")
    assert result.code == 2
    assert "for a second pass, and windows are made in one" in " ".join(result.err.replace("│", " ").split())
    assert engine.open_calls == []


def test_minutes_are_allowed_in_windows(kadr: Run, engine: FakeEngine) -> None:
    assert kadr("generate", PROMPT, "--seconds", "600", "--fps", "30", "--window", "121").code == 0
    assert engine.requests[0].frames == 18000


def test_resume_reaches_the_engine(kadr: Run, engine: FakeEngine) -> None:
    assert kadr("generate", PROMPT, "--window", "9", "--resume").code == 0
    assert kadr("generate", PROMPT).code == 0
    assert engine.resume_flags == [True, False]


def write_finished_window(tmp_path: Path, name: str) -> None:
    """Makes a folder with a finished window."""
    (tmp_path / name).mkdir()
    (tmp_path / name / "window-0001.safetensors").touch()


def test_unfinished_video_keeps_its_name_and_is_found_by_resume(kadr: Run, engine: FakeEngine, tmp_path: Path) -> None:
    write_finished_window(tmp_path, "out.windows")
    write_finished_window(tmp_path, "outdoor.windows")
    (tmp_path / "out-2.windows").mkdir()  # of a video that has no finished window yet
    assert kadr("generate", PROMPT).out == "out-2.mp4\n"
    assert kadr("generate", PROMPT, "--window", "9", "--resume").out == "out.mp4\n"
    write_finished_window(tmp_path, "out-3.windows")
    result = kadr("generate", PROMPT, "--window", "9", "--resume")
    assert (result.code, "several videos are unfinished: out-3.mp4, out.mp4." in result.err) == (1, True)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device"), RequestError("seed")])
def test_interruption_reports_the_finished_windows(
    kadr: Run, engine: FakeEngine, tmp_path: Path, error: BaseException
) -> None:
    def interrupt() -> None:
        folder = tmp_path / "out.windows"
        folder.mkdir()
        for number in (1, 2):
            (folder / f"window-{number:04}.safetensors").touch()
        raise error

    engine.on_half_written = interrupt
    result = kadr("generate", PROMPT, "--window", "9", "--frames", "25")
    assert result.code != 0
    is_reported = "2 finished windows are kept; resume the video with --resume" in result.err
    assert is_reported is not isinstance(error, RequestError)


def test_longest_file_name_is_refused_only_where_windows_need_a_longer_one(
    kadr: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = "x" * 251 + ".mp4"  # 255 bytes, and the folder x...x.windows would have 259
    tiny = ["--size", "32x32", "--steps", "1", "--output", name]
    result = kadr("generate", PROMPT, "--frames", "33", "--window", "17", *tiny)
    assert (result.code, result.out, os.listdir(tmp_path)) == (1, "", [])
    assert ".windows'; a file name has at most 255 bytes" in result.err
    result = kadr("generate", PROMPT, "--frames", "1", *tiny)
    assert (result.code, result.out) == (0, f"{name}\n"), result.err
    assert os.listdir(tmp_path) == [name]


@pytest.mark.skipif(sys.platform != "linux", reason="others allow only names that are UTF-8")
def test_long_video_with_a_name_that_is_no_utf8_is_written(
    kadr: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = os.fsdecode(b"\xff.mp4")
    flags = ["--size", "32x32", "--frames", "25", "--steps", "1", "--window", "17", "--overlap", "8"]
    assert kadr("generate", PROMPT, *flags, "--output", name).code == 0
    assert os.listdir(tmp_path) == [name]


def test_dry_run_lists_windows(kadr: Run) -> None:
    args = ("--model", "ltxv-2b-0.9.5", "--seconds", "60", "--window", "121", "--size", "704x480", "--json")
    result = kadr("generate", "--prompt", "one", "--prompt", "two", *args, "--dry-run")
    assert result.code == 0, result.err
    report: dict[str, Any] = json.loads(result.out)
    assert report["window_count"] == 18
    assert report["passes"][0]["frames"] == 121
    assert report["frames"]["requested"] == 1800
    assert report["evaluations"] == 18 * sum(step["evaluations"] for step in report["passes"][0]["steps"])
    text = kadr("generate", "--prompt", "one", "--prompt", "two", *args[:-1], "--dry-run").out
    assert "one (window 1)" in text
    assert "two (from window 2 on)" in text
    assert "18 of up to 121 frames, of which 24 overlap; AdaIN 0.25, strength 1" in text
    assert "each of 18 windows: 704x480, 121 frames" in text


def test_plan_counts_windows(kadr: Run) -> None:
    result = kadr("plan", PROMPT, "--window", "25", "--frames", "105")
    assert result.code == 0, result.err
    assert "denoise: 6 windows, one after the other" in result.out


def test_killed_video_resumes_to_the_same_frames(tmp_path: Path, kadr: Run) -> None:
    args = ["--prompt", "a red circle moving right on a black background", "--prompt", "a red circle growing"]
    args += ["--window", "25", "--frames", "73", "--size", "64x64", "--steps", "6", "--device", "cpu"]
    folder, clip, uninterrupted = tmp_path / "clip.windows", tmp_path / "clip.mp4", tmp_path / "uninterrupted.mp4"
    command = [sys.executable, "-m", "kadr", "generate", *args, "--output", str(clip)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(finished_windows(folder)) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    count = len(finished_windows(folder))
    assert 2 <= count < 4
    *locks, windows = sorted(path.name for path in tmp_path.iterdir())
    assert windows == "clip.windows"  # and no file that looks like a video
    assert [name.endswith(".lock") for name in locks] == [True]  # nobody could remove it; the next command does
    refused = kadr("generate", *args, "--output", clip)
    assert refused.code == 1
    assert f"clip.windows holds {count} finished windows" in refused.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip.windows"]
    resumed = kadr("generate", *args, "--output", clip, "--resume")
    assert resumed.code == 0, resumed.err
    assert "denoising, window 4 of 4: 24 of 24" in resumed.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip.mp4"]
    assert kadr("generate", *args, "--output", uninterrupted).code == 0
    resumed_frames, expected_frames = read_video(clip).frames, read_video(uninterrupted).frames
    assert len(resumed_frames) == 73
    assert (resumed_frames == expected_frames).all()


def test_rerun_makes_a_long_video_again(tmp_path: Path, kadr: Run) -> None:
    args = ["--window", "25", "--frames", "41", "--size", "64x64", "--steps", "2", "--device", "cpu"]
    clip, again = tmp_path / "clip.mp4", tmp_path / "again.mp4"
    assert kadr("generate", PROMPT, *args, "--output", clip).code == 0
    assert kadr("rerun", clip, "--output", again).code == 0
    assert (read_video(clip).frames == read_video(again).frames).all()
