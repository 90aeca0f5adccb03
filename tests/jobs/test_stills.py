"""Stills of a video: its first frame, and a sheet of frames across its length."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kadr.errors import MediaError
from kadr.jobs.stills import write_stills
from kadr.media.writer import VideoWriter
from kadr.shapes import Size


def write_ramp(path: Path, num_frames: int, size: Size) -> None:
    """Writes a video that goes from black to white."""
    with VideoWriter(path, size, 24) as writer:
        for index in range(num_frames):
            gray = round(255 * index / max(num_frames - 1, 1))
            writer.write(np.full((1, size.height, size.width, 3), gray, np.uint8))


@pytest.mark.parametrize(
    ("num_frames", "count", "sheet"),
    [(1, 1, (160, 80)), (4, 4, (640, 80)), (9, 9, (800, 160)), (49, 25, (800, 400))],
)
def test_sheet_has_frames_from_the_first_to_the_last(
    tmp_path: Path, num_frames: int, count: int, sheet: tuple[int, int]
) -> None:
    video, thumbnail, spritesheet = (tmp_path / name for name in ("video.mp4", "thumbnail.jpg", "spritesheet.jpg"))
    write_ramp(video, num_frames, Size(320, 160))
    write_stills(video, thumbnail, spritesheet)
    with Image.open(thumbnail) as image:
        assert (image.format, image.size) == ("JPEG", (320, 160))
        assert np.asarray(image).mean() < 8
    with Image.open(spritesheet) as image:
        assert (image.format, image.size) == ("JPEG", sheet)
        pixels = np.asarray(image.convert("L")).astype(float)
    levels = pixels[40::80, 80::160].reshape(-1)[:count]
    expected = np.linspace(0, 255, count) if count > 1 else np.zeros(1)
    assert np.abs(levels - expected).max() < 10


def test_large_frames_are_reduced(tmp_path: Path) -> None:
    write_ramp(tmp_path / "video.mp4", 2, Size(640, 1280))
    write_stills(tmp_path / "video.mp4", tmp_path / "thumbnail.jpg", tmp_path / "spritesheet.jpg")
    with Image.open(tmp_path / "thumbnail.jpg") as image:
        assert image.size == (256, 512)


def test_file_that_is_no_video_is_refused(tmp_path: Path) -> None:
    (tmp_path / "video.mp4").write_bytes(b"no video")
    with pytest.raises(MediaError):
        write_stills(tmp_path / "video.mp4", tmp_path / "a.jpg", tmp_path / "b.jpg")
    assert not (tmp_path / "a.jpg").exists()
