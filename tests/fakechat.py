"""A chat endpoint on this machine: a real HTTP server that answers as it is told to, and notes what it was asked."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

PARAGRAPH = (
    "A small red fox trots through fresh snow from left to right, lifting its paws high and turning its ears, while "
    "the camera follows at its height and the low winter sun throws long blue shadows."
)


class Asked(NamedTuple):
    """One request, as it came."""

    method: str
    path: str
    headers: dict[str, str]
    body: dict[str, Any]

    @property
    def system(self) -> str:
        return self.body["messages"][0]["content"]

    @property
    def parts(self) -> list[dict[str, Any]]:
        """What the user's message holds."""
        content = self.body["messages"][1]["content"]
        return content if isinstance(content, list) else [{"type": "text", "text": content}]

    @property
    def words(self) -> str:
        return "\n".join(part["text"] for part in self.parts if part["type"] == "text")

    @property
    def pictures(self) -> list[str]:
        return [part["image_url"]["url"] for part in self.parts if part["type"] == "image_url"]


@dataclass(frozen=True)
class Reply:
    """An answer.

    Args:
        wait: seconds before it begins.
        drip: seconds between its bytes.
        drip_headers: likewise, and they never end.
        only: the bytes after which the server hangs up; None: all.
        raw: bytes that are sent instead of HTTP.
    """

    body: bytes = b""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    wait: float = 0.0
    drip: float = 0.0
    drip_headers: float = 0.0
    only: int | None = None
    raw: bytes | None = None


def said(content: Any, finish: str = "stop", **message: Any) -> Reply:
    """A chat completion."""
    whole = {"role": "assistant", "content": content, **message}
    return told({"id": "1", "choices": [{"index": 0, "finish_reason": finish, "message": whole}]})


def told(data: Any, status: int = 200) -> Reply:
    """Any JSON."""
    return Reply(json.dumps(data).encode(), status, {"Content-Type": "application/json"})


def refused(status: int, message: str) -> Reply:
    """An error as OpenAI words it."""
    return told({"error": {"message": message, "type": "invalid_request_error"}}, status)


@dataclass
class FakeChat:
    """What the server answers, and what it was asked.

    Args:
        reply: an answer for everything, or what makes one of each question.
        asked: in order.
    """

    url: str
    reply: Reply | Callable[[Asked], Reply] = field(default_factory=lambda: said(PARAGRAPH))
    asked: list[Asked] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)


class Answer(BaseHTTPRequestHandler):
    chat: FakeChat

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.do_POST()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        asked = Asked(self.command, self.path, dict(self.headers), json.loads(body) if body else {})
        self.chat.asked.append(asked)
        reply = self.chat.reply
        with suppress(OSError):  # who asked does not wait any longer
            self.answer(reply if isinstance(reply, Reply) else reply(asked))

    def answer(self, reply: Reply) -> None:
        self.chat.over.wait(reply.wait)
        if reply.raw is not None:
            self.wfile.write(reply.raw)
            return
        self.send_response(reply.status)
        for name, value in {"Content-Length": str(len(reply.body)), **reply.headers}.items():
            self.send_header(name, value)
        if reply.drip_headers:
            self.flush_headers()
        while reply.drip_headers and not self.chat.over.wait(reply.drip_headers):
            self.wfile.write(b"X-More: 1\r\n")
        self.end_headers()
        if not reply.drip:
            self.wfile.write(reply.body[: reply.only])
            return
        for byte in reply.body:
            self.wfile.write(bytes([byte]))
            if self.chat.over.wait(reply.drip):
                return


@contextmanager
def serving() -> Iterator[FakeChat]:
    """A server that is up as long as the block."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    chat = FakeChat(f"http://127.0.0.1:{server.server_port}/v1")
    server.RequestHandlerClass = type("BoundAnswer", (Answer,), {"chat": chat})
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield chat
    finally:
        chat.over.set()
        server.shutdown()
        server.server_close()


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Fails where the block takes longer."""
    began = time.monotonic()
    yield
    assert time.monotonic() - began < seconds
