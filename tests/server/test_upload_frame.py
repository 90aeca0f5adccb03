"""A frame of a clip or video becomes an upload, exactly as it is decoded."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kadr.jobs.engine_maker import VIDEO_FILE
from kadr.media.clip import read_video
from kadr.server.inputs.frame_reader import FrameReader
from tests.server.answers import Answer, refused
from tests.server.app_client import multipart
from tests.server.media import ON_ITS_SIDE, grey_clip, image, patch_box
from tests.server.opened_app import ANNA, BEN, OpenedApp
from tests.server.routes import UNKNOWN_UPLOAD

pytestmark = pytest.mark.usefixtures("no_decoding")
open_image = Image.open  # as it is before nobody may
FRAMES = 5
CLIP = patch_box(grey_clip(), b"tkhd", 40, ON_ITS_SIDE)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """Returns the frames of the clip (F, 640, 320, 3), upright."""
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    path.write_bytes(CLIP)
    return read_video(path).frames


@pytest.fixture(scope="module")
def annas_clip(app: OpenedApp) -> str:
    return app.upload(CLIP, ANNA)


def upload_frame(app: OpenedApp, media: Any, frame: Any, *, token: str = ANNA) -> Answer:
    return app.send("POST", "/v1/uploads/frame", token=token, json_body={"media": media, "frame": frame})


def pixels_of(app: OpenedApp, answer: Answer) -> np.ndarray:
    """Returns the pixels of the upload in an answer."""
    assert answer.status == 200, answer
    path = app.state.uploads.path(app.state.uploads.get(answer.data["id"], None))
    found = open_image(io.BytesIO(path.read_bytes()))
    assert found.format == "PNG"
    return np.asarray(found)


@pytest.mark.parametrize("frame", [0, 3, -1, -FRAMES])
def test_upload_has_the_exact_pixels_of_its_frame(
    app: OpenedApp, annas_clip: str, expected: np.ndarray, frame: int
) -> None:
    answer = upload_frame(app, annas_clip, frame)
    assert (pixels_of(app, answer) == expected[frame]).all()
    assert len({expected[index].tobytes() for index in range(FRAMES)}) == FRAMES
    facts = {"kind": "image", "width": 320, "height": 640, "frames": None}
    assert {key: answer.data[key] for key in facts} == facts
    assert answer.data in app.send("GET", "/v1/uploads", token=ANNA).data["data"]


def test_frames_of_videos_and_their_media_become_keyframes(
    app: OpenedApp, annas_clip: str, expected: np.ndarray
) -> None:
    video_id = app.add_completed(ANNA, input_reference={"file_id": annas_clip})
    (app.state.queue.store.folders.output(video_id) / VIDEO_FILE).write_bytes(CLIP)
    for media in (video_id, f"{video_id}/0"):
        answer = upload_frame(app, media, -1)
        assert (pixels_of(app, answer) == expected[-1]).all()
        app.submit(ANNA, conditions=[{"media": answer.data["id"], "frame": -1}])
    app.state.queue.store.folders.output(video_id).joinpath(VIDEO_FILE).unlink()
    refused(upload_frame(app, video_id, -1), 404, "content_not_found")


def test_frames_that_are_not_there_are_refused_and_leave_nothing(app: OpenedApp, annas_clip: str) -> None:
    others_image, waiting = app.upload(image(), ANNA), app.submit(ANNA)
    with app.unchanged():
        for frame in (FRAMES, -FRAMES - 1, 10**9):
            error = refused(upload_frame(app, annas_clip, frame), 400, "invalid_media").error
            assert error["message"].endswith(f"none is frame {frame}. Give -5 to 4.")
        for frame in (10**9 + 1, -(10**30), 0.5, "0", None, [], True):
            assert refused(upload_frame(app, annas_clip, frame), 400, "invalid_value").error["param"] == "frame"
        assert refused(upload_frame(app, others_image, 0), 400, "invalid_media").error["param"] == "media"
        refused(upload_frame(app, waiting, 0), 400, "video_not_ready")
        refused(upload_frame(app, "x", 0), 404, "media_not_found")
        for media in (None, 1, {"id": annas_clip}):
            assert refused(upload_frame(app, media, 0), 400, "invalid_value").error["param"] == "media"
        body, headers = multipart(("frame", b"0"), ("media", CLIP, "clip.mp4"))
        refused(app.send("POST", "/v1/uploads/frame", token=ANNA, body=body, headers=headers), 400, "invalid_value")


def test_frame_of_another_clients_clip_is_not_there(app: OpenedApp, annas_clip: str) -> None:
    with app.unchanged():
        theirs = refused(upload_frame(app, annas_clip, 0, token=BEN), 404, "upload_not_found")
        unknown = refused(upload_frame(app, UNKNOWN_UPLOAD, 0, token=BEN), 404, "upload_not_found")
    assert theirs.body.replace(annas_clip.encode(), b"") == unknown.body.replace(UNKNOWN_UPLOAD.encode(), b"")


def test_frame_counts_as_an_upload(app: OpenedApp, annas_clip: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = app.state.uploads
    monkeypatch.setattr(store, "limits", store.limits.__class__(max_count=0))
    refused(upload_frame(app, annas_clip, 0), 429, "too_many_uploads")
    monkeypatch.setattr(store, "limits", store.limits.__class__(max_bytes=100))
    with app.unchanged():
        refused(upload_frame(app, annas_clip, 0), 413, "too_large")


def test_png_of_a_process_that_was_taken_over_is_checked_like_any_upload(
    app: OpenedApp, annas_clip: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def answer(reader: FrameReader, path: Path, frame: int, owner: str) -> bytes:
        return contents.pop()

    contents = [b"<script>alert(1)</script>", b"\x89PNG\r\n\x1a\n" + bytes(100)]
    monkeypatch.setattr(FrameReader, "read_png", answer)
    with app.unchanged():
        refused(upload_frame(app, annas_clip, 0), 400, "invalid_media")
        refused(upload_frame(app, annas_clip, 0), 415, "unsupported_media")
    assert not contents
