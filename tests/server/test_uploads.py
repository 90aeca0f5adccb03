"""Uploads that claim to be huge, are not what they claim, or are too many: refused, with nothing left of them."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import signal
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kadr.errors import MediaError
from kadr.jobs.job import StorageError
from kadr.server.errors import ApiError
from kadr.server.inputs.media_check import IMAGE, MediaChecker, MediaLimits
from kadr.server.inputs.uploads import SIDECAR, UploadLimits, UploadStore
from tests.server.answers import refused
from tests.server.app_client import multipart
from tests.server.media import (
    clip,
    clip_of_size,
    data_url,
    deflated_zeros,
    image,
    jpeg,
    mp4_of_frames,
    patch_box,
    png,
)
from tests.server.opened_app import ANNA, BEN, SMALL, OpenedApp

pytestmark = pytest.mark.usefixtures("no_decoding")
ZEROS = deflated_zeros(64 << 20)
HEIC = Path(__file__).parents[1] / "data" / "images" / "sideways.heic"
BOMBS = {
    "PNG of 100,000 by 100,000": png(100_000, 100_000),
    "PNG of 2^31 by 2^31": png(2**31 - 1, 2**31 - 1),
    "PNG of no pixels": png(0, 0),
    "PNG of one row": png(2**31 - 1, 1),
    "PNG of many pixels, deflated": png(12_000, 12_000, pixels=ZEROS),
    "PNG with a huge chunk": b"\x89PNG\r\n\x1a\n" + struct.pack(">I4s", 2**31 - 1, b"IHDR"),
    "PNG without chunks": b"\x89PNG\r\n\x1a\n" + bytes(100),
    "PNG cut": image()[:30],
    "JPEG of 65,535 by 65,535": jpeg(65_535, 65_535),
    "JPEG of no pixels": jpeg(0, 0),
    "JPEG cut": image("JPEG")[:20],
    "JPEG with an endless marker": b"\xff\xd8\xff\xe1\xff\xff" + bytes(100),
    "WebP of 16,384 by 16,384": b"RIFF\x1e\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0\xff\x3f\0\xff\x3f\0",
    "WebP cut": image("WEBP")[:20],
    "AVIF cut": b"\0\0\0\x1cftypavif" + bytes(100),
    "HEIC of nothing": b"\0\0\0\x1cftypheic" + bytes(100),
    "HEIC with a huge box": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\xff\xff\xff\xffmeta" + bytes(100),
    "HEIC of 2^31 by 2^31": patch_box(HEIC.read_bytes(), b"ispe", 4, b"\x7f\xff\xff\xff" * 2),
    "HEIC cut": HEIC.read_bytes()[:300],
    "AVIF of 2^31 by 2^31": patch_box(image("AVIF"), b"ispe", 4, b"\x7f\xff\xff\xff" * 2),
    "MP4 of 65,535 by 65,535": clip_of_size("mp4", 65_535, 65_535),
    "MP4 of 16,384 by 16,384": clip_of_size("mp4", 16_384, 16_384),
    "MP4 of 16,384 by 16": clip_of_size("mp4", 16_384, 16),
    "AVI of 32,768 by 32,768": clip_of_size("avi", 32_768, 32_768),
    "MP4 of a billion frames": mp4_of_frames(10**9),
    "MP4 of 2^32 frames": mp4_of_frames(2**32 - 1),
    "MP4 without an index": b"\0\0\0\x18ftypisom\0\0\0\0isommp42" + bytes(1000),
    "MP4 with a huge box": b"\0\0\0\x18ftypisom\0\0\0\0isommp42" + b"\xff\xff\xff\xffmoov" + bytes(1000),
    "MP4 with boxes in boxes": b"\0\0\0\x18ftypisom\0\0\0\0isommp42" + b"\0\xff\xff\xffmoov" * 10_000,
    "MP4 cut": clip()[:1000],
    "MKV of nothing": b"\x1a\x45\xdf\xa3" + bytes(1000),
    "MKV with a huge element": b"\x1a\x45\xdf\xa3\x01\xff\xff\xff\xff\xff\xff\xfe" + bytes(100),
    "AVI of nothing": b"RIFF\xff\xff\xff\xffAVI LIST" + bytes(1000),
}
NOT_MEDIA = {
    "empty": b"",
    "a byte": b"\x89",
    "text": b"hello, this is text and no image",
    "playlist": b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n",
    "concat": b"ffconcat version 1.0\nfile '/etc/passwd'\n",
    "SDP": b"v=0\no=- 0 0 IN IP4 127.0.0.1\nc=IN IP4 127.0.0.1\nm=video 1 RTP/AVP 96\n",
    "SVG": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "PDF": b"%PDF-1.7\n" + bytes(100),
    "ZIP": b"PK\x03\x04" + bytes(100),
    "pickle": b"\x80\x04\x95" + bytes(100),
    "GIF": b"GIF89a" + bytes(100),
    "TIFF": b"II*\0" + bytes(100),
    "ELF": b"\x7fELF" + bytes(100),
    "HTML": b"<!DOCTYPE html><script>alert(1)</script>",
    "PNG behind other bytes": b"\0" + image(),
}


@pytest.fixture(autouse=True)
def no_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets nobody connect to anything, or look a name up."""

    def refuse(*arguments: Any, **keywords: Any) -> Any:
        raise AssertionError("the server connected to something")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.parametrize("content", BOMBS.values(), ids=BOMBS)
