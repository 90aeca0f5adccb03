"""Calls the application in this process, as uvicorn does, with requests that no client library would send."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from tests.server.answers import Answer, check_answer

HOST = "127.0.0.1:8000"
MAX_SECONDS = 20.0
Body = bytes | Iterable[bytes]


class EndOfPatienceError(AssertionError):
    """The application did not answer in time."""


@dataclass
class AppClient:
    """Sends requests to an application.

    Args:
        app: the application.
        loop: that runs it.
        roots: folders of the server that nothing may name.
    """

    app: Any
    loop: asyncio.AbstractEventLoop
    roots: Collection[str] = ()

    def __call__(
        self,
        method: str,
        target: str | bytes,
        *,
        token: str | None = None,
        json_body: Any = None,
        body: Body = b"",
        headers: Mapping[str, str] | Sequence[tuple[str, str]] = (),
        host: str | None = HOST,
        is_gone: bool = False,
        stops: bool = False,
        max_seconds: float = MAX_SECONDS,
    ) -> Answer:
        """Returns the answer to a request, once it has been checked.

        Args:
            json_body: sent instead of `body`.
            body: the whole, or its chunks, which may have no end: they are fetched as the application reads them.
            is_gone: the client hangs up when it has sent its body, which is not complete.
            stops: it sends nothing further, and does not hang up.
        """
        fields = list(headers.items() if isinstance(headers, Mapping) else headers)
        if json_body is not None:
            body = json.dumps(json_body).encode()
            fields.append(("content-type", "application/json"))
        fields += [("host", host)] if host is not None else []
        fields += [("authorization", f"Bearer {token}")] if token is not None else []
        chunks = iter([body] if isinstance(body, bytes) else body)
        call = self.call(method, target, fields, chunks, is_gone, stops)
        try:
            answer = self.loop.run_until_complete(asyncio.wait_for(call, max_seconds))
        except asyncio.TimeoutError as error:
            raise EndOfPatienceError(f"{method} {target!r} was not answered in {max_seconds} s") from error
        return check_answer(answer, self.roots)

    async def call(
        self,
        method: str,
        target: str | bytes,
        fields: list[tuple[str, str]],
        chunks: Iterator[bytes],
        is_gone: bool = False,
        stops: bool = False,
    ) -> Answer:
        """Returns the answer to a request, in the loop: for several at the same time. fields: all of its headers."""
        scope, received = _scope(method, target, fields), _Receiver(chunks, is_gone, stops)
        messages: list[Any] = []

        async def send(message: Any) -> None:
            messages.append(message)
            if message["type"] == "http.response.body" and not message.get("more_body"):
                received.answered.set()

        await self.app(scope, received.receive, send)
        start = next(message for message in messages if message["type"] == "http.response.start")
        content = b"".join(message.get("body", b"") for message in messages if message["type"] == "http.response.body")
        headers = [(name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in start["headers"]]
        return Answer(start["status"], headers, content)


class _Receiver:
    """A body on its way to the application."""

    def __init__(self, chunks: Iterator[bytes], is_gone: bool, stops: bool) -> None:
        self._chunks, self._is_gone, self._stops = chunks, is_gone, stops
        self._next: bytes | None = next(chunks, b"")
        self.answered = asyncio.Event()

    async def receive(self) -> dict[str, Any]:
        if self._next is None:
            if not self._is_gone:
                await self.answered.wait()
            return {"type": "http.disconnect"}
        chunk, self._next = self._next, next(self._chunks, None)
        is_last = self._next is None and not (self._is_gone or self._stops)
        return {"type": "http.request", "body": chunk, "more_body": not is_last}


def _scope(method: str, target: str | bytes, fields: list[tuple[str, str]]) -> dict[str, Any]:
    raw = target if isinstance(target, bytes) else target.encode("ascii")
    path, _, query = raw.partition(b"?")
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": unquote(path.decode("ascii")),
        "raw_path": path,
        "query_string": query,
        "root_path": "",
        "headers": [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in fields],
        "client": ("127.0.0.1", 54321),
        "server": ("127.0.0.1", 8000),
        "state": {},
    }


def multipart(
    *parts: tuple[str, bytes] | tuple[str, bytes, str], boundary: str = "boundary"
) -> tuple[bytes, dict[str, str]]:
    """Returns a multipart body and its headers. parts: (name, content), or (name, content, file name)."""
    body = b""
    for name, content, *file in parts:
        file_name = f'; filename="{file[0]}"' if file else ""
        body += f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"{file_name}\r\n\r\n'.encode()
        body += content + b"\r\n"
    return body + f"--{boundary}--\r\n".encode(), {"content-type": f"multipart/form-data; boundary={boundary}"}


Send = Callable[..., Answer]
