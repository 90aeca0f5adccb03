"""`size="auto"` keeps the aspect of an image or clip, and a crop that loses much of one is said."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kadr.cli.flags import parse
from kadr.errors import KadrWarning, RequestError
from kadr.media.writer import VideoWriter
from kadr.pipeline.engine import Engine
from kadr.request.fit_size import fitting_size
from kadr.request.inputs import Condition
from kadr.request.request import Request
from kadr.shapes import Size

REQUEST = Request(prompt="a red circle", size="auto", frames=9)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.open("demo", device="cpu")


def write_image(path: Path, width: int, height: int, orientation: int = 1) -> str:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (width, height), "teal").save(path, exif=exif)
    return str(path)


def write_clip(path: Path, width: int, height: int, frames: int = 9) -> str:
    with VideoWriter(path, Size(width, height), 24) as writer:
        writer.write(np.zeros((frames, height, width, 3), np.uint8))
    return str(path)


def test_a_fitting_size_stays_within_the_budget_and_uses_most_of_it() -> None:
    random = np.random.default_rng(0)
    for width, height in random.integers(16, 20000, (200, 2)).tolist():
        max_pixels, aspect = int(np.prod(random.integers(4, 60, 2))) * 1024, width / height
        size = fitting_size(width, height, max_pixels)
        assert size == size.snap()
        assert size.width * size.height <= max_pixels
        if 1 / 3 <= aspect <= 3:
            assert size.width * size.height >= max_pixels / 2
            ratio = size.width / size.height / aspect
            assert min(ratio, 1 / ratio) >= 0.75


@pytest.mark.parametrize(
    ("sides", "max_size", "expected"),
    [
        ((4032, 3024), Size(704, 480), Size(640, 480)),
        ((3024, 4032), Size(704, 480), Size(480, 640)),
        ((1920, 1080), Size(704, 480), Size(736, 416)),
        ((1000, 1000), Size(128, 128), Size(128, 128)),
        ((1000, 9000), Size(128, 128), Size(64, 256)),
    ],
    ids=str,
)
def test_usual_aspects_keep_their_shape(sides: tuple[int, int], max_size: Size, expected: Size) -> None:
    assert fitting_size(*sides, max_size.width * max_size.height) == expected


@pytest.mark.parametrize(("orientation", "expected"), [(1, Size(160, 96)), (6, Size(96, 160))])
def test_auto_takes_the_upright_aspect_of_the_first_image(
    orientation: int, expected: Size, engine: Engine, tmp_path: Path
) -> None:
    first = write_image(tmp_path / "first.jpg", 1920, 1080, orientation)
    last = write_image(tmp_path / "last.png", 300, 300)
    conditions = (
        Condition(last, box=(0, 0, 64, 64)),  # covers a part, so it does not decide
        Condition(first, frame=8),
    )
    resolved = engine.resolve(replace(REQUEST, conditions=conditions))
    assert resolved.size == expected
    assert resolved.request.size == expected  # which a video stores, so a rerun does not depend on the file's shape


def test_auto_takes_the_aspect_of_an_input_video_before_that_of_an_image(engine: Engine, tmp_path: Path) -> None:
    clip, image = write_clip(tmp_path / "clip.mp4", 96, 160), write_image(tmp_path / "a.png", 1920, 1080)
    request = replace(REQUEST, input_video=clip, conditions=(Condition(image, strength=0.5),))
    with pytest.warns(KadrWarning, match=r"a\.png is 1920x1080 pixels.*loses 66%"):
        assert engine.resolve(request).size == Size(96, 160)


def test_auto_without_an_image_or_clip_is_refused(engine: Engine) -> None:
    with pytest.raises(RequestError, match=r"no image or clip.*--image"):
        engine.resolve(REQUEST)


def test_auto_is_stored_and_read_again() -> None:
    assert Request.from_json(REQUEST.to_json()) == REQUEST
    assert parse.size_or_auto("auto") == "auto"
    assert parse.size_or_auto("64x32") == Size(64, 32)


@pytest.mark.parametrize("size", [Size(128, 128), Size(64, 64)], ids=str)
def test_a_crop_of_more_than_a_tenth_is_said_once_with_the_fitting_size(
    size: Size, engine: Engine, tmp_path: Path
) -> None:
    path = write_image(tmp_path / "wide.png", 1600, 960)
    conditions = (Condition(path), Condition(path, frame=8))
    with pytest.warns(KadrWarning) as caught:
        engine.resolve(replace(REQUEST, size=size, conditions=conditions))
    (message,) = [str(warning.message) for warning in caught]
    assert message.startswith(f"{path} is 1600x960 pixels: cropped to the aspect of {size}, it loses 40% of them.")
    assert ("size=160x96 would cut off 0%" in message) == (size.width == 128)  # 64x64 leaves no other shape


def test_a_crop_of_less_than_a_tenth_is_silent(engine: Engine, tmp_path: Path) -> None:
    path = write_image(tmp_path / "nearly.png", 1070, 1000)
    with warnings.catch_warnings():
        warnings.simplefilter("error", KadrWarning)
        engine.resolve(replace(REQUEST, size=Size(128, 128), conditions=(Condition(path),)))
