"""`HttpProtocol`: uvicorn's connections, of which none can be kept open for nothing, and whose errors are the API's.

Whoever opens many, sends no whole head of a request, or does not read an answer loses them; other clients go on.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from kadr.cancellation import CancelToken
from kadr.jobs.events import EventLog
from kadr.server.errors import ApiError

MAX_CONNECTIONS = 1000
STOP_SECONDS = 5  # for answers on their way when the server stops
STOP_POLL_SECONDS = 0.1  # between looks at the token
UNSENT_BYTES = 1 << 17  # of an answer that wait in the system until the client reads
SPARE_FILES = 256  # open files besides connections: the database, videos, workers


@dataclass(frozen=True)
class ConnectionLimits:
    """Bounds of connections.

    Args:
        max_connections: open at the same time; the one that has waited longest for a request makes room.
        head_seconds: for the head of a request to arrive, also of the next one.
        write_seconds: without a byte of an answer being read.
    """

    max_connections: int = MAX_CONNECTIONS
    head_seconds: float = 20.0
    write_seconds: float = 60.0


class HttpProtocol(H11Protocol):
    """One connection. limits: see `ConnectionLimits`."""

    def __init__(self, *args: Any, limits: ConnectionLimits, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._limits = limits
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._idle_since = self.loop.time()

    @property
    def is_idle(self) -> bool:
        """True while no request is answered here: it has not come, or its answer is complete."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: Any) -> None:
        """Takes a new connection, if need be in the place of one that waits for nothing."""
        super().connection_made(transport)
        if hasattr(socket, "TCP_NOTSENT_LOWAT"):  # else megabytes wait in the system, and reading is noticed late
            connection = transport.get_extra_info("socket")
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)
        self._await_head()
        if len(self.connections) > self._limits.max_connections:
            self._make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forgets the connection."""
        for timer in (self._head_timer, self._write_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Takes what a client sent. What is not HTTP in the middle of an answer ends the connection."""
        try:
            super().data_received(data)
        except h11.ProtocolError:
            self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        """Answers what is not HTTP."""
        self._refuse(ApiError(400, f"{msg.rstrip('.')}.", code="invalid_http"))

    def on_response_complete(self) -> None:
        """Waits for the next request."""
        super().on_response_complete()
        self._await_head()

    def pause_writing(self) -> None:
        """Gives a client that does not read some time."""
        super().pause_writing()
        if self._write_timer is None:
            self._await_reading()

    def resume_writing(self) -> None:
        """Goes on, since the client has read."""
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _await_reading(self) -> None:
        left = self.transport.get_write_buffer_size()
        self._write_timer = self.loop.call_later(self._limits.write_seconds, self._abort_if_unread, left)

    def _abort_if_unread(self, left: int) -> None:
        """Gives the connection up if no more than before was read of what was left to send."""
        if self.transport.get_write_buffer_size() < left:
            self._await_reading()
        else:
            self.transport.abort()

    def _await_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
        self._idle_since = self.loop.time()
        self._head_timer = self.loop.call_later(self._limits.head_seconds, self._close_if_idle)

    def _close_if_idle(self) -> None:
        if self.is_idle:  # else the answer that is on its way sets the timer again
            self.transport.close()
            # Closing waits until the rest of an answer is read.
            self._head_timer = self.loop.call_later(self._limits.write_seconds, self.transport.abort)

    def _make_room(self) -> None:
        """Closes the connection that has waited longest for a request, or this one where all of them are answered."""
        others = (other for other in self.connections if isinstance(other, HttpProtocol) and other is not self)
        idle = [other for other in others if other.is_idle and not other.transport.is_closing()]
        if idle:
            min(idle, key=lambda other: other._idle_since).transport.abort()
        else:
            message = "the server has as many connections as it takes. Try again later."
            self._refuse(ApiError(503, message, code="too_many_connections", headers={"retry-after": "1"}))

    def _refuse(self, error: ApiError) -> None:
        """Answers with an error without a request, and closes the connection."""
        response = error.response()
        headers = [*response.raw_headers, (b"connection", b"close"), (b"x-content-type-options", b"nosniff")]
        start = h11.Response(status_code=response.status_code, headers=headers)
        for event in (start, h11.Data(data=bytes(response.body)), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


def allowed_connections(wanted: int = MAX_CONNECTIONS) -> int:
    """Returns as many connections as the process may have files open for, after asking for more where it may."""
    try:
        import resource
    except ImportError:  # Windows, which has no such limit
        return wanted
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 2 * wanted + SPARE_FILES  # an answer may have a file open
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        except (OSError, ValueError):  # macOS has another limit above
            soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return max(1, min(wanted, (soft - SPARE_FILES) // 2))
    return wanted


def create_server(app: ASGIApp, limits: ConnectionLimits) -> HttpServer:
    """Returns a server of an application; `HttpServer.serve_until` runs it."""
    return HttpServer(
        uvicorn.Config(
            app,
            http=partial(HttpProtocol, limits=limits),  # type: ignore[arg-type]
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="error",  # what is not HTTP is its sender's mistake
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=STOP_SECONDS,
            proxy_headers=False,
        )
    )


class HttpServer(uvicorn.Server):
    """A server that stops when a token is cancelled; signals are the command line's."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves signals alone."""
        yield

    async def serve_until(self, token: CancelToken, listener: socket.socket, events: EventLog) -> None:
        """Serves until the token is cancelled, then ends the streams of events."""
        serving = asyncio.ensure_future(self.serve(sockets=[listener]))
        while not token.is_cancelled and not serving.done():
            await asyncio.wait((serving,), timeout=STOP_POLL_SECONDS)
        self.should_exit = True
        events.close()
        await serving
