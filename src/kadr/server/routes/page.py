"""The page in the browser: static files, which use the API as any other client does."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from types import MappingProxyType

from fastapi import APIRouter, Request, Response

from kadr.server.errors import ApiError
from kadr.server.gate import OPEN_PREFIX

INDEX = "index.html"
_MEDIA_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
# Nothing from elsewhere, no script or style in the page itself, and no other site that frames it. Frames of videos are
# drawn from blobs.
_POLICY = (
    "default-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; object-src 'none'; base-uri 'none'; "
    "form-action 'self'; frame-ancestors 'none'"
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",  # asked for again each time, and answered with 304: a new version is there at once
}
router = APIRouter(include_in_schema=False)


@dataclass(frozen=True)
class PageFile:
    """A file of the page. etag: differs where the content does."""

    content: bytes
    media_type: str
    etag: str


@router.api_route("/", methods=["GET", "HEAD"])
async def get_page(request: Request) -> Response:
    """Serves the page itself, which needs no token: it asks for one."""
    return _answer(request, INDEX)


@router.api_route(OPEN_PREFIX + "{name:path}", methods=["GET", "HEAD"])
async def get_page_file(request: Request, name: str) -> Response:
    """Serves a script, a style sheet or an image of the page."""
    return _answer(request, name)


@cache
def page_files() -> MappingProxyType[str, PageFile]:
    """Returns all files of the page by their paths, such as "js/main.js"."""
    found: dict[str, PageFile] = {}

    def collect(folder: Traversable, prefix: str) -> None:
        for entry in folder.iterdir():
            if entry.is_dir():
                collect(entry, f"{prefix}{entry.name}/")
            elif (media_type := _MEDIA_TYPES.get(entry.name.rpartition(".")[2])) is not None:
                content = entry.read_bytes()
                found[prefix + entry.name] = PageFile(content, media_type, f'"{hashlib.sha256(content).hexdigest()}"')

    collect(files("kadr.server") / "page", "")
    return MappingProxyType(found)


def _answer(request: Request, name: str) -> Response:
    if (file := page_files().get(name)) is None:
        raise ApiError(404, "there is nothing at this address. The page is at /.", code="not_found")
    headers = {**_HEADERS, "etag": file.etag}
    if request.headers.get("if-none-match") == file.etag:
        return Response(status_code=304, headers=headers)
    return Response(file.content, media_type=file.media_type, headers=headers)
