"""The table of images' memory covers what it claims, and its figure is drawn from it."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("matplotlib")

from benchmarks.image_memory import COLUMNS, PHOTOGRAPHS, Measured, draw, write_photograph


def test_photographs_reach_from_2_to_169_megapixels() -> None:
    megapixels = [round(width * height / 1e6) for width, height, _ in PHOTOGRAPHS]
    assert {2, 12, 24, 49, 169} == set(megapixels)


def test_row_has_the_ratio_and_the_bytes_of_a_pixel() -> None:
    row = Measured(4000, 3000, "jpg", 500_000_000, 400_000_000, 280_000_000).row()
    assert len(row) == len(COLUMNS)
    assert row == ["4000x3000 JPG", "12", "500 MB", "400 MB", "1.25", "10 bytes"]


def test_a_photograph_and_the_figure_are_written(tmp_path: Path) -> None:
    write_photograph(tmp_path / "photograph.jpg", 80, 60)
    with Image.open(tmp_path / "photograph.jpg") as image:
        assert image.size == (80, 60)
    draw([Measured(80, 60, "jpg", 3, 2, 1), Measured(160, 60, "jpg", 4, 3, 1)], tmp_path / "figure.svg")
    assert (tmp_path / "figure.svg").read_text("utf-8").startswith("<?xml")
