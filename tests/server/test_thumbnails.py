"""Thumbnails of uploads, videos and their media: small, upright, of the right frame; decoded in another process."""

from __future__ import annotations

import io
import os
import signal
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kadr.errors import MediaError
from kadr.jobs.engine_maker import THUMBNAIL_FILE, VIDEO_FILE
from kadr.server.inputs.frame_reader import FrameReader
from tests.server.answers import Answer, refused
from tests.server.media import GREY_STEP, ON_ITS_SIDE, deflated_zeros, grey_clip, image, patch_box, png
from tests.server.opened_app import ANNA, BEN, OpenedApp
from tests.server.routes import UNKNOWN_UPLOAD, UNKNOWN_VIDEO

pytestmark = pytest.mark.usefixtures("no_decoding")
open_image = Image.open  # as it is before nobody may


@pytest.fixture(scope="module")
def annas_clip(app: OpenedApp) -> str:
    return app.upload(grey_clip(), ANNA)


@pytest.fixture(scope="module")
def annas_video(app: OpenedApp) -> str:
    """Returns a completed video with an image as its medium, whose file is the clip and whose thumbnail is blue."""
    video_id = app.add_completed(ANNA, input_reference={"file_id": app.upload(image("PNG", 64, 96), ANNA)})
    output = app.state.queue.store.folders.output(video_id)
    (output / VIDEO_FILE).write_bytes(grey_clip())
    Image.new("RGB", (512, 256), "blue").save(output / THUMBNAIL_FILE)
    return video_id


def get(app: OpenedApp, reference: str, query: str = "", *, token: str = ANNA, **headers: str) -> Answer:
    return app.send("GET", f"/v1/thumbnails/{reference}{query}", token=token, headers=headers)


def shown(answer: Answer) -> Image.Image:
    """Returns the image of an answer."""
    assert answer.status == 200, answer
    assert answer.header("content-type") == "image/jpeg"
    found = open_image(io.BytesIO(answer.body))
    assert found.format == "JPEG"
    return found


def grey_of(found: Image.Image) -> float:
    return float(np.asarray(found).mean())


def test_thumbnail_of_an_image_is_small(app: OpenedApp) -> None:
    found = shown(get(app, app.upload(image("PNG", 800, 400), ANNA)))
    assert found.size == (320, 160)
    assert np.abs(np.asarray(found)[80, 160] - np.array((254, 0, 0))).max() < 4
    assert shown(get(app, app.upload(image("JPEG", 64, 96), ANNA), "?frame=7")).size == (64, 96)


@pytest.mark.parametrize("frame, expected", [(None, 0), (0, 0), (3, 3), (4, 4), (5, 4), (10**9, 4)])
def test_thumbnail_of_a_clip_is_of_its_frame_or_the_last(
    app: OpenedApp, annas_clip: str, frame: int | None, expected: int
) -> None:
    found = shown(get(app, annas_clip, "" if frame is None else f"?frame={frame}"))
    assert found.size == (320, 160)
    assert abs(grey_of(found) - GREY_STEP * expected) < 8


def test_thumbnail_of_a_clip_on_its_side_is_upright(app: OpenedApp) -> None:
    upload = app.upload(patch_box(grey_clip(), b"tkhd", 40, ON_ITS_SIDE), ANNA)
    assert shown(get(app, upload)).size == (160, 320)


def test_thumbnail_of_a_video_is_its_own_or_of_a_frame(app: OpenedApp, annas_video: str) -> None:
    first = shown(get(app, annas_video))
    assert first.size == (320, 160)
    assert np.asarray(first)[..., 2].min() > 240
    assert abs(grey_of(shown(get(app, annas_video, "?frame=2"))) - 2 * GREY_STEP) < 8


@pytest.mark.parametrize("slash", ["/", "%2F"])
def test_media_of_a_video_have_thumbnails(app: OpenedApp, annas_video: str, slash: str) -> None:
    assert shown(get(app, f"{annas_video}{slash}0")).size == (64, 96)
    for number in ("1", "-1", "x", "0/0", ""):
        refused(get(app, f"{annas_video}{slash}{number}"), 404, "media_not_found")


