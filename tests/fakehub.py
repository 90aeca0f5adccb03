"""A hub on this machine: a server that answers huggingface_hub's requests for a model like the real one."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

COMMIT = "c" * 40
NO_HEADERS: Mapping[str, str] = {}
CHUNK = 256  # bytes that huggingface_hub writes at once; an incomplete chunk is lost
LFS_SUFFIXES = (".safetensors", ".gguf")  # the real hub stores these with git-lfs too


def is_lfs(name: str) -> bool:
    return name.endswith(LFS_SUFFIXES)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def digest(name: str, content: bytes) -> str:
    return sha256(content) if is_lfs(name) else git_sha1(content)


@dataclass
class FakeHub:
    """The server's files, its faults, and its log.

    Args:
        repos: repository -> file -> content.
        corrupted_files: file -> content that is sent instead.
        truncations: file -> number of responses that end half-way.
        hangs_after_cut: send no response after a truncated one.
        http_error: HTTP status and the hub's error code, for every request.
        is_silent: send no response.
        sent_files: (file, first byte) of every file that was sent, in order.
    """

    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    corrupted_files: dict[str, bytes] = field(default_factory=dict)
    truncations: dict[str, int] = field(default_factory=dict)
    hangs_after_cut: bool = False
    http_error: tuple[int, str] | None = None
    is_silent: bool = False
    sent_files: list[tuple[str, int]] = field(default_factory=list)

    def revive(self) -> None:
        self.hangs_after_cut = self.is_silent = False


class HubHandler(BaseHTTPRequestHandler):
    """Answers one request. Large files are redirected to another address, like by the real hub."""

    hub: FakeHub

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub = self.hub
        path = unquote(urlsplit(self.path).path).strip("/")
        if hub.is_silent:
            return self.hang_up()
        if hub.http_error is not None:
            return self.send(b"", status=hub.http_error[0], headers={"X-Error-Code": hub.http_error[1]})
        root, _, rest = path.partition("/")
        if root == "api":
            return self.describe(rest.removeprefix("models/"))
        if root == "store":
            return self.send_file(*self.find_by_sha256(rest))
        repo, _, file = path.partition("/resolve/")
        return self.resolve(repo, file.partition("/")[2])

    def describe(self, path: str) -> None:
        """Sends the description of a repository, or its tree."""
        repo = next((repo for repo in self.hub.repos if path == repo or path.startswith(f"{repo}/")), None)
        if repo is None:
            return self.send(b"", status=404, headers={"X-Error-Code": "RepoNotFound"})
        files = self.hub.repos[repo].items()
        if path.startswith(f"{repo}/tree/"):
            return self.send_json([{"type": "file", "path": name, **file_info(name, data)} for name, data in files])
        siblings = [{"rfilename": name, **file_info(name, data)} for name, data in files]
        return self.send_json({"id": repo, "modelId": repo, "sha": COMMIT, "siblings": siblings})

    def resolve(self, repo: str, name: str) -> None:
        content = self.hub.repos.get(repo, {}).get(name)
        headers = {"X-Repo-Commit": COMMIT}
        if content is None:
            code = "EntryNotFound" if repo in self.hub.repos else "RepoNotFound"
            return self.send(b"", status=404, headers={**headers, "X-Error-Code": code})
        headers["ETag"] = f'"{digest(name, content)}"'
        if not is_lfs(name):
            return self.send_file(name, content, headers)
        linked = {"X-Linked-ETag": headers["ETag"], "X-Linked-Size": str(len(content))}
        port = self.server.server_address[1]
        location = (
            f"http://localhost:{port}/store/{sha256(content)}"  # huggingface_hub downloads from another host only
        )
        return self.send(b"", status=302, headers={**headers, **linked, "Location": location})

    def find_by_sha256(self, sha: str) -> tuple[str, bytes]:
        files = [pair for files in self.hub.repos.values() for pair in files.items()]
        return next((name, content) for name, content in files if sha256(content) == sha)

    def send_file(self, name: str, content: bytes, headers: Mapping[str, str] = NO_HEADERS) -> None:
        """Sends the requested bytes: all, or from the start of a range."""
        hub, content = self.hub, self.hub.corrupted_files.get(name, content)
        begin = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        if self.command == "GET":
            hub.sent_files.append((name, begin))
        truncate_at = None
        if self.command == "GET" and hub.truncations.get(name):
            hub.truncations[name] -= 1
            hub.is_silent = hub.hangs_after_cut
            truncate_at = (len(content) - begin) // 2
        content_range = {"Content-Range": f"bytes {begin}-{len(content) - 1}/{len(content)}"} if begin else {}
        status = 206 if begin else 200
        self.send(content[begin:], status=status, headers={**headers, **content_range}, truncate_at=truncate_at)

    def send_json(self, data: Any) -> None:
        self.send(json.dumps(data).encode())

    def send(
        self, body: bytes, *, status: int = 200, headers: Mapping[str, str] = NO_HEADERS, truncate_at: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:truncate_at])

    def hang_up(self) -> None:
        self.close_connection = True


def file_info(name: str, content: bytes) -> dict[str, Any]:
    """Returns the properties of a file, under the keys of `siblings` and of a tree."""
    info: dict[str, Any] = {"size": len(content), "blobId": git_sha1(content), "oid": git_sha1(content)}
    if is_lfs(name):
        info["lfs"] = {"sha256": sha256(content), "oid": sha256(content), "size": len(content), "pointerSize": 130}
    return info


@contextmanager
def serve_fake_hub(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[FakeHub]:
    """Serves an empty hub, with an empty cache instead of this machine's."""
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (HubHandler,), {"hub": hub}))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in {
        "ENDPOINT": address,
        "HUGGINGFACE_CO_URL_TEMPLATE": template,
        "HF_HUB_OFFLINE": False,
        "HF_HUB_CACHE": str(cache),
        "DOWNLOAD_CHUNK_SIZE": CHUNK,
    }.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # huggingface_hub waits a second before a retry
    disable_progress_bars()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        enable_progress_bars()