def test_bombs_are_refused_and_leave_nothing(app: OpenedApp, content: bytes) -> None:
    began = time.monotonic()
    with app.unchanged():
        answer = app.send("POST", "/v1/uploads", token=ANNA, body=content, headers={"content-type": "image/png"})
        refused(answer, 400, "invalid_media")
        body, headers = multipart(("prompt", b"x"), ("input_reference", content, "x.png"))
        refused(app.send("POST", "/v1/videos", token=ANNA, body=body, headers=headers), 400, "invalid_media")
    assert time.monotonic() - began < 15


@pytest.mark.parametrize("content", NOT_MEDIA.values(), ids=NOT_MEDIA)
def test_what_is_no_medium_is_refused(app: OpenedApp, content: bytes) -> None:
    with app.unchanged():
        for kind in ("image/png", "video/mp4", "application/octet-stream", "image/svg+xml"):
            answer = app.send("POST", "/v1/uploads", token=ANNA, body=content, headers={"content-type": kind})
            refused(answer, 415, "unsupported_media")
        reference = {"image_url": data_url(content)}
        answer = app.send("POST", "/v1/videos", token=ANNA, json_body={**SMALL, "input_reference": reference})
        refused(answer, 415, "unsupported_media")


def test_png_with_huge_compressed_text_is_cheap(app: OpenedApp) -> None:
    """Pillow refuses text of more than a megabyte; the pixels are never inflated."""
    for name in (b"zTXt", b"iTXt", b"iCCP"):
        between = b"\0\0" if name != b"iTXt" else b"\0\1\0\0\0"
        content = png(64, 64, (name, b"x" + between + ZEROS))
        began = time.monotonic()
        with app.unchanged():
            answer = app.send("POST", "/v1/uploads", token=ANNA, body=content)
            if answer.status == 200:  # a profile is read when the pixels are
                assert app.send("DELETE", f"/v1/uploads/{answer.data['id']}", token=ANNA).status == 200
            else:
                refused(answer, 400, "invalid_media")
        assert time.monotonic() - began < 5


