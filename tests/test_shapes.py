"""Sizes and frame counts, against the rounding of the official script."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kadr.errors import RequestError
from kadr.shapes import MAX_FRAMES, MAX_SIDE, LatentGrid, Size, snap_frames

SIDES = [*range(1, 130), 480, 481, 703, 704, 705, 1216, 8191, 8192]


@pytest.fixture(scope="module")
def calculate_padding() -> Callable[..., tuple[int, int, int, int]]:
    """Returns the official function without importing inference.py, which needs imageio and torchvision."""
    spec = importlib.util.find_spec("ltx_video")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the official package is not installed")
    source = (Path(spec.submodule_search_locations[0]) / "inference.py").read_text()
    function = next(
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef) and node.name == "calculate_padding"
    )
    scope: dict[str, Any] = {}
    exec(compile(ast.Module([function], type_ignores=[]), "inference.py", "exec"), scope)
    return scope["calculate_padding"]


def test_sides_snap_to_multiples_of_32_as_in_the_official_script() -> None:
    for side in SIDES:
        assert Size(side, 64).snap() == Size(((side - 1) // 32 + 1) * 32, 64)
        assert Size(64, side).snap() == Size(64, ((side - 1) // 32 + 1) * 32)


def test_snapping_twice_changes_nothing() -> None:
    for side in SIDES:
        snapped = Size(side, side).snap()
        assert snapped.snap() == snapped
        assert snapped.padding() == (0, 0, 0, 0)


def test_padding_equals_the_official_calculate_padding(calculate_padding: Callable[..., Any]) -> None:
    for width in SIDES:
        for height in (1, 31, 32, 33, 100, 705):
            size = Size(width, height)
            snapped = size.snap()
            assert size.padding() == calculate_padding(height, width, snapped.height, snapped.width)
            left, right, top, bottom = size.padding()
            assert (left + width + right, top + height + bottom) == (snapped.width, snapped.height)


def test_frames_snap_to_8k_plus_1_as_in_the_official_script() -> None:
    for frames in [*range(1, 300), MAX_FRAMES - 1, MAX_FRAMES]:
        snapped = snap_frames(frames)
        assert snapped == ((frames - 2) // 8 + 1) * 8 + 1
        assert snapped % 8 == 1
        assert 0 <= snapped - frames < 8


@pytest.mark.parametrize(
    ("size", "frames", "grid", "tokens"),
    [
        (Size(1216, 704), 121, LatentGrid(16, 22, 38), 13376),
        (Size(768, 512), 97, LatentGrid(13, 16, 24), 4992),
        (Size(800, 448), 121, LatentGrid(16, 14, 25), 5600),
        (Size(1280, 704), 257, LatentGrid(33, 22, 40), 29040),
        (Size(1200, 700), 120, LatentGrid(16, 22, 38), 13376),
        (Size(1, 1), 1, LatentGrid(1, 1, 1), 1),
        (Size(33, 1), 2, LatentGrid(2, 1, 2), 4),
    ],
)
def test_latent_grids_are_those_of_the_fact_sheet(size: Size, frames: int, grid: LatentGrid, tokens: int) -> None:
    latent_grid = LatentGrid.for_video(size, frames)
    assert latent_grid == grid
    assert latent_grid.num_tokens == tokens
    assert latent_grid.video_size == size.snap()
    assert latent_grid.video_frames == snap_frames(frames)


def test_size_is_parsed_from_its_text() -> None:
    for size in (Size(1, 1), Size(704, 480), Size(8192, 8192)):
        assert Size.parse(str(size)) == size
    assert Size.parse("704×480") == Size.parse(" 704 X 480 ") == Size(704, 480)


@pytest.mark.parametrize("text", ["", "704", "704x", "x480", "704x480x3", "704 480", "-64x64", "64.5x64", "axb"])
def test_text_that_is_not_a_size_is_refused_by_value(text: str) -> None:
    with pytest.raises(RequestError, match="WIDTHxHEIGHT") as caught:
        Size.parse(text)
    assert repr(text) in str(caught.value)
    with pytest.raises(RequestError, match="width is 0"):
        Size.parse("0x64")


@pytest.mark.parametrize("side", [0, -1, MAX_SIDE + 1, 64.0, "64", None, True, float("nan")])
def test_impossible_side_is_refused_by_value_and_limit(side: Any) -> None:
    for build, name in ((lambda: Size(side, 64), "width"), (lambda: Size(64, side), "height")):
        with pytest.raises(RequestError) as caught:
            build()
        assert name in str(caught.value)
        assert str(side) in str(caught.value)
        assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("frames", [0, -8, MAX_FRAMES + 1, 10**9, 25.0, "25", None, True])
def test_impossible_frame_count_is_refused_by_value_and_limit(frames: Any) -> None:
    with pytest.raises(RequestError) as caught:
        snap_frames(frames)
    assert str(frames) in str(caught.value)
    assert str(MAX_FRAMES) in str(caught.value) or "whole number" in str(caught.value)
