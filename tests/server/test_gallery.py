"""Finished videos are found by their words, kept as favourites, and shown with their media."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from kadr.jobs.events import JOB
from kadr.jobs.expiry import Retention
from kadr.jobs.job import FAILED
from tests.server.media import clip, image
from tests.server.opened_app import ANNA, BEN, OpenedApp, open_app


def found(app: OpenedApp, query: str, **parameters: str) -> list[str]:
    """Returns the prompts that a search finds, oldest first."""
    answer = app.send("GET", "/v1/videos?" + "&".join(f"{k}={v}" for k, v in {"query": query, **parameters}.items()))
    return [video["prompt"] for video in reversed(answer.data["data"])]


@pytest.fixture(scope="module")
def searched(local_app: OpenedApp) -> OpenedApp:
    """An application with videos of several prompts."""
    for prompt in ("Search: a fox in SNOW", "search: 100% snow_storm", "search: Лиса и Straße"):
        local_app.submit(prompt=prompt)
    return local_app


@pytest.mark.parametrize(
    "query, expected",
    [
        ("search snow", ["Search: a fox in SNOW", "search: 100% snow_storm"]),
        ("SNOW fox search:", ["Search: a fox in SNOW"]),
        ("search: %25", ["search: 100% snow_storm"]),
        ("search: w_s", ["search: 100% snow_storm"]),
        ("%D0%BB%D0%98%D1%81%D0%B0 search", ["search: Лиса и Straße"]),
        ("search strasse", ["search: Лиса и Straße"]),
        ("search elephant", []),
        ("'; DROP TABLE jobs; --", []),
    ],
)
def test_videos_are_found_by_every_word(searched: OpenedApp, query: str, expected: list[str]) -> None:
    assert found(searched, query.replace(" ", "+")) == expected


def test_search_has_pages(searched: OpenedApp) -> None:
    first = searched.send("GET", "/v1/videos?query=search:&limit=2").data
    assert first["has_more"]
    second = searched.send("GET", f"/v1/videos?query=search:&limit=2&after={first['last_id']}").data
    assert [video["prompt"] for video in second["data"]] == ["Search: a fox in SNOW"]
    assert not second["has_more"]


def test_favourites_are_listed_and_belong_to_their_owner(app: OpenedApp) -> None:
    mine, other = app.submit(ANNA), app.submit(ANNA)
    path = f"/v1/videos/{mine}/favorite"
    assert app.send("POST", path, token=BEN, json_body={"favorite": True}).status == 404
    assert app.send("POST", path, token=ANNA, json_body={"favorite": "yes"}).status == 400
    assert app.send("POST", path, token=ANNA, json_body={"favorite": True}).data["favorite"]
    shown = {video["id"] for video in app.send("GET", "/v1/videos?favorite=true", token=ANNA).data["data"]}
    assert mine in shown
    assert other not in shown
    assert not app.send("POST", path, token=ANNA, json_body={"favorite": False}).data["favorite"]


def test_favourite_is_an_event_but_no_second_outcome(local_app: OpenedApp) -> None:
    video_id = local_app.add_completed()
    queue, finished = local_app.state.queue, "kadr_jobs_finished_total"
    seq, lines, figures = queue.store.get(video_id).seq, list(local_app.lines), local_app.send("GET", "/metrics").body
    assert local_app.send("POST", f"/v1/videos/{video_id}/favorite", json_body={"favorite": True}).status == 200
    (event,) = queue.events.since(seq) or []
    assert (event.kind, event.job_id, event.data.is_favorite) == (JOB, video_id, True)
    assert local_app.lines == lines
    after = local_app.send("GET", "/metrics").body
    counts = [[line for line in text.decode().splitlines() if finished in line] for text in (figures, after)]
    assert counts[0] == counts[1]


def test_favourite_shows_that_it_does_not_expire(tmp_path: Path, loop: Any) -> None:
    with open_app(tmp_path / "data", loop, retention=Retention(max_age=60.0)) as app:
        video_id = app.add_completed()
        assert app.send("GET", f"/v1/videos/{video_id}").data["expires_at"] is not None
        app.send("POST", f"/v1/videos/{video_id}/favorite", json_body={"favorite": True})
    with open_app(tmp_path / "data", loop, retention=Retention(max_age=60.0)) as app:
        video = app.send("GET", f"/v1/videos/{video_id}").data
    assert (video["favorite"], video["expires_at"]) == (True, None)


def test_video_shows_its_media(local_app: OpenedApp) -> None:
    photo, film = local_app.upload(image()), local_app.upload(clip())
    conditions = [{"media": photo}, {"media": film, "frame": 8}]
    video_id = local_app.submit(num_frames=25, conditions=conditions)
    media = local_app.send("GET", f"/v1/videos/{video_id}").data["media"]
    assert [(item["id"], item["kind"]) for item in media] == [(f"{video_id}/0", "image"), (f"{video_id}/1", "clip")]
    uploads = {item["id"]: item for item in local_app.send("GET", "/v1/uploads").data["data"]}
    for item, upload in zip(media, (photo, film), strict=True):
        assert all(item[name] == uploads[upload][name] for name in ("width", "height", "frames", "fps"))


def test_search_among_5000_videos_is_quick(local_app: OpenedApp) -> None:
    store = local_app.state.queue.store
    job = store.get(local_app.submit(prompt="a fox runs through deep snow, " * 16))
    (row,) = store.table.database.rows("SELECT * FROM jobs WHERE id = ?", (job.id,))
    columns = {name: row[name] for name in row.keys() if name not in ("number", "seq", "id")}  # noqa: SIM118
    with store.table.change() as change:
        for number in range(5000):
            change.insert(
                **{**columns, "id": f"video_{number:032x}", "status": FAILED, "error": {"code": "x", "message": "x"}}
            )
        change.announced.clear()
    seconds = []
    for _ in range(3):
        began = time.process_time()  # other processes do not count
        assert store.jobs(words=("fox", "deep", "elephant")).jobs == []  # every prompt has all words but the last
        seconds.append(time.process_time() - began)
    with store.table.change() as change:
        change.rows("DELETE FROM jobs WHERE id LIKE 'video_0000000000000%'")
    assert min(seconds) < 0.05  # 0.021 measured


def test_video_whose_description_was_damaged_is_still_listed(tmp_path: Path, loop: Any) -> None:
    with open_app(tmp_path / "data", loop) as app:
        video_id = app.add_completed()
        with app.state.queue.store.table.change() as change:  # as a lost database is restored without a job.json
            change.update("id = ?", (video_id,), labels={}, request={})
        (video,) = app.send("GET", "/v1/videos").data["data"]
    assert (video["id"], video["size"], video["num_frames"], video["prompt"]) == (video_id, "64x64", 9, "")
