"""`kadr generate` and `kadr rerun` write every format, and a video to stdout."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import pytest

from kadr.errors import RequestError
from kadr.media.clip import read_metadata
from kadr.pipeline.writing import find_sound
from kadr.request.inputs import Condition
from kadr.request.request import Request
from tests.cli.conftest import CommandResult
from tests.media.test_formats import write_clip_with_sound

Kadr = Callable[..., CommandResult]
COMMAND = ("a red circle moving right", "--model", "demo", "--size", "64x64", "--frames", "9", "--steps", "1")


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", ["out.webm", "out.gif", "out.webp", "out-%02d.png"])
def test_a_video_of_every_format_can_be_made_again(kadr: Kadr, name: str) -> None:
    assert kadr("generate", *COMMAND, "--output", name).out == f"{name}\n"
    first = Path(name.replace("%02d", "01"))
    again = kadr("rerun", first)
    assert (again.code, again.err.count("warning")) == (0, 0)
    if "%" in name:  # numbered images are made again as a video
        assert again.out == "out-01.mp4\n"
    else:
        assert again.out == f"out-2{first.suffix}\n"
        assert Path(again.out.strip()).read_bytes() == first.read_bytes()


def test_without_metadata_a_video_cannot_be_made_again(kadr: Kadr) -> None:
    assert (
        kadr("generate", *COMMAND, "--output", "out.mp4", "--no-metadata", "--codec", "hevc", "--crf", "30").code == 0
    )
    result = kadr("rerun", "out.mp4")
    assert (result.code, "made with --no-metadata" in result.err) == (1, True)


def test_paths_beside_a_video_move_with_it(kadr: Kadr, tmp_path: Path) -> None:
    made, elsewhere = tmp_path / "made", tmp_path / "elsewhere"
    (made / "inputs").mkdir(parents=True)
    elsewhere.mkdir()
    assert kadr("generate", *COMMAND[:-4], "--frames", "1", "--output", made / "inputs" / "still.png").code == 0
    (elsewhere / "other.png").write_bytes((made / "inputs" / "still.png").read_bytes())
    images = "--image", "made/inputs/still.png", "--image", str(elsewhere / "other.png"), "8"
    assert kadr("generate", *COMMAND, *images, "--output", made / "out.mp4").code == 0
    assert b'"media": "./inputs/still.png"' in (made / "out.mp4").read_bytes().replace(b"\\", b"")
    made.rename(tmp_path / "moved")
    stored = [item["media"] for item in read_metadata(tmp_path / "moved" / "out.mp4")["request"]["conditions"]]
    assert stored == [str(tmp_path / "moved" / "inputs" / "still.png"), str(elsewhere / "other.png")]
    assert kadr("rerun", "moved/out.mp4").code == 0


def test_a_video_goes_to_stdout_and_nothing_else_does(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "kadr", "generate", *COMMAND, "--output", "-"]
    result = subprocess.run(command, capture_output=True, check=True)
    (tmp_path / "piped.mp4").write_bytes(result.stdout)
    with av.open(str(tmp_path / "piped.mp4")) as container:
        assert len(list(container.decode(video=0))) == 9
    assert [path.name for path in tmp_path.iterdir()] == ["piped.mp4"]


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ("--variations 2", "stdout takes one video, and this command makes 2"),
        ("--json", "--json would print to it as well"),
        ("--resume", "windows are kept beside a file"),
    ],
)
def test_what_stdout_cannot_take_is_refused(kadr: Kadr, flags: str, reason: str) -> None:
    result = kadr("generate", *COMMAND, "--output", "-", *flags.split())
    assert (result.code, result.out) == (2, "")
    assert reason in " ".join(result.err.split())


def test_a_terminal_is_sent_no_video(kadr: Kadr, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    result = kadr("generate", *COMMAND, "--output", "-")
    assert (result.code, "stdout is a terminal" in " ".join(result.err.split())) == (2, True)


def test_the_sound_of_the_input_video_or_of_the_only_clip_is_kept(kadr: Kadr, tmp_path: Path) -> None:
    clip = write_clip_with_sound(tmp_path / "clip.mp4", 2.0)
    sounds = "--input-video", clip, "--steps", "4", "--denoise-strength", "0.9", "--keep-audio"
    assert kadr("generate", *COMMAND[:-2], *sounds, "--output", "out.mp4").code == 0
    with av.open("out.mp4") as container:
        audio = container.streams.audio[0]
        assert float(audio.duration * audio.time_base) == pytest.approx(9 / 24, abs=0.03)
    conditions = (Condition(str(clip), frame=8, frame_range=(24, 41)),)
    sound = find_sound(Request(prompt="x", conditions=conditions), 49, 24.0)
    assert (sound.start, sound.delay, sound.duration) == (1, Fraction(8, 24), Fraction(49, 24))
    last = (Condition(str(clip), frame=-1, frame_range=(0, 17)),)  # ends with the video: begins at frame 32
    assert find_sound(Request(prompt="x", conditions=last), 49, 24.0).delay == Fraction(32, 24)


def test_sound_that_does_not_fit_is_refused_before_anything_is_made(kadr: Kadr, tmp_path: Path) -> None:
    clip = str(write_clip_with_sound(tmp_path / "clip.mp4", 1.0))
    assert kadr("generate", *COMMAND, "--output", "silent.mp4").code == 0
    for conditions, reason in [
        ((), "there are 0 such clips"),
        ((Condition(clip), Condition(clip, frame=16)), "there are 2 such clips"),
        ((Condition("silent.mp4"),), "silent.mp4 has no sound to keep"),
    ]:
        with pytest.raises(RequestError, match=reason):
            find_sound(Request(prompt="x", conditions=conditions), 25, 24.0)
    with pytest.raises(RequestError, match=r"plays at 24 frames per second and the video at 30.*Make the video at 24"):
        find_sound(Request(prompt="x", input_video=clip), 25, 30.0)
    assert find_sound(Request(prompt="x", input_video=clip), 25, 23.976).duration == 25 / Fraction(24000, 1001)
