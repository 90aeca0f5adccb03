"""Streams of events: what a client that does not read costs, and what they do not say."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from kadr.jobs.events import NOTICE, Event
from kadr.server.auth import LOCAL_CLIENT
from kadr.server.errors import ApiError
from kadr.server.routes.events import MAX_WAITING, _Follower
from kadr.server.stream_count import StreamCount
from tests.server.answers import MARKER
from tests.server.opened_app import OpenedApp


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


def test_streams_are_counted_for_each_client() -> None:
    count = StreamCount(max_streams=1)
    with count.one_more("anna"), count.one_more("ben"), pytest.raises(ApiError) as refusal, count.one_more("anna"):
        pass
    assert refusal.value.status == 429
    with count.one_more("anna"):
        pass
