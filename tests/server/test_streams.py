"""Streams of events: what a client that does not read costs, and what they do not say."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from kadr.jobs.events import NOTICE, QUEUE, Event
from kadr.server.auth import LOCAL_CLIENT, Client
from kadr.server.errors import ApiError
from kadr.server.routes.events import MAX_WAITING, _Follower
from kadr.server.stream_count import StreamCount
from tests.server.answers import MARKER
from tests.server.opened_app import ADMIN, ANNA, BEN, OpenedApp


def test_client_that_does_not_read_is_cut_off(local_app: OpenedApp, loop: asyncio.AbstractEventLoop) -> None:
    events = local_app.state.queue.events

    async def follow() -> tuple[int, list[str]]:
        follower = _Follower(local_app.state, LOCAL_CLIENT, "http://localhost", None)
        chunks = follower.follow(None, waits=True)
        texts = [await anext(chunks)]
        for number in range(5 * MAX_WAITING):
            events.publish(Event(10**9 + number, NOTICE, "x", None, {"message": "x"}))
        await asyncio.sleep(0)  # the events arrive
        waiting = follower._queue.qsize()
        texts += [text async for text in chunks]
        return waiting, texts

    before = len(events._subscribers)
    waiting, texts = loop.run_until_complete(follow())
    assert waiting == MAX_WAITING + 1
    assert len(texts) == 1 + MAX_WAITING  # it ends there, and comes back for the rest
    assert len(events._subscribers) == before


def test_notices_do_not_say_where_things_lie(local_app: OpenedApp, loop: asyncio.AbstractEventLoop) -> None:
    events, folder = local_app.state.queue.events, local_app.folder
    seq = 2 * 10**9
    message = f"{folder / 'jobs' / 'x' / 'media' / '0.png'} is large, and '{folder}' is full"

    async def follow() -> str:
        chunks = _Follower(local_app.state, LOCAL_CLIENT, "http://localhost", None).follow(None, waits=True)
        await anext(chunks)
        events.publish(Event(seq, NOTICE, "x", None, {"message": message}))
        text = await anext(chunks)
        await chunks.aclose()
        return text

    text = loop.run_until_complete(follow())
    assert MARKER not in text
    assert "0.png is large, and 'the server's folder' is full" in text
    answer: Any = local_app.send(
        "GET", "/v1/events?wait=false", headers={"last-event-id": f"{events.boot_id}.{seq - 1}"}
    )
    assert b"0.png is large" in answer.body


def test_every_stream_but_those_of_one_video_sees_the_pause(app: OpenedApp, loop: asyncio.AbstractEventLoop) -> None:
    video_id, queue = app.submit(ANNA), app.state.queue
    begin = f"{queue.events.boot_id}.{app.send('GET', f'/v1/videos/{video_id}', token=ANNA).data['seq']}"
    problem = f"the disk with {app.folder} has 3 MB free"

    async def follow() -> list[list[dict[str, Any]]]:
        followers = [_Follower(app.state, Client(name), "http://localhost", None) for name in ("anna", "ben")]
        streams = [follower.follow(None, waits=True) for follower in followers]
        for stream in streams:
            await anext(stream)  # ready
        await asyncio.to_thread(queue.set_paused, True)
        await asyncio.to_thread(queue.set_paused, True)  # which changes nothing
        queue.supervisor.announce_state(problem)
        await asyncio.to_thread(queue.set_paused, False)
        seen = [[parse(await anext(stream)) for _ in range(3)] for stream in streams]
        for stream in streams:
            await stream.aclose()
        of_video = _Follower(app.state, Client("anna"), "http://localhost", video_id)
        pauses = [event for event in queue.events.since(0) or () if event.kind == QUEUE]
        assert pauses
        assert not any(map(of_video._is_wanted, pauses))
        return seen

    annas, bens = loop.run_until_complete(follow())
    assert annas == bens
    assert [(data["kind"], data["paused"], data["problem"]) for data in annas] == [
        ("queue", True, None),
        ("queue", True, "the server's disk is full or cannot be read"),
        ("queue", False, None),
    ]
    assert annas[0]["seq"] < annas[1]["seq"] < annas[2]["seq"]
    again = app.send("GET", "/v1/events?wait=false", token=BEN, headers={"last-event-id": begin}).body.decode()
    assert again.count("event: queue") == 3
    assert again.startswith("event: ready\n")
    app.send("DELETE", f"/v1/videos/{video_id}", token=ANNA)


def parse(text: str) -> dict[str, Any]:
    """Returns the data of an event as it is sent, with its kind."""
    lines = dict(line.split(": ", 1) for line in text.strip().splitlines())
    return {"kind": lines["event"], **json.loads(lines["data"])}


def test_pausing_is_an_event(app: OpenedApp) -> None:
    events = app.state.queue.events
    last = f"{events.boot_id}.{(events.since(0) or [])[-1].seq}"
    assert app.send("POST", "/v1/queue/pause", token=ADMIN).data["paused"] is True
    assert app.send("POST", "/v1/queue/resume", token=ADMIN).data["paused"] is False
    answer = app.send("GET", "/v1/events?wait=false", token=ANNA, headers={"last-event-id": last})
    ready, *events_seen = [parse(text) for text in answer.body.decode().split("\n\n") if text]
    assert ready["kind"] == "ready"
    assert [(event["kind"], event["paused"]) for event in events_seen] == [("queue", True), ("queue", False)]


def test_streams_are_counted_for_each_client() -> None:
    count = StreamCount(max_streams=1)
    with count.one_more("anna"), count.one_more("ben"), pytest.raises(ApiError) as refusal, count.one_more("anna"):
        pass
    assert refusal.value.status == 429
    with count.one_more("anna"):
        pass
