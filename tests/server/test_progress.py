"""Clients see a video on its way: its progress, its events, its place in the queue; and they cancel it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.server.client_server import (
    PROMPT,
    ServerEvent,
    ServerProcess,
    answer_of,
    create_video,
    error_of,
    make_video,
    png,
    read_events,
    wait_until_finished,
)
from tests.server.raw_http import wait_until

STEPS = {"size": "128x128", "num_frames": 25, "num_inference_steps": 12}
HOURS = {"size": "512x512", "num_frames": 257, "num_inference_steps": 200}


def set_paused(client: httpx2.Client, is_paused: bool) -> dict[str, Any]:
    state: dict[str, Any] = answer_of(client.post(f"/v1/queue/{'pause' if is_paused else 'resume'}"))
    return state


def wait_until_begun(client: httpx2.Client, video_id: str, stage: str = "denoise") -> None:
    """Waits until a video is at a stage."""
    deadline = time.monotonic() + 30
    while answer_of(client.get(f"/v1/videos/{video_id}"))["stage"] != stage:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def events_so_far(client: httpx2.Client, **headers: str) -> list[ServerEvent]:
    """Returns what the stream of all events has now."""
    with client.stream("GET", "/v1/events", params={"wait": "false"}, headers=headers) as response:
        return list(read_events(response))


def test_progress_of_a_video_rises_step_by_step(client: httpx2.Client) -> None:
    answers = wait_until_finished(client, create_video(client, **STEPS)["id"])
    progress = [answer["progress"] for answer in answers]
    assert progress == sorted(progress)
    assert len(set(progress)) >= 6
    assert {answer["status"] for answer in answers} <= {"queued", "in_progress", "completed"}
    running = [answer for answer in answers if answer["status"] == "in_progress" and answer["stage"]]
    assert {"denoise", "decode"} <= {answer["stage"] for answer in running}
    denoise = [answer for answer in running if answer["stage"] == "denoise"]
    assert {answer["steps"] for answer in denoise} == {12}
    steps, etas = [answer["step"] for answer in denoise], [answer["eta_seconds"] for answer in running]
    assert steps == sorted(steps)
    etas = [eta for eta in etas if eta is not None]  # there is none before the plan
    assert 0 <= etas[-1] < etas[0] < 60
    assert all(answer["error"] is None and answer["url"] is None for answer in answers[:-1])
    assert answers[-1]["progress"] == 100
    assert (answers[-1]["stage"], answers[-1]["eta_seconds"]) == (None, None)


def test_events_of_one_video_end_with_it(client: httpx2.Client) -> None:
    video = create_video(client, **STEPS)
    with client.stream("GET", f"/v1/videos/{video['id']}/events") as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        ready, first, *events = read_events(response)
    assert (ready.kind, first.kind, first.data["id"]) == ("ready", "job", video["id"])
    assert {event.data["id"] for event in events} == {video["id"]}
    assert (events[-1].kind, events[-1].data["status"], events[-1].data["progress"]) == ("job", "completed", 100)
    progress = [event.data for event in events if event.kind == "progress"]
    assert {"stage", "step", "steps", "eta_seconds", "progress", "seq"} <= set(progress[0])
    assert len(progress) > 12
    assert [data["progress"] for data in progress] == sorted(data["progress"] for data in progress)
    seqs = [event.data["seq"] for event in events]
    assert seqs == sorted(set(seqs))
    with client.stream("GET", f"/v1/videos/{video['id']}/events") as response:
        assert [event.data.get("status") for event in read_events(response)] == [None, "completed"]


def test_events_after_a_gap_are_those_that_were_missed(client: httpx2.Client) -> None:
    with client.stream("GET", "/v1/events") as response:
        events = read_events(response)
        assert next(events).kind == "ready"
        videos = [create_video(client)["id"] for _ in range(2)]
        seen = [next(events)]
        while {event.data["id"] for event in seen if event.data.get("status") == "completed"} != set(videos):
            seen.append(next(events))
    assert {event.data["id"] for event in seen} == set(videos)
    for video_id in videos:
        first = next(event.data for event in seen if event.kind == "progress" and event.data["id"] == video_id)
        assert (first["stage"], first["step"], first["steps"], first["progress"]) == ("load", None, None, 0)
    for missed in (1, len(seen) // 2, len(seen) - 1):
        greeting, *again = events_so_far(client, **{"Last-Event-ID": str(seen[missed - 1].id)})
        assert greeting.kind == "ready"
        assert [(event.kind, event.id) for event in again] == [(event.kind, event.id) for event in seen[missed:]]
    (greeting,) = events_so_far(client, **{"Last-Event-ID": "00000000.7"})
    assert greeting.kind == "reset"


def test_deleting_a_video_is_an_event(client: httpx2.Client) -> None:
    video_id = make_video(client)["id"]
    with client.stream("GET", "/v1/events") as response:
        events = read_events(response)
        assert next(events).kind == "ready"
        answer_of(client.delete(f"/v1/videos/{video_id}"))
        event = next(events)
        assert (event.kind, event.data["id"]) == ("deleted", video_id)


def test_cancelling_stops_a_video_within_a_step(server: ServerProcess, client: httpx2.Client) -> None:
    video_id = create_video(client, **HOURS)["id"]
    wait_until_begun(client, video_id)
    began = time.monotonic()
    answer_of(client.post(f"/v1/videos/{video_id}/cancel"))
    video = wait_until_finished(client, video_id)[-1]
    assert time.monotonic() - began < 10  # a step takes longer than that
    assert (video["status"], video["error"]["code"], video["progress"]) == ("failed", "cancelled", 0)
    assert error_of(client.post(f"/v1/videos/{video_id}/cancel"), 409)["code"] == "conflict"
    assert error_of(client.get(f"/v1/videos/{video_id}/content"), 400)["code"] == "video_failed"
    assert make_video(client)["inference_time_s"] < 5
    log = server.log()
    assert f"{video_id} failed: cancelled: it was cancelled\n" in log
    assert "is replaced" not in log


def test_deleting_a_video_in_progress_cancels_it(client: httpx2.Client) -> None:
    video_id = create_video(client, **HOURS)["id"]
    wait_until_begun(client, video_id)
    answer_of(client.delete(f"/v1/videos/{video_id}"))
    error_of(client.get(f"/v1/videos/{video_id}"), 404)
    make_video(client)


def test_a_client_that_does_not_wait_for_the_file_cancels_it(client: httpx2.Client) -> None:
    with pytest.raises(httpx2.ReadTimeout):
        client.post("/v1/videos/sync", json={"prompt": PROMPT, **HOURS}, timeout=1.5)
    (newest,) = answer_of(client.get("/v1/videos", params={"limit": 1}))["data"]
    video = wait_until_finished(client, newest["id"])[-1]
    assert (video["size"], video["status"], video["error"]["code"]) == ("512x512", "failed", "cancelled")


def test_a_repeated_idempotency_key_makes_no_second_video(client: httpx2.Client) -> None:
    headers = {"idempotency-key": "order 66"}
    form = {"prompt": "a red circle", "size": "64x64", "num_frames": "9", "num_inference_steps": "2"}

    def submit(**fields: str) -> httpx2.Response:
        files = {"input_reference": ("a.png", png("red"))}
        return client.post("/v1/videos", data={**form, **fields}, files=files, headers=headers)

    ids = {answer_of(submit())["id"] for _ in range(3)}
    assert len(ids) == 1
    assert error_of(submit(prompt="a blue circle"), 409)["code"] == "conflict"


def test_videos_are_made_by_priority_and_place(client: httpx2.Client) -> None:
    assert set_paused(client, True)["paused"]
    wait_until(lambda: answer_of(client.get("/v1/queue"))["in_progress"] == 0)  # of the test before
    first, second, third, urgent = (create_video(client, priority=priority)["id"] for priority in (0, 0, 0, 5))
    assert answer_of(client.post(f"/v1/videos/{third}/move", json={"before": first}))["queue_position"] == 2
    answer_of(client.post(f"/v1/videos/{first}/move", json={}))
    page = answer_of(client.get("/v1/videos", params={"status": "queued"}))
    places = {video["id"]: video["queue_position"] for video in page["data"]}
    assert places == {urgent: 1, third: 2, second: 3, first: 4}
    assert error_of(client.post(f"/v1/videos/{first}/move", json={"before": urgent}), 409)["code"] == "conflict"
    cancelled = answer_of(client.post(f"/v1/videos/{second}/cancel"))
    assert (cancelled["status"], cancelled["error"]["code"]) == ("failed", "cancelled")
    assert answer_of(client.get("/v1/queue")) | {"completed": 0, "failed": 0} == {
        "paused": True,
        "queued": 3,
        "in_progress": 0,
        "completed": 0,
        "failed": 0,
        "problem": None,
    }
    assert not set_paused(client, False)["paused"]
    for video_id in (urgent, third, first):
        wait_until_finished(client, video_id)
    begun = [event for event in events_so_far(client, **{"Last-Event-ID": last_id(client)}) if event.kind == "job"]
    order = [event.data["id"] for event in begun if event.data["status"] == "in_progress"]
    assert [video_id for video_id in order if video_id in places] == [urgent, third, first]


def last_id(client: httpx2.Client) -> str:
    """Returns the id of an event before all others."""
    (ready,) = events_so_far(client)
    return f"{ready.data['boot']}.0"


@pytest.mark.slow
def test_what_was_asked_for_survives_a_restart(tmp_path: Path) -> None:
    server = ServerProcess(tmp_path / "data").start()
    with server.client() as client:
        finished = make_video(client)
        running = create_video(client, **STEPS, seed=4)["id"]
        waiting = create_video(client, seed=5)["id"]
        wait_until_begun(client, running)
        set_paused(client, True)
        with client.stream("GET", "/v1/events") as response:
            events = read_events(response)
            assert next(events).kind == "ready"
            event = next(events)
            began = time.monotonic()
            assert server.stop() == 0, server.log()
            assert time.monotonic() - began < 8
            assert {event.kind for event in events} <= {"progress", "preview", "job"}  # and the stream ends
    server.start()
    with server.client() as client:
        (reset,) = events_so_far(client, **{"Last-Event-ID": str(event.id)})
        assert reset.kind == "reset"
        assert answer_of(client.get(f"/v1/videos/{finished['id']}"))["status"] == "completed"
        assert answer_of(client.get("/v1/queue"))["paused"]
        assert {answer_of(client.get(f"/v1/videos/{each}"))["status"] for each in (running, waiting)} == {"queued"}
        set_paused(client, False)
        videos = [wait_until_finished(client, video_id)[-1] for video_id in (running, waiting)]
        assert [(video["status"], video["seed"]) for video in videos] == [("completed", 4), ("completed", 5)]
        assert httpx2.get(videos[0]["url"]).status_code == 200
    assert server.stop() == 0, server.log()
