"""Property of another client is not there: the answer is that to an id that never was."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.server.answers import refused
from tests.server.media import clip, image
from tests.server.opened_app import ADMIN, ANNA, BEN, SMALL, OpenedApp
from tests.server.routes import UNKNOWN_UPLOAD, UNKNOWN_VIDEO, VIDEO_ROUTES, fill

BODIES: dict[str, Any] = {"remix": {"prompt": "x"}, "move": {}, "favorite": {"favorite": True}}


@pytest.fixture(scope="module")
def annas(app: OpenedApp) -> dict[str, str]:
    """Ids of what Anna has: a completed video with an image, one that waits, an image and a clip."""
    upload, clip_upload = app.upload(image(), ANNA), app.upload(clip(), ANNA)
    completed = app.add_completed(ANNA, input_reference={"file_id": upload})
    return {"completed": completed, "queued": app.submit(ANNA), "upload": upload, "clip": clip_upload}


@pytest.mark.parametrize("which", ["completed", "queued"])
@pytest.mark.parametrize("method, path", VIDEO_ROUTES)
def test_video_of_another_client_is_not_there(
    app: OpenedApp, annas: dict[str, str], method: str, path: str, which: str
) -> None:
    video_id, body = annas[which], BODIES.get(path.rpartition("/")[2])
    with app.unchanged():
        theirs = refused(app.send(method, fill(path, video_id), token=BEN, json_body=body), 404, "video_not_found")
        unknown = refused(app.send(method, fill(path), token=BEN, json_body=body), 404, "video_not_found")
    assert theirs.body.replace(video_id.encode(), b"") == unknown.body.replace(UNKNOWN_VIDEO.encode(), b"")


@pytest.mark.parametrize("query", ["", "?order=asc", "?status=completed", "?status=queued"])
def test_list_shows_only_the_clients_own(app: OpenedApp, annas: dict[str, str], query: str) -> None:
    own = app.submit(BEN)
    ids = {video["id"] for video in app.send("GET", f"/v1/videos{query}", token=BEN).data["data"]}
    assert not ids & set(annas.values())
    assert (own in ids) == (query != "?status=completed")
    everyones = app.send("GET", "/v1/videos?limit=100", token=ADMIN).data["data"]
    assert {own, annas["completed"]} <= {video["id"] for video in everyones}


def test_list_after_a_video_of_another_client_is_refused(app: OpenedApp, annas: dict[str, str]) -> None:
    theirs = refused(app.send("GET", f"/v1/videos?after={annas['queued']}", token=BEN), 400)
    unknown = refused(app.send("GET", f"/v1/videos?after={UNKNOWN_VIDEO}", token=BEN), 400)
    assert theirs.error["param"] == "after"
    assert theirs.body.replace(annas["queued"].encode(), b"") == unknown.body.replace(UNKNOWN_VIDEO.encode(), b"")


def test_owner_and_counts_are_for_admins_and_oneself(app: OpenedApp, annas: dict[str, str]) -> None:
    own = app.submit(BEN)
    assert app.send("GET", f"/v1/videos/{own}", token=BEN).data["owner"] is None
    assert app.send("GET", f"/v1/videos/{own}", token=ADMIN).data["owner"] == "ben"
    bens = app.send("GET", "/v1/queue", token=BEN).data
    assert bens["completed"] == 0
    assert bens["queued"] < app.send("GET", "/v1/queue", token=ADMIN).data["queued"]


@pytest.mark.parametrize("what", ["completed", "queued", "upload", "clip", "medium"])
@pytest.mark.parametrize(
    "fields",
    [
        lambda reference: {"input_reference": reference},
        lambda reference: {"input_reference": {"file_id": reference}},
        lambda reference: {"input_reference": {"id": reference}},
        lambda reference: {"conditions": [{"media": reference}]},
        lambda reference: {"controls": [{"media": reference}]},
        lambda reference: {"input_video": reference, "denoise_strength": 0.5},
        lambda reference: {"extra_params": {"input_video": reference}},
    ],
)
def test_media_of_another_client_are_not_there(app: OpenedApp, annas: dict[str, str], what: str, fields: Any) -> None:
    reference = f"{annas['completed']}/0" if what == "medium" else annas[what]
    with app.unchanged():
        for path in ("/v1/videos", "/v1/videos/sync", "/v1/plan"):
            refused(app.send("POST", path, token=BEN, json_body={**SMALL, **fields(reference)}), 404)


@pytest.mark.parametrize("path", ["/v1/videos/edits", "/v1/videos/extensions"])
@pytest.mark.parametrize("what", ["completed", "clip", "medium"])
def test_video_of_another_client_cannot_be_edited(app: OpenedApp, annas: dict[str, str], path: str, what: str) -> None:
    reference = f"{annas['completed']}/0" if what == "medium" else annas[what]
    body = {"prompt": "x", "seconds": "1"}
    with app.unchanged():
        for video in (reference, {"id": reference}, {"file_id": reference}):
            refused(app.send("POST", path, token=BEN, json_body={**body, "video": video}), 404)
        form = {"content-type": "application/x-www-form-urlencoded"}
        refused(app.send("POST", path, token=BEN, body=f"prompt=x&video[id]={reference}".encode(), headers=form), 404)


def test_upload_of_another_client_is_not_there(app: OpenedApp, annas: dict[str, str]) -> None:
    assert app.send("GET", "/v1/uploads", token=BEN).data["data"] == []
    with app.unchanged():
        theirs = refused(app.send("DELETE", f"/v1/uploads/{annas['upload']}", token=BEN), 404, "upload_not_found")
        unknown = refused(app.send("DELETE", f"/v1/uploads/{UNKNOWN_UPLOAD}", token=BEN), 404, "upload_not_found")
    assert theirs.body.replace(annas["upload"].encode(), b"") == unknown.body.replace(UNKNOWN_UPLOAD.encode(), b"")
    everyones = app.send("GET", "/v1/uploads", token=ADMIN).data["data"]
    assert {annas["upload"], annas["clip"]} <= {upload["id"] for upload in everyones}


def test_nobody_moves_before_a_video_of_another_client(app: OpenedApp, annas: dict[str, str]) -> None:
    own = app.submit(BEN)
    for before in (annas["queued"], UNKNOWN_VIDEO, annas["completed"]):
        refused(app.send("POST", f"/v1/videos/{own}/move", token=BEN, json_body={"before": before}), 404)


def test_key_of_another_client_is_free(app: OpenedApp) -> None:
    ids = set()
    for token in (ANNA, BEN):
        for _ in range(2):
            headers = {"idempotency-key": "the same"}
            ids.add(app.send("POST", "/v1/videos", token=token, json_body=SMALL, headers=headers).data["id"])
    assert len(ids) == 2


def test_events_show_only_the_clients_own(app: OpenedApp, annas: dict[str, str]) -> None:
    boot = app.state.queue.events.boot_id
    last = app.state.queue.events.since(0)[0].seq
    headers = {"last-event-id": f"{boot}.{last}"}
    own = app.submit(BEN)
    theirs = app.submit(ANNA)
    everyones = app.send("GET", "/v1/events?wait=false", token=ADMIN, headers=headers).body.decode()
    assert own in everyones
    assert theirs in everyones
    bens = app.send("GET", "/v1/events?wait=false", token=BEN, headers=headers).body.decode()
    assert own in bens
    assert theirs not in bens
    assert not [name for name in annas.values() if name in bens]


def test_media_of_a_video_keep_no_name_of_a_client(app: OpenedApp) -> None:
    body = b'--b\r\nContent-Disposition: form-data; name="file"; filename="../../etc/passwd.png"\r\n\r\n%s\r\n--b--\r\n'
    headers = {"content-type": "multipart/form-data; boundary=b"}
    upload = app.send("POST", "/v1/uploads", token=ANNA, body=body % image(), headers=headers).data
    video_id = app.submit(ANNA, input_reference={"file_id": upload["id"]})
    stored = json.dumps([app.send("GET", f"/v1/videos/{video_id}", token=ANNA).data, upload])
    assert "passwd" not in stored
    assert not list(app.folder.rglob("*passwd*"))