def test_pixels_of_a_png_are_not_decoded(app: OpenedApp) -> None:
    """99 million pixels that are deflated a thousand times: accepted by its header, and decoded by nobody yet."""
    content = png(10_000, 9_900, pixels=b"not even deflated")
    upload = app.upload(content, ANNA)
    assert app.send("DELETE", f"/v1/uploads/{upload}", token=ANNA).status == 200


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1:1/x.png", "https://evil.example/x.png", "ftp://evil.example/x", "file:///etc/passwd", "file:x"]
    + [
        "//evil.example/x.png",
        "gopher://127.0.0.1:6379/_FLUSHALL",
        "http://169.254.169.254/latest/meta-data",
        "jar:x!/",
    ]
    + [
        "s3://bucket/x",
        "unix:/run/docker.sock",
        "\\\\server\\share\\x.png",
        "DATA:image/png;base64,AAAA",
        "/etc/passwd",
    ]
    + ["data:", "data:,x", "data:image/png,x", "data:image/png;base64", "data:image/png;base64,!", "data:;base64,A"]
    + ["data:image/png;base64,data:image/png;base64,AAAA", " data:image/png;base64,AAAA", "data:text/html;base64,PGI+"]
    + [
        "data:image/png;base64,\u00e9",
        "data:image/png;base64,AA\nAA",
        "data:image/png;charset=utf-8,x",
        "javascript:1",
    ],
)
def test_addresses_are_refused_and_nothing_is_fetched(app: OpenedApp, url: str) -> None:
    with app.unchanged():
        for reference in ({"image_url": url}, {"file_id": url}, {"id": url}, url):
            for path in ("/v1/videos", "/v1/plan"):
                fields = {**SMALL, "input_reference": reference}
                refused(app.send("POST", path, token=ANNA, json_body=fields), (400, 404, 415))
            edit = {"prompt": "x", "video": reference}
            refused(app.send("POST", "/v1/videos/edits", token=ANNA, json_body=edit), (400, 404, 415))
        form = {"content-type": "multipart/form-data; boundary=boundary"}
        body, _ = multipart(("prompt", b"x"), ("input_reference[image_url]", url.encode()))
        refused(app.send("POST", "/v1/videos", token=ANNA, body=body, headers=form), (400, 415))


def test_media_of_a_request_are_gone_after_it(app: OpenedApp) -> None:
    """A job has its own copy; what came with a request takes no room among the uploads."""
    before = app.send("GET", "/v1/uploads", token=ANNA).data["data"]
    body, headers = multipart(
        ("prompt", b"x"), ("size", b"64x64"), ("num_frames", b"9"), ("input_reference", image(), "x.png")
    )
    assert app.send("POST", "/v1/videos", token=ANNA, body=body, headers=headers).status == 200
    app.submit(ANNA, input_reference={"image_url": data_url(image())})
    app.submit(ANNA, input_reference=data_url(image("JPEG"), "image/jpeg"))
    assert app.send("GET", "/v1/uploads", token=ANNA).data["data"] == before
    assert len(list((app.folder / "uploads").iterdir())) == len(app.state.uploads.find_all(None))
    with app.unchanged():  # refused once its file was there
        body, headers = multipart(("prompt", b"x"), ("model", b"none"), ("input_reference", image(), "x.png"))
        refused(app.send("POST", "/v1/videos", token=ANNA, body=body, headers=headers), 404, "model_not_found")


def test_requests_on_hostile_clips_are_resolved_without_opening_them(app: OpenedApp) -> None:
    upload = app.upload(clip(), ANNA)
    for fields in (
        {"input_video": upload, "denoise_strength": 0.5, "num_frames": None},
        {"input_video": upload, "denoise_strength": 0.5, "seconds": "0.3", "num_frames": None},
        {"conditions": [{"media": upload}], "size": "auto"},
        {"controls": [{"media": upload, "kind": "canny"}], "num_frames": 9, "size": "128x32"},
        {"input_reference": {"file_id": app.upload(image("PNG", 64, 96), ANNA)}, "size": "auto"},
    ):
        settings = {**SMALL, "num_inference_steps": 10, **fields}
        settings = {key: value for key, value in settings.items() if value is not None}
        answer = app.send("POST", "/v1/plan", token=ANNA, json_body=settings)
        assert answer.status == 200 or "IC-LoRA" in answer.error["message"], answer


def facts(**changes: Any) -> bytes:
    """Returns facts of an image as the process that looks at it sends them, with some of them changed."""
    sizes = dict.fromkeys(("width", "height", "upright_width", "upright_height"), 64)
    return b"=" + json.dumps({"kind": "image", **sizes, **changes}).encode()


@pytest.fixture
def checker() -> Iterator[MediaChecker]:
    checker = MediaChecker(MediaLimits(), seconds=10.0)
    yield checker
    checker.close()


@pytest.fixture
def open_store(tmp_path: Path, checker: MediaChecker) -> Any:
    def open_store(**limits: Any) -> UploadStore:
        return UploadStore(tmp_path / "uploads", checker, UploadLimits(**limits), clock=lambda: clock[0])

    clock = [1000.0]
    open_store.clock = clock  # type: ignore[attr-defined]
    return open_store


