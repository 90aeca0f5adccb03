"""Server-sent events: the queue as it changes, for one video or all of a client's, and again after a gap."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager, suppress
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from kadr.jobs.events import CLOSED, DELETED, JOB, NOTICE, PROGRESS, QUEUE, Event
from kadr.jobs.job import Job, UnknownJobError
from kadr.server.auth import Client
from kadr.server.errors import envelope_responses
from kadr.server.routes.views import base_url, show_progress, show_queue_state, show_video
from kadr.server.state import Sender, ServerState, State

HEARTBEAT_SECONDS = 15.0
MAX_WAITING = 1000  # events of a client that does not read; then it is cut off, and comes back for what it missed
_STREAM: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {}}},
    **envelope_responses(400, 401, 403, 404, 429),
}

LastEventId = Annotated[str | None, Header(alias="Last-Event-ID", max_length=100)]
router = APIRouter(prefix="/v1")


@router.get("/events", responses=_STREAM, response_class=StreamingResponse)
async def stream_events(
    request: Request,
    state: State,
    client: Sender,
    last_event_id: LastEventId = None,
    wait: Annotated[bool, Query(description="false: answer with what there is, and end.")] = True,
) -> StreamingResponse:
    """Streams what happens to all of a client's videos, and to the queue: events "job", "progress", and more.

    The first event is "ready"; "reset" in its place means that events were missed: list the videos again. `id` of an
    event is for `Last-Event-ID`.
    """
    return _stream(request, state, client, last_event_id, None, waits=wait)


@router.get("/videos/{video_id}/events", responses=_STREAM, response_class=StreamingResponse)
async def stream_video_events(
    request: Request, state: State, client: Sender, video_id: str, last_event_id: LastEventId = None
) -> StreamingResponse:
    """Streams what happens to one video, as `GET /v1/events` does, from its present state until it is finished."""
    state.queue.store.get(video_id, client.scope)
    return _stream(request, state, client, last_event_id, video_id, waits=True)


def _stream(
    request: Request, state: ServerState, client: Client, last_event_id: str | None, job_id: str | None, *, waits: bool
) -> StreamingResponse:
    follower = _Follower(state, client, base_url(request), job_id)
    return _EventStream(follower.follow(last_event_id, waits=waits), state.streams.one_more(client.name))


class _EventStream(StreamingResponse):
    """An answer with events, which counts among those of its client from its beginning to its end."""

    def __init__(self, chunks: AsyncIterator[str], count: AbstractContextManager[None]) -> None:
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        super().__init__(chunks, media_type="text/event-stream", headers=headers)
        self._count = count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._count:
            await super().__call__(scope, receive, send)


class _Follower:
    """One connection that follows events."""

    def __init__(self, state: ServerState, client: Client, base_url: str, job_id: str | None) -> None:
        self._state, self._client, self._base_url, self._job_id = state, client, base_url, job_id
        self._queue: asyncio.Queue[Event | None] = asyncio.Queue()
        self._is_cut_off = False
        self._loop = asyncio.get_running_loop()

    async def follow(self, last_event_id: str | None, *, waits: bool) -> AsyncIterator[str]:
        """Yields events as text."""
        log = self._state.queue.events
        unsubscribe = log.subscribe(self._receive)
        try:
            seq, missed = self._missed(last_event_id)
            for text in [self._greeting(missed is None), *(self._show(event) for event in missed or ())]:
                yield text
            if self._job_id is not None:
                job = self._find_job(self._job_id)
                yield self._show_state(self._job_id, job)
                if job is None or job.is_finished:
                    return
                seq = max(seq, job.seq)
            while waits:
                try:
                    event = await asyncio.wait_for(self._queue.get(), HEARTBEAT_SECONDS)
                except asyncio.TimeoutError:
                    yield ": heartbeat\n\n"
                    continue
                if event is None or event.kind == CLOSED:
                    return
                if event.seq > seq:
                    yield self._show(event)
                if self._is_last(event):
                    return
        finally:
            unsubscribe()

    def _receive(self, event: Event) -> None:
        """Takes an event in the thread where it happened."""
        if self._is_wanted(event):
            with suppress(RuntimeError):  # the server has stopped
                self._loop.call_soon_threadsafe(self._put, event)

    def _put(self, event: Event) -> None:
        if not self._is_cut_off:
            self._is_cut_off = self._queue.qsize() >= MAX_WAITING
            self._queue.put_nowait(None if self._is_cut_off else event)

    def _is_wanted(self, event: Event) -> bool:
        is_of_stream = event.kind == CLOSED or self._job_id in (None, event.job_id)
        return is_of_stream and event.is_visible_to(self._client.scope)

    def _missed(self, last_event_id: str | None) -> tuple[int, list[Event] | None]:
        """Returns the number of the newest event, and those after the last one that the client has; None: too many."""
        log = self._state.queue.events
        events = log.since(-1) or []
        newest = events[-1].seq if events else -1
        if last_event_id is None:
            return newest, []
        boot_id, _, number = last_event_id.partition(".")
        if boot_id != log.boot_id or not number.isdecimal() or (missed := log.since(int(number))) is None:
            return newest, None
        newest = max([newest, int(number), *(event.seq for event in missed)])
        return newest, [event for event in missed if self._is_wanted(event)]

    def _greeting(self, has_missed_events: bool) -> str:
        kind = "reset" if has_missed_events else "ready"
        return _event(kind, {"boot": self._state.queue.events.boot_id})

    def _find_job(self, job_id: str) -> Job | None:
        """Returns the one job that is followed as it is now, or None if it was deleted."""
        try:
            return self._state.queue.store.get(job_id, self._client.scope)
        except UnknownJobError:
            return None

    def _show_state(self, job_id: str, job: Job | None) -> str:
        """Returns the event with the video as it is now."""
        if job is None:
            return _event(DELETED, {"id": job_id})
        return _event(JOB, self._show_job(job), self._event_id(job.seq))

    def _is_last(self, event: Event) -> bool:
        """Tells whether nothing more happens to the one video that is followed."""
        is_last = event.kind == DELETED or (event.kind == JOB and event.data.is_finished)
        return self._job_id is not None and is_last

    def _show(self, event: Event) -> str:
        if event.kind == JOB:
            data = self._show_job(event.data)
        elif event.kind == PROGRESS:
            data = {"id": event.job_id, "seq": event.seq, **show_progress(event.data)}
        elif event.kind == QUEUE:
            data = {"seq": event.seq, **show_queue_state(event.data["paused"], event.data["problem"])}
        else:
            data = {"id": event.job_id, "seq": event.seq}
            if event.kind == NOTICE:
                data["message"] = self._state.hide_paths(event.data["message"])
        return _event(event.kind, data, self._event_id(event.seq))

    def _show_job(self, job: Job) -> dict[str, Any]:
        return show_video(self._state, self._client, job, base_url=self._base_url)

    def _event_id(self, seq: int) -> str:
        return f"{self._state.queue.events.boot_id}.{seq}"


def _event(kind: str, data: Any, event_id: str | None = None) -> str:
    """Returns an event as text: data is one line, as JSON is."""
    number = f"id: {event_id}\n" if event_id is not None else ""
    return f"event: {kind}\n{number}data: {json.dumps(data)}\n\n"
