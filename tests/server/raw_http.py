"""HTTP as bytes on sockets: requests that no library would send, and the application behind uvicorn's own protocol."""

from __future__ import annotations

import asyncio
import re
import socket
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from kadr.cancellation import CancelToken
from kadr.jobs.events import EventLog
from kadr.server.connections import ConnectionLimits, HttpServer, create_server
from tests.server.answers import Answer, check_answer

SECONDS = 5.0  # for an answer
_HEAD = re.compile(rb"HTTP/1\.1 (\d{3}) [^\r]*\r\n((?:[^\r\n]+\r\n)*)\r\n")


@dataclass
class RawServer:
    """A server that listens on this machine. roots: folders of it that nothing may name."""

    port: int
    server: HttpServer | None = None
    roots: Collection[str] = ()

    @property
    def num_connections(self) -> int:
        assert self.server is not None
        return len(self.server.server_state.connections)

    def connect(self, receive_buffer: int | None = None) -> socket.socket:
        """Returns a new connection. receive_buffer: bytes that the system takes while nobody reads."""
        connection = socket.socket()
        if receive_buffer is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        connection.settimeout(SECONDS)
        connection.connect(("127.0.0.1", self.port))
        return connection

    def send(self, *chunks: bytes, pause: float = 0.0, hangs_up: bool = False) -> list[Answer]:
        """Sends bytes on a connection of their own, and returns all answers until the server closes it.

        Args:
            pause: seconds between two chunks.
            hangs_up: before an answer comes.
        """
        with self.connect() as connection:
            with suppress(OSError):  # it may have been refused already
                for chunk in chunks:
                    connection.sendall(chunk)
                    time.sleep(pause)
            return [] if hangs_up else self.parse(read_all(connection))

    def parse(self, content: bytes) -> list[Answer]:
        """Returns the answers in some bytes, all of them checked."""
        answers = []
        while match := _HEAD.match(content):
            lines = match[2].decode("latin-1").splitlines()
            headers = [(name.lower(), value.strip()) for name, _, value in (line.partition(":") for line in lines)]
            length = dict(headers).get("content-length", "0" if match[1] == b"100" else None)
            end = len(content) if length is None else match.end() + int(length)
            answer = Answer(int(match[1]), headers, content[match.end() : end])
            answers.append(check_answer(answer, self.roots) if answer.status != 100 else answer)
            content = content[end:]
        assert content == b"", content
        return answers


def read_all(connection: socket.socket) -> bytes:
    """Returns what comes until the other side closes the connection or is silent."""
    content = b""
    with suppress(OSError):
        while chunk := connection.recv(65536):
            content += chunk
    return content


def head(method: str, path: str, *lines: str) -> bytes:
    """Returns the head of a request."""
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", *lines, "", ""]).encode("latin-1")


def wait_until(is_true: Any, seconds: float = SECONDS) -> None:
    """Waits until something is true."""
    deadline = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@contextmanager
def serve_app(app: Any, events: EventLog, roots: Collection[str] = (), **limits: Any) -> Iterator[RawServer]:
    """Serves an application from a thread. limits: of `ConnectionLimits`."""
    listener, token = socket.create_server(("127.0.0.1", 0)), CancelToken()
    server = create_server(app, ConnectionLimits(**limits))
    server.config.timeout_graceful_shutdown = 1
    thread = threading.Thread(target=lambda: asyncio.run(server.serve_until(token, listener, events)))
    thread.start()
    wait_until(lambda: server.started)
    yield RawServer(listener.getsockname()[1], server, roots)
    token.cancel()
    thread.join(10)
    assert not thread.is_alive()
