"""Headers that were read elsewhere answer for their files, and nothing is opened."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest

from kadr.errors import MediaError
from kadr.media.clip import ClipHeader, probe_upright_size, probe_video
from kadr.media.image import probe_image
from kadr.media.known_headers import KnownHeader, use_known_headers

CLIP = KnownHeader(640, 360, 360, 640, frames=25, fps=Fraction(24))
IMAGE = KnownHeader(64, 96, 64, 96)


def test_known_headers_answer_for_files_that_are_not_there() -> None:
    with use_known_headers({"a.mp4": CLIP, "b.png": IMAGE}):
        assert probe_video("a.mp4") == ClipHeader(25, Fraction(24), 640, 360, False)
        assert probe_upright_size(Path("a.mp4")) == (360, 640)
        assert probe_image("b.png") == (64, 96)
        with pytest.raises(MediaError, match="is an image"):
            probe_video("b.png")


def test_files_that_are_not_known_are_not_opened(tmp_path: Path) -> None:
    path = tmp_path / "other.png"
    path.write_bytes(b"")
    with use_known_headers({}):
        for probe in (probe_image, probe_video, probe_upright_size):
            with pytest.raises(MediaError, match="was not looked at"):
                probe(path)
    with pytest.raises(MediaError, match="not a readable image"):
        probe_image(path)