def test_thumbnail_is_kept_by_one_client_and_not_sent_twice(
    app: OpenedApp, annas_clip: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = get(app, annas_clip, "?frame=1")
    tag = answer.header("etag") or ""
    assert (answer.header("cache-control"), answer.header("vary")) == ("private, max-age=86400", "Authorization")
    assert tag != get(app, annas_clip, "?frame=2").header("etag")
    monkeypatch.setattr(FrameReader, "read_thumbnail", None)
    for tags in (tag, f'"another", W/{tag}'):
        again = get(app, annas_clip, "?frame=1", **{"if-none-match": tags})
        assert (again.status, again.body, again.header("etag")) == (304, b"", tag)
    refused(get(app, annas_clip, "?frame=1", token=BEN, **{"if-none-match": tag}), 404, "upload_not_found")


def test_thumbnails_of_another_client_are_not_there(app: OpenedApp, annas_clip: str, annas_video: str) -> None:
    for theirs, unknown in (
        (annas_clip, UNKNOWN_UPLOAD),
        (annas_video, UNKNOWN_VIDEO),
        (f"{annas_video}/0", f"{UNKNOWN_VIDEO}/0"),
    ):
        answer = refused(get(app, theirs, token=BEN), 404)
        other = refused(get(app, unknown, token=BEN), 404, answer.code)
        ids = [reference.partition("/")[0].encode() for reference in (theirs, unknown)]
        assert answer.body.replace(ids[0], b"") == other.body.replace(ids[1], b"")


def test_what_has_no_thumbnail_is_refused(app: OpenedApp, annas_clip: str) -> None:
    refused(get(app, app.submit(ANNA)), 400, "video_not_ready")
    for reference in ("", "x", "../../etc/passwd", "%2e%2e/x", "image.png"):
        refused(get(app, reference), 404)
    for frame in ("-1", "x", "1.5", "", str(10**9 + 1), str(10**30)):
        refused(get(app, annas_clip, f"?frame={frame}"), 400, "invalid_value")
    gone = app.add_completed(ANNA)
    app.state.queue.store.folders.output(gone).joinpath(THUMBNAIL_FILE).unlink()
    refused(get(app, gone), 404, "content_not_found")


@pytest.mark.parametrize(
    "content",
    [
        png(10_000, 9_900, pixels=b"not even deflated"),
        png(9_000, 9_000, pixels=deflated_zeros(64 << 20)),
        png(64, 64),
        image()[:-30],
    ],
    ids=["PNG of no data", "PNG of too little", "PNG of a few pixels", "PNG cut"],
)
def test_images_whose_pixels_are_not_there_are_refused(app: OpenedApp, content: bytes) -> None:
    """Their headers are in order."""
    refused(get(app, app.upload(content, ANNA)), 400, "invalid_media")
    shown(get(app, app.upload(image(), ANNA)))


@pytest.fixture
def reader() -> Iterator[FrameReader]:
    reader = FrameReader()
    yield reader
    reader.close()


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="this system stops no process")
def test_file_that_takes_too_long_is_refused_and_the_next_is_not(loop: Any, tmp_path: Path) -> None:
    reader, good = FrameReader(seconds=10.0), tmp_path / "good.png"
    good.write_bytes(image())
    assert loop.run_until_complete(reader.read_thumbnail(good, None))
    os.kill(reader._process.pid, signal.SIGSTOP)
    reader._seconds = 0.3
    with pytest.raises(MediaError, match="not decoded in 10 seconds"):
        loop.run_until_complete(reader.read_thumbnail(good, None))
    reader._seconds = 10.0
    assert loop.run_until_complete(reader.read_thumbnail(good, None))
    reader.close()


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"=",
        b"=\0\1\0",
        b"=\0\1\0\1",
        b"=\0\1\0\1\0\0\0\0",
        b"=\0\0\0\1",
        struct.pack(">cHH", b"=", 321, 1) + bytes(3 * 321),
        image("JPEG"),
    ],
)
def test_pixels_of_a_process_that_was_taken_over_are_not_believed(
    loop: Any, reader: FrameReader, tmp_path: Path, answer: bytes
) -> None:
    class TakenOver:
        def send(self, *arguments: Any) -> None: ...

        def recv_bytes(self, max_bytes: int) -> bytes:
            return answer

        def close(self) -> None: ...

    reader._connection, reader._process = TakenOver(), type("Gone", (), {"kill": int, "join": int})  # type: ignore
    with pytest.raises(MediaError, match="damaged"):
        loop.run_until_complete(reader.read_thumbnail(tmp_path / "x", None))
