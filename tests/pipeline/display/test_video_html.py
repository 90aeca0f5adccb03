"""Video in a notebook: the mp4 itself, or its first frame and the reason; its repr is one short line."""

from __future__ import annotations

import base64
import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kadr import Request, Size, Video, VideoFile
from kadr.media.clip import read_video
from kadr.pipeline.display import video_html
from tests.html_reader import HtmlReader

HOSTILE = '</div><script>alert("x")</script>\x1b[31m\u202e & ' + 300 * "long "


def make_video(*, prompt: str = "a red circle", height: int = 32, notices: tuple[str, ...] = ()) -> Video:
    frames = np.zeros((9, height, 64, 3), np.uint8)
    frames[..., 0] = 200
    return Video(frames, torch.zeros(128, 2, 1, 2), 24.0, Request(prompt, seed=3), {}, notices)


def write_file(path: Path, video: Video) -> VideoFile:
    video.save(path)
    return VideoFile(path, 9, Size(64, 32), 24.0, 1.0, video.latents, video.request, video.notices)


def decode_source(source: str | None, media_type: str) -> bytes:
    head, _, content = (source or "").partition(",")
    assert head == f"data:{media_type};base64"
    return base64.b64decode(content)


def test_video_is_an_element_that_plays_the_mp4(tmp_path: Path) -> None:
    reader = HtmlReader.read(make_video()._repr_html_())
    shown = reader.find("video")
    (tmp_path / "shown.mp4").write_bytes(decode_source(shown["src"], "video/mp4"))
    assert read_video(tmp_path / "shown.mp4").frames.shape == (9, 32, 64, 3)
    assert (shown["width"], shown["height"], shown["controls"]) == ("64", "32", None)
    assert reader.texts == ["64x32, 9 frames at 24 per second, seed 3, 'a red circle'"]


def test_file_is_shown_as_it_is(tmp_path: Path) -> None:
    file = write_file(tmp_path / "clip.mp4", make_video(notices=("a stage was repeated",)))
    reader = HtmlReader.read(file._repr_html_())
    assert decode_source(reader.find("video")["src"], "video/mp4") == (tmp_path / "clip.mp4").read_bytes()
    assert "a stage was repeated" in reader.texts


@pytest.mark.parametrize("kind", ["memory", "file"])
def test_large_video_is_its_first_frame_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(video_html, "MAX_INLINE_BYTES", 100)
    video = make_video() if kind == "memory" else write_file(tmp_path / "clip.mp4", make_video())
    reader = HtmlReader.read(video._repr_html_())
    image = Image.open(io.BytesIO(decode_source(reader.find("img")["src"], "image/jpeg")))
    assert image.size == (64, 32)
    assert np.abs(np.asarray(image).mean((0, 1)) - (200, 0, 0)).max() < 20
    assert "a notebook gets at most" in reader.texts[0]
    assert ("video.save(" in reader.texts[0]) if kind == "memory" else (str(tmp_path) in reader.texts[0])


def test_video_with_odd_sides_is_its_first_frame_with_the_reason() -> None:
    reader = HtmlReader.read(make_video(height=31)._repr_html_())
    assert reader.find("img")["height"] == "31"
    assert "even sides" in reader.texts[0]


def test_file_that_is_gone_is_a_line(tmp_path: Path) -> None:
    file = write_file(tmp_path / "clip.mp4", make_video())
    file.path.unlink()
    reader = HtmlReader.read(file._repr_html_())
    assert "cannot be shown" in reader.texts[0]
    assert {each.tag for each in reader.elements} == {"div"}


@pytest.mark.parametrize("height", [32, 31])
def test_foreign_prompt_and_notices_are_text(height: int) -> None:
    reader = HtmlReader.read(make_video(prompt=HOSTILE, height=height, notices=(HOSTILE,))._repr_html_())
    assert {each.tag for each in reader.elements} <= {"video", "img", "div"}
    assert any("<script>" in each for each in reader.texts)
    assert all(each.isprintable() for each in reader.texts)


def test_repr_is_one_short_line(tmp_path: Path) -> None:
    video = make_video()
    assert repr(video) == "<Video 64x32, 9 frames at 24 per second, seed 3, 'a red circle'>"
    assert repr(write_file(tmp_path / "clip.mp4", video)).startswith(f"<VideoFile '{tmp_path}/clip.mp4', 64x32, 9 fra")
    one_frame = replace(make_video(prompt=HOSTILE), frames=video.frames[:1])
    assert ", 1 frame at" in repr(one_frame)
    assert len(repr(one_frame)) < 150
    assert repr(one_frame).isprintable()