def receive(loop: asyncio.AbstractEventLoop, store: UploadStore, owner: str, *chunks: bytes) -> Any:
    async def body() -> Any:
        for chunk in chunks:
            yield chunk

    return loop.run_until_complete(store.receive(owner, body()))


def test_count_and_bytes_of_a_client_are_bounded(loop: Any, open_store: Any) -> None:
    size = len(image())
    store = open_store(max_count=2, max_client_bytes=2 * size, max_total_bytes=3 * size)
    uploads = [receive(loop, store, "anna", image()) for _ in range(2)]
    with pytest.raises(ApiError, match="as many as are kept") as refusal:
        receive(loop, store, "anna", image())
    assert (refusal.value.status, refusal.value.headers) == (429, {"retry-after": "5"})
    receive(loop, store, "ben", image())
    with pytest.raises(ApiError, match="no more room"):
        receive(loop, store, "ben", image())
    store.delete(uploads[0].id, "anna")
    receive(loop, store, "anna", image())
    with pytest.raises(ApiError, match="bytes of your uploads"):
        receive(loop, open_store(max_client_bytes=2 * size), "anna", image())
    assert len(list(store.folder.iterdir())) == 3


def test_uploads_on_their_way_count(loop: Any, open_store: Any) -> None:
    store = open_store(max_count=2, max_incoming=2, max_client_bytes=1000)

    async def fill() -> None:
        with store.begin("anna") as first, store.begin("anna") as second:
            await first.write(image())
            await second.write(image()[:12] + bytes(700))
            with pytest.raises(ApiError, match="on their way"):
                store.begin("anna")
            with pytest.raises(ApiError, match="bytes of your uploads"):
                await second.write(bytes(1000))
            store.begin("ben")

    loop.run_until_complete(fill())
    assert list(store.folder.iterdir()) == []
    assert not store._num_bytes["anna"]
    receive(loop, store, "anna", image())


def test_half_sent_upload_leaves_nothing_after_a_crash(loop: Any, open_store: Any) -> None:
    store = open_store()
    stored = receive(loop, store, "anna", image())
    (store.folder / ("upload_" + 32 * "a")).mkdir()
    (store.folder / ("upload_" + 32 * "a") / "media.part").write_bytes(b"half")
    (store.folder / ("upload_" + 32 * "b")).mkdir()
    (store.folder / ("upload_" + 32 * "b") / SIDECAR).write_text("[]")
    again = open_store(max_client_bytes=stored.bytes)
    assert [upload.id for upload in again.find_all("anna")] == [stored.id]
    assert [path.name for path in again.folder.iterdir()] == [stored.id]
    with pytest.raises(ApiError):
        receive(loop, again, "anna", image())


def test_uploads_expire(loop: Any, open_store: Any) -> None:
    store = open_store(max_age=60)
    receive(loop, store, "anna", image())
    open_store.clock[0] += 59
    store.delete_expired()
    assert store.find_all("anna")
    open_store.clock[0] += 2
    store.delete_expired()
    assert store.find_all("anna") == []
    assert list(store.folder.iterdir()) == []


def test_uploads_leave_the_videos_some_room(loop: Any, open_store: Any) -> None:
    store = open_store(min_free_bytes=2**62)
    with pytest.raises(StorageError, match="for the videos"):
        receive(loop, store, "anna", image())
    assert list(store.folder.iterdir()) == []


