"""Routes of files: videos, thumbnails, spritesheets and previews."""

from __future__ import annotations

import os
from typing import Annotated, Literal

from fastapi import APIRouter, Header, Query, Response
from fastapi.responses import FileResponse
from starlette.types import Message, Receive, Scope, Send

from kadr.jobs.engine_maker import SPRITESHEET_FILE, THUMBNAIL_FILE, VIDEO_FILE
from kadr.jobs.job import COMPLETED, FAILED, is_job_id
from kadr.request.inputs import MAX_CLIP_FRAMES
from kadr.server.errors import ApiError
from kadr.server.inputs.media_sources import find_source, require_file
from kadr.server.routes import documents
from kadr.server.routes.views import SPRITESHEET, THUMBNAIL, VIDEO
from kadr.server.state import Sender, ServerState, State

MAX_TAGS_CHARACTERS = 2000
# A medium never changes; but a browser may be used with another token.
THUMBNAIL_HEADERS = {"cache-control": "private, max-age=86400", "vary": "Authorization"}
FILE_HEADERS = {"cache-control": "private, no-store", "x-content-type-options": "nosniff"}
_FILES = {
    VIDEO: (VIDEO_FILE, "video/mp4"),
    THUMBNAIL: (THUMBNAIL_FILE, "image/jpeg"),
    SPRITESHEET: (SPRITESHEET_FILE, "image/jpeg"),
}
router = APIRouter(prefix="/v1")


@router.head("/videos/{video_id}/content", include_in_schema=False)
@router.get("/videos/{video_id}/content", **documents.CONTENT)
async def get_content(
    state: State, client: Sender, video_id: str, variant: Literal["video", "thumbnail", "spritesheet"] = "video"
) -> Response:
    """Fetches the file of a completed video, its thumbnail or its spritesheet; any range of bytes."""
    job = state.queue.store.get(video_id, client.scope)
    if job.status == FAILED:
        raise ApiError(400, f"{job.id} failed: it has no content.", code="video_failed")
    if job.status != COMPLETED:
        raise ApiError(
            400, f"{job.id} is {job.status}; its content comes when it is completed.", code="video_not_ready"
        )
    return answer_with_file(state, job.id, variant)


@router.get("/videos/{video_id}/preview", **documents.PREVIEW_FILE)
async def get_preview(state: State, client: Sender, video_id: str) -> Response:
    """Fetches the newest preview of a video in progress: an animated WebP, a quarter of its size."""
    job = state.queue.store.get(video_id, client.scope)
    live = state.queue.supervisor.live.get(job.id)
    if live is None or live.preview is None:
        raise ApiError(404, f"{job.id} has no preview now.", code="preview_not_found")
    return Response(live.preview, media_type="image/webp", headers=FILE_HEADERS)


@router.get("/thumbnails/{reference:path}", **documents.SMALL_IMAGE)
async def get_thumbnail(
    state: State,
    client: Sender,
    reference: str,
    frame: Annotated[int, Query(ge=0, le=MAX_CLIP_FRAMES)] = 0,
    if_none_match: Annotated[str | None, Header(max_length=MAX_TAGS_CHARACTERS)] = None,
) -> Response:
    """Fetches a JPEG of an upload, a completed video or a medium of a video: of its first frame, or of `frame`."""
    source = find_source(state, client, reference, 0)
    headers = {**THUMBNAIL_HEADERS, "etag": f'"{source.digest}-{frame}"'}
    if headers["etag"] in (if_none_match or ""):
        return Response(status_code=304, headers=headers)
    path, number = source.path, None if source.frames is None else frame
    if is_job_id(reference) and frame == 0:
        path, number = path.with_name(THUMBNAIL_FILE), None
    jpeg = await state.frames.read_thumbnail(require_file(path, reference), number, client.name)
    return Response(jpeg, media_type="image/jpeg", headers=headers)


def answer_with_file(state: ServerState, job_id: str, variant: str) -> FileResponse:
    """Returns the answer with a file of a completed video.

    Raises:
        ApiError: it is gone.
    """
    name, kind = _FILES[variant]
    path = state.queue.store.folders.output(job_id) / name
    try:
        found = os.stat(path)
    except OSError as error:
        message = f"the {variant} of {job_id} is no longer on the server's disk."
        raise ApiError(404, message, code="content_not_found") from error
    return MediaResponse(
        path,
        media_type=kind,
        filename=f"{job_id}{path.suffix}",
        headers=FILE_HEADERS,
        stat_result=found,
        content_disposition_type="inline",
    )


class MediaResponse(FileResponse):
    """An answer with a file, or a range of it; what is wrong with a range is said in the envelope."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal: ApiError | None = None

        async def send_unless_refused(message: Message) -> None:
            nonlocal refusal
            if message["type"] == "http.response.start" and message["status"] >= 400:
                length = {"content-range": f"bytes */{self.headers['content-length']}"}
                text = f"the range is not one of the {self.headers['content-length']} bytes of the file."
                refusal = ApiError(message["status"], text, code="invalid_range", param="Range", headers=length)
            elif refusal is None:
                await send(message)

        await super().__call__(scope, receive, send_unless_refused)
        if refusal is not None:
            await refusal.response()(scope, receive, send)
