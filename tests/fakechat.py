"""A chat endpoint on this machine: a real HTTP server that sends a set reply and records its requests."""

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


class ChatRequest(NamedTuple):
    """A request, as received."""

    method: str
    path: str
    headers: dict[str, str]
    body: dict[str, Any]

    @property
    def system(self) -> str:
        return self.body["messages"][0]["content"]

    @property
    def content_parts(self) -> list[dict[str, Any]]:
        """Parts of the user's message: texts and images."""
        content = self.body["messages"][1]["content"]
        return content if isinstance(content, list) else [{"type": "text", "text": content}]

    @property
    def text(self) -> str:
        return "\n".join(part["text"] for part in self.content_parts if part["type"] == "text")

    @property
    def images(self) -> list[str]:
        return [part["image_url"]["url"] for part in self.content_parts if part["type"] == "image_url"]


@dataclass(frozen=True)
class Reply:
    """A reply of the server.

    Args:
        delay_seconds: seconds before the reply begins.
        byte_interval: seconds between two bytes of the body.
        header_interval: seconds between two headers, which never end.
        truncate_at: bytes of the body after which the server hangs up; None: all are sent.
        raw_bytes: bytes that are sent instead of HTTP.
    """

    body: bytes = b""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    delay_seconds: float = 0.0
    byte_interval: float = 0.0
    header_interval: float = 0.0
    truncate_at: int | None = None
    raw_bytes: bytes | None = None


def chat_completion(content: Any, finish: str = "stop", **message: Any) -> Reply:
    """Returns a chat completion."""
    assistant = {"role": "assistant", "content": content, **message}
    return json_reply({"id": "1", "choices": [{"index": 0, "finish_reason": finish, "message": assistant}]})


def json_reply(data: Any, status: int = 200) -> Reply:
    """Returns a reply with any JSON."""
    return Reply(json.dumps(data).encode(), status, {"Content-Type": "application/json"})


def error_reply(status: int, message: str) -> Reply:
    """Returns an error in OpenAI's format."""
    return json_reply({"error": {"message": message, "type": "invalid_request_error"}}, status)


@dataclass
class FakeChat:
    """The reply of the server, and the requests it received.

    Args:
        reply: the same reply for every request, or a function of the request.
        requests: in order.
    """

    url: str
    reply: Reply | Callable[[ChatRequest], Reply] = field(default_factory=lambda: chat_completion(PARAGRAPH))
    requests: list[ChatRequest] = field(default_factory=list)
    closing: threading.Event = field(default_factory=threading.Event)


class ChatHandler(BaseHTTPRequestHandler):
    chat: FakeChat

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.do_POST()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        request = ChatRequest(self.command, self.path, dict(self.headers), json.loads(body) if body else {})
        self.chat.requests.append(request)
        reply = self.chat.reply
        with suppress(OSError):  # the client has hung up
            self.send_reply(reply if isinstance(reply, Reply) else reply(request))

    def send_reply(self, reply: Reply) -> None:
        self.chat.closing.wait(reply.delay_seconds)
        if reply.raw_bytes is not None:
            self.wfile.write(reply.raw_bytes)
            return
        self.send_response(reply.status)
        for name, value in {"Content-Length": str(len(reply.body)), **reply.headers}.items():
            self.send_header(name, value)
        if reply.header_interval:
            self.flush_headers()
        while reply.header_interval and not self.chat.closing.wait(reply.header_interval):
            self.wfile.write(b"X-More: 1\r\n")
        self.end_headers()
        if not reply.byte_interval:
            self.wfile.write(reply.body[: reply.truncate_at])
            return
        for byte in reply.body:
            self.wfile.write(bytes([byte]))
            if self.chat.closing.wait(reply.byte_interval):
                return


@contextmanager
def serve_fake_chat() -> Iterator[FakeChat]:
    """Runs the server until the block ends."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), ChatHandler)
    chat = FakeChat(f"http://127.0.0.1:{server.server_port}/v1")
    server.RequestHandlerClass = type("BoundHandler", (ChatHandler,), {"chat": chat})
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield chat
    finally:
        chat.closing.set()
        server.shutdown()
        server.server_close()


@contextmanager
def assert_faster_than(seconds: float) -> Iterator[None]:
    """Fails if the block takes longer."""
    began = time.monotonic()
    yield
    assert time.monotonic() - began < seconds
