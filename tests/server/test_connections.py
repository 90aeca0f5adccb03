"""Connections that are slow, many, silent, or not HTTP: they cost the server little, and others nothing."""

from __future__ import annotations

import json
import logging
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from kadr.jobs.events import NOTICE, Event
from kadr.server import connections
from kadr.server.run import _listen
from tests.server.answers import refused
from tests.server.opened_app import SMALL, OpenedApp, open_app
from tests.server.raw_http import RawServer, head, read_all, serve_app, wait_until

HEALTHY = head("GET", "/health/alive", "Connection: close")
PAUSE = head("POST", "/v1/queue/pause", "Content-Length: 0", "Connection: close")


@pytest.fixture(scope="module")
def opened(data_folder: Path, loop: Any) -> Iterator[OpenedApp]:
    with open_app(data_folder / "connections", loop) as opened:
        object.__setattr__(opened.rules, "body_seconds", 0.4)
        yield opened


@pytest.fixture(scope="module")
def server(opened: OpenedApp) -> Iterator[RawServer]:
    """A server with little patience."""
    limits = {"max_connections": 20, "head_seconds": 0.5, "write_seconds": 0.5}
    with serve_app(opened.send.app, opened.state.queue.events, (str(opened.folder),), **limits) as server:
        yield server


@pytest.fixture(autouse=True)
def nothing_is_left(server: RawServer, opened: OpenedApp, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Checks that every connection is closed in the end, that nothing was paused, and that nothing failed."""
    yield
    wait_until(lambda: server.num_connections == 0)
    was_paused = opened.state.queue.store.is_paused
    opened.state.queue.store.set_paused(False)
    assert not was_paused
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR and record.name != "asyncio"]


def test_head_that_never_ends_is_cut_off(server: RawServer) -> None:
    for start in (b"", b"G", b"GET / HTTP/1.1\r\n", b"GET / HTTP/1.1\r\nX: "):
        with server.connect() as connection:
            began = time.monotonic()
            with suppress(OSError):
                connection.sendall(start)
                while time.monotonic() - began < 3:
                    connection.sendall(b"x" if start else b"")
                    time.sleep(0.05)
                    if not start and not connection.recv(1):
                        break
            assert time.monotonic() - began < 2


def test_body_of_a_byte_now_and_then_is_cut_off(server: RawServer, opened: OpenedApp) -> None:
    start = head("POST", "/v1/videos", "Content-Type: application/json", "Content-Length: 1000")
    with opened.unchanged():
        (answer,) = server.send(start, *[b"{"] * 12, pause=0.1)
        refused(answer, 408, "too_slow")
        upload = head("POST", "/v1/uploads", "Transfer-Encoding: chunked")
        (answer,) = server.send(upload, *[b"1\r\nx\r\n"] * 12, pause=0.1)
        refused(answer, 408, "too_slow")


def test_body_that_nobody_reads_is_cut_off(server: RawServer) -> None:
    start = head("GET", "/health/alive", "Content-Length: 1000000000")
    began = time.monotonic()
    with server.connect() as connection, suppress(OSError):
        connection.sendall(start)
        while time.monotonic() - began < 5:
            connection.sendall(b"x" * 1000)
            time.sleep(0.01)
    assert time.monotonic() - began < 4


def test_request_that_never_ends_does_not_end_its_answer(server: RawServer, opened: OpenedApp) -> None:
    with server.connect() as connection:
        connection.sendall(head("GET", "/v1/events", "Content-Length: 10"))
        content = connection.recv(1000)
        time.sleep(1)
        opened.state.queue.store.cancel(opened.submit())
        while b"cancelled" not in content:
            content += connection.recv(1000) or pytest.fail("the stream has ended")
    video_id = opened.add_completed()
    start = head("GET", f"/v1/videos/{video_id}/content", "Content-Length: 10", "Connection: close")
    assert server.send(start)[0].body == b"a video"


def test_idle_connection_is_closed_after_an_answer(server: RawServer) -> None:
    with server.connect() as connection:
        began = time.monotonic()
        connection.sendall(head("GET", "/health/alive"))
        assert len(server.parse(read_all(connection))) == 1
        assert time.monotonic() - began < 3


def test_answer_that_nobody_reads_is_given_up(server: RawServer, opened: OpenedApp) -> None:
    video_id = opened.add_completed()
    with (opened.state.queue.store.folders.output(video_id) / "video.mp4").open("wb") as file:
        file.truncate(8 << 20)
    with server.connect(receive_buffer=4096) as connection:
        connection.sendall(head("GET", f"/v1/videos/{video_id}/content"))
        wait_until(lambda: server.num_connections == 1)
        wait_until(lambda: server.num_connections == 0)
    with server.connect(receive_buffer=1 << 16) as connection:  # whoever reads slowly, but does, gets all of it
        connection.sendall(head("GET", f"/v1/videos/{video_id}/content", "Connection: close"))
        received, end = len(connection.recv(1024)), time.monotonic() + 1.2
        while time.monotonic() < end:
            received += len(connection.recv(1 << 15))
            time.sleep(0.02)
        assert received + len(read_all(connection)) > 8 << 20


def test_stream_that_nobody_reads_is_given_up(server: RawServer, opened: OpenedApp) -> None:
    events = opened.state.queue.events
    before = len(events._subscribers)
    with server.connect(receive_buffer=4096) as connection:
        connection.sendall(head("GET", "/v1/events"))
        wait_until(lambda: len(events._subscribers) > before)
        for number in range(3000):
            events.publish(Event(10**9 + number, NOTICE, "x", None, {"message": 5000 * "x"}))
        wait_until(lambda: server.num_connections == 0)
    wait_until(lambda: len(events._subscribers) == before)


def test_many_connections_make_room_for_one_that_asks(server: RawServer) -> None:
    with ExitStack() as stack:
        silent = [stack.enter_context(server.connect()) for _ in range(60)]
        (answer,) = server.send(HEALTHY)
        assert answer.status == 200
        assert server.num_connections <= 20
        silent[-1].sendall(HEALTHY)
        assert len(server.parse(read_all(silent[-1]))) == 1


def test_connections_that_all_work_leave_no_room(server: RawServer) -> None:
    with ExitStack() as stack:
        streams = [stack.enter_context(server.connect()) for _ in range(20)]
        for stream in streams:
            stream.sendall(head("GET", "/v1/events"))
            assert stream.recv(100).startswith(b"HTTP/1.1 200")
        (answer,) = server.send(HEALTHY)
        assert refused(answer, 503, "too_many_connections").header("retry-after") == "1"
        assert streams[0].recv(1000)
        streams.pop().close()
        wait_until(lambda: server.num_connections < 20)
        assert server.send(HEALTHY)[0].status == 200


def test_answers_that_take_longer_than_a_head_go_on(server: RawServer, opened: OpenedApp) -> None:
    video_id = opened.submit()
    with server.connect() as connection:  # the second request is there before the first is answered
        connection.sendall(head("GET", "/health/alive") + head("GET", f"/v1/videos/{video_id}/events"))
        time.sleep(1.2)
        opened.state.queue.store.cancel(video_id)
        assert b"cancelled" in read_all(connection)


def test_client_that_leaves_cancels_what_it_waits_for(server: RawServer, opened: OpenedApp) -> None:
    body = json.dumps(SMALL).encode()
    with server.connect() as connection:
        start = head("POST", "/v1/videos/sync", "Content-Type: application/json", f"Content-Length: {len(body)}")
        connection.sendall(start + body)
        wait_until(lambda: opened.state.queue.store.counts()["queued"] == 1)
    wait_until(lambda: opened.state.queue.store.counts()["queued"] == 0)


NOT_HTTP = {
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "HTTP/0.9": b"GET /\r\n\r\n",
    "HTTP/9": b"GET /nothing HTTP/9.9\r\nHost: localhost\r\n\r\n",
    "SSH": b"SSH-2.0-OpenSSH_9.6\r\n",
    "zeros": bytes(1000),
    "lines": b"\r\n" * 20_000,
    "no path": b"GET HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "spaces": b"GET  /  HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "path not ASCII": b"GET /\xff HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "NUL in the path": b"GET /\0 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "NUL in a header": b"GET / HTTP/1.1\r\nHost: localhost\r\nX: \0\r\n\r\n",
    "space before the colon": b"GET / HTTP/1.1\r\nHost : localhost\r\n\r\n",
    "header without a name": b"GET / HTTP/1.1\r\n: x\r\nHost: localhost\r\n\r\n",
    "header without a colon": b"GET / HTTP/1.1\r\nHost\r\n\r\n",
    "folded header first": b"GET / HTTP/1.1\r\n Host: localhost\r\n\r\n",
    "CR alone": b"GET / HTTP/1.1\rHost: localhost\r\r",
    "no host": b"GET / HTTP/1.1\r\n\r\n",
    "two hosts": b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil\r\n\r\n",
    "huge head": b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 1_000_000 + b"\r\n\r\n",
    "huge path": b"GET /" + b"x" * 1_000_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "many headers": b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 2000 + b"\r\n",
    "negative length": head("POST", "/v1/videos", "Content-Length: -1"),
    "length with a sign": head("POST", "/v1/videos", "Content-Length: +1"),
    "length in hex": head("POST", "/v1/videos", "Content-Length: 0x1"),
    "huge length": head("POST", "/v1/videos", "Content-Length: " + "9" * 5000),
    "two lengths": head("POST", "/v1/videos", "Content-Length: 1", "Content-Length: 2"),
    "two lengths in one": head("POST", "/v1/videos", "Content-Length: 1, 2"),
    "unknown encoding": head("POST", "/v1/videos", "Transfer-Encoding: gzip, chunked"),
    "encoding twice": head("POST", "/v1/videos", "Transfer-Encoding: chunked", "Transfer-Encoding: identity"),
    "encoding with a vertical tab": head("POST", "/v1/videos", "Transfer-Encoding: \x0bchunked"),
    "absolute address of another": b"GET http://evil.example/ HTTP/1.1\r\nHost: evil.example\r\n\r\n",
    "authority": b"CONNECT evil.example:443 HTTP/1.1\r\nHost: evil.example\r\n\r\n",
}


@pytest.mark.parametrize("content", NOT_HTTP.values(), ids=NOT_HTTP)
def test_what_is_not_http_is_refused(server: RawServer, opened: OpenedApp, content: bytes) -> None:
    with opened.unchanged():
        for answer in server.send(content):
            refused(answer, (400, 403, 404, 405, 413, 414, 431))


SMUGGLED = {
    "length and chunks": ("Content-Length: 6", "Transfer-Encoding: chunked", b"0\r\n\r\n"),
    "chunks and length": ("Transfer-Encoding: chunked", "Content-Length: 4", b"5c\r\n\r\n0\r\n\r\n"),
    "encoding in capitals": ("Content-Length: 5", "TRANSFER-ENCODING: CHUNKED", b"0\r\n\r\n"),
    "encoding with a space": ("Content-Length: 5", "Transfer-Encoding : chunked", b"0\r\n\r\n"),
    "encoding with a tab": ("Content-Length: 5", "Transfer-Encoding:\tchunked", b"0\r\n\r\n"),
    "encoding in quotes": ("Content-Length: 5", 'Transfer-Encoding: "chunked"', b"0\r\n\r\n"),
    "encoding that is none": ("Content-Length: 5", "Transfer-Encoding: xchunked", b"0\r\n\r\n"),
    "two encodings": ("Transfer-Encoding: identity", "Transfer-Encoding: chunked", b"0\r\n\r\n"),
    "lengths that differ": ("Content-Length: 0", "Content-Length: 200", b""),
    "length of nothing": ("Content-Length: 0\r\n\tContent-Length: 200", "X: y", b""),
    "size of a chunk with a sign": ("X: y", "Transfer-Encoding: chunked", b"+0\r\n\r\n"),
    "size of a chunk in capitals": ("X: y", "Transfer-Encoding: chunked", b"0x0\r\n\r\n"),
    "size of a chunk that is too long": ("X: y", "Transfer-Encoding: chunked", b"0" * 1000 + b"\r\n\r\n"),
    "chunk longer than it says": ("X: y", "Transfer-Encoding: chunked", b"1\r\nxyz\r\n0\r\n\r\n"),
    "line feeds alone": ("X: y", "Transfer-Encoding: chunked", b"0\n\n"),
}


@pytest.mark.parametrize("first, second, body", SMUGGLED.values(), ids=SMUGGLED)
def test_no_request_is_smuggled_in_a_body(
    server: RawServer, opened: OpenedApp, first: str, second: str, body: bytes
) -> None:
    """A proxy may take what follows for the body of this request; then the server must not take it for another one."""
    with opened.unchanged():
        request = head("POST", "/v1/videos", first, second, "Content-Type: application/json")
        answers = server.send(request + body + PAUSE)
        refused(answers[0], 400)
        assert len(answers) == 1, answers


def test_length_that_is_too_small_leaves_no_request(server: RawServer, opened: OpenedApp) -> None:
    with opened.unchanged():
        start = head("POST", "/v1/videos", "Content-Type: application/json", "Content-Length: 3")
        answers = server.send(start + json.dumps(SMALL).encode())
        assert [refused(answer, 400).code for answer in answers] == ["invalid_json"]


def test_length_that_is_too_large_makes_no_job(server: RawServer, opened: OpenedApp) -> None:
    body = json.dumps(SMALL).encode()
    with opened.unchanged():
        start = head("POST", "/v1/videos", "Content-Type: application/json", f"Content-Length: {len(body) + 1}")
        server.send(start + body, hangs_up=True)
        (answer,) = server.send(start + body)
        refused(answer, 408, "too_slow")


def test_body_of_a_refused_request_is_not_asked_for(server: RawServer) -> None:
    lines = ("Expect: 100-continue", "Content-Length: 1000000", "Origin: https://evil.example", "Connection: close")
    (answer,) = server.send(head("POST", "/v1/videos", *lines))
    refused(answer, 403, "cross_site")
    answers = server.send(head("POST", "/v1/uploads", *lines[:2]))
    assert [answer.status for answer in answers] == [100, 408]


def test_damaged_chunk_ends_an_upload(server: RawServer, opened: OpenedApp) -> None:
    start = head("POST", "/v1/uploads", "Transfer-Encoding: chunked", "Content-Type: image/png")
    with opened.unchanged():
        answers = server.send(start, b"c\r\n\x89PNG\r\n\x1a\n\0\0\0\r\r\n", b"zz\r\n", pause=0.1)
        assert [answer.status for answer in answers] in ([400], [])


@pytest.mark.parametrize("upgrade", ["websocket", "h2c", "TLS/1.0, HTTP/1.1"])
def test_connection_is_not_upgraded(server: RawServer, upgrade: str) -> None:
    lines = ("Connection: Upgrade", f"Upgrade: {upgrade}", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==")
    (answer,) = server.send(head("GET", "/v1/events/x", *lines, "Sec-WebSocket-Version: 13"))
    assert answer.status == 404


RANGES = (
    *("bytes=0-0,-1", "bytes=-1", "bytes=6-", "bytes=0-999999999999", "bytes=-999999999999", "bytes=5-2", "bytes=7-"),
    *(
        "bytes=9-9",
        "bytes=--1",
        "bytes=a-b",
        "bytes=",
        "bytes",
        "lines=0-1",
        "bytes=0-0;x",
        "bytes=" + "9" * 4000 + "-",
    ),
    *("bytes=" + "0-0," * 2000 + "1-1", "bytes=" + "0-," * 90 + "0-", "bytes=0-1,0-1,0-1", "bytes=1-0,0-1", "bytes=٣-"),
)


@pytest.mark.parametrize("value", RANGES)
def test_ranges_that_lie_are_harmless(server: RawServer, opened: OpenedApp, value: str) -> None:
    video_id = opened.add_completed()
    raw = value.encode().decode("latin-1")
    (answer,) = server.send(head("GET", f"/v1/videos/{video_id}/content", f"Range: {raw}", "Connection: close"))
    assert answer.status in (200, 206, 400, 416), answer
    assert len(answer.body) < 2000
    if answer.status >= 400:
        assert answer.code == "invalid_range"
        assert answer.header("content-range") == "bytes */7"
    elif answer.status == 200:
        assert answer.body == b"a video"


def test_streams_of_a_client_are_bounded(opened: OpenedApp, server: RawServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opened.state.streams, "_max_streams", 2)
    with ExitStack() as stack:
        for _ in range(2):
            stream = stack.enter_context(server.connect())
            stream.sendall(head("GET", "/v1/events"))
            assert stream.recv(100).startswith(b"HTTP/1.1 200")
        (answer,) = server.send(head("GET", "/v1/events", "Connection: close"))
        assert refused(answer, 429, "too_many_streams").header("retry-after") == "5"
    wait_until(lambda: not opened.state.streams._open[""])
    (answer,) = server.send(head("GET", "/v1/events?wait=false", "Connection: close"))
    assert answer.status == 200


def test_files_that_a_process_may_open_bound_its_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")
    limits, asked = [(1024, 1024)], []
    monkeypatch.setattr(resource, "getrlimit", lambda kind: limits[0])
    monkeypatch.setattr(resource, "setrlimit", lambda kind, pair: asked.append(pair))
    assert connections.allowed_connections(1000) == (1024 - connections.SPARE_FILES) // 2
    limits[0] = (1024, 4096)
    assert connections.allowed_connections(1000) == 1000
    assert asked == [(1024, 1024), (2000 + connections.SPARE_FILES, 4096)]
    limits[0] = (100, 100)
    assert connections.allowed_connections(1000) == 1
    limits[0] = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    assert connections.allowed_connections(1000) == 1000


def test_answers_are_sent_at_once() -> None:
    """asyncio turns Nagle's algorithm off where a socket names TCP; else each answer waits 40 ms for an ACK."""
    with _listen("127.0.0.1", 0) as listener:
        assert listener.proto == socket.IPPROTO_TCP