def test_other_file_is_refused_before_all_of_it_came(loop: Any, open_store: Any) -> None:
    def more() -> Iterator[bytes]:
        yield b"no image, "
        yield b"surely"
        raise AssertionError("it was read")

    with pytest.raises(ApiError, match="no image or clip"):
        receive(loop, open_store(), "anna", *(chunk for chunk in [b"no image, surely"]))
    assert list(open_store().folder.glob("*")) == []


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="this system stops no process")
def test_file_that_stops_the_checker_is_refused_and_the_next_is_not(
    loop: Any, checker: MediaChecker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = tmp_path / "good.png"
    good.write_bytes(image())
    assert loop.run_until_complete(checker.check(good, IMAGE)).width == 64
    process = checker._process
    monkeypatch.setattr(checker, "_seconds", 0.3)
    os.kill(process.pid, signal.SIGSTOP)  # as a file that takes for ever
    with pytest.raises(MediaError, match="damaged"):
        loop.run_until_complete(checker.check(good, IMAGE))
    assert not process.is_alive()
    monkeypatch.setattr(checker, "_seconds", 10.0)
    assert loop.run_until_complete(checker.check(good, IMAGE)).width == 64
    checker._process.kill()  # as a file that crashes the library
    checker._process.join()
    with pytest.raises(MediaError, match="damaged"):
        loop.run_until_complete(checker.check(good, IMAGE))
    assert loop.run_until_complete(checker.check(good, IMAGE)).width == 64


@pytest.mark.parametrize(
    "outcome",
    [
        *(b"", b"no JSON", b"=no JSON", b"=[]", b'={"kind": "image"}', b"={}", b"=\x80\x04." * 100_000, b"!\xff"),
        *(
            facts(width="64"),
            facts(width=-1),
            facts(kind="x"),
            facts(kind="clip"),
            facts(fps=24.0),
            facts(is_cut_off=0),
        ),
        facts(kind="clip", frames=1, fps=float("inf")),
    ],
)
def test_checker_that_a_file_took_over_is_not_believed(
    loop: Any, checker: MediaChecker, tmp_path: Path, outcome: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    class TakenOver:
        def send(self, *arguments: Any) -> None: ...

        def recv_bytes(self, max_bytes: int) -> bytes:
            if len(outcome) > max_bytes:
                raise OSError("bad message length")
            return outcome

        def close(self) -> None: ...

    checker._connection, checker._process = TakenOver(), type("Gone", (), {"kill": int, "join": int})  # type: ignore
    with pytest.raises(MediaError, match="damaged"):
        loop.run_until_complete(checker.check(tmp_path / "x", IMAGE))


def test_uploads_of_others_count_for_nobody_else(app: OpenedApp) -> None:
    before = len(app.send("GET", "/v1/uploads", token=BEN).data["data"])
    app.upload(image(), ANNA)
    assert len(app.send("GET", "/v1/uploads", token=BEN).data["data"]) == before
    assert np.all([upload.owner == "anna" for upload in app.state.uploads.find_all("anna")])


def test_upload_that_is_deleted_meanwhile_makes_no_job(app: OpenedApp, monkeypatch: pytest.MonkeyPatch) -> None:
    upload = app.upload(image(), ANNA)
    fields = {**SMALL, "input_reference": {"file_id": upload}}
    create = app.state.queue.store.folders.__class__.create

    def delete_first(*arguments: Any) -> Path:
        app.state.uploads.delete(upload, "anna")
        return create(*arguments)

    monkeypatch.setattr(app.state.queue.store.folders.__class__, "create", delete_first)
    jobs = app.state.queue.store.counts()
    refused(app.send("POST", "/v1/videos", token=ANNA, json_body=fields), 404, "media_not_found")
    assert app.state.queue.store.counts() == jobs


def test_clients_take_turns_at_the_checker(
    loop: Any, checker: MediaChecker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []

    def check(path: Path, kind: str) -> str:
        order.append(path.name)
        time.sleep(0.02)
        return path.name

    async def check_all() -> None:
        paths = [tmp_path / f"anna{number}" for number in range(10)]
        annas = [asyncio.ensure_future(checker.check(path, IMAGE, "anna")) for path in paths]
        await asyncio.sleep(0.01)
        await checker.check(tmp_path / "ben", IMAGE, "ben")
        await asyncio.gather(*annas)

    monkeypatch.setattr(checker, "_check", check)
    loop.run_until_complete(check_all())
    assert order.index("ben") <= 2
    assert [name for name in order if name != "ben"] == [f"anna{number}" for number in range(10)]
    assert not checker._turns_of


def test_checker_that_cannot_be_started_is_said(
    loop: Any, checker: MediaChecker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(process: Any) -> None:
        raise OSError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(multiprocessing.get_context("spawn").Process, "start", refuse)
        with pytest.raises(ApiError) as refusal:
            loop.run_until_complete(checker.check(tmp_path / "x", IMAGE))
    assert (refusal.value.status, refusal.value.code) == (503, "busy")
    good = tmp_path / "good.png"
    good.write_bytes(image())
    assert loop.run_until_complete(checker.check(good, IMAGE)).width == 64
