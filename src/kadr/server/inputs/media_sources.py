"""Finds the media that a request names: uploads, videos and their media, data: URLs, and files of its own form."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from anyio import to_thread

from kadr.jobs.engine_maker import VIDEO_FILE
from kadr.jobs.folders import MEDIA_FOLDER, storage_error
from kadr.jobs.job import COMPLETED, is_job_id
from kadr.media.known_headers import KnownHeader
from kadr.quoting import quote
from kadr.server.auth import Client
from kadr.server.errors import ApiError
from kadr.server.inputs.bodies import ParsedBody
from kadr.server.inputs.uploads import decode_data_url, is_upload_id
from kadr.server.schema import MediaReference
from kadr.server.state import ServerState

_FACTS = ("width", "height", "upright_width", "upright_height", "frames", "fps", "is_cut_off")


@dataclass(frozen=True)
class MediaSource:
    """A file that a job will have a copy of.

    Args:
        path: of the file now.
        name: that it will have in the job's folder.
        digest: tells it from others: a hash of its content, or the id of a video.
        width, height, upright_width, upright_height, frames, fps, is_cut_off: of its header, as `MediaFacts`.
    """

    path: Path
    name: str
    digest: str
    width: int
    height: int
    upright_width: int
    upright_height: int
    frames: int | None = None
    fps: float | None = None
    is_cut_off: bool = False

    @property
    def header(self) -> KnownHeader:
        """The header, for a resolver that must not open the file."""
        fps = None if self.fps is None else Fraction(self.fps)
        return KnownHeader(
            self.width, self.height, self.upright_width, self.upright_height, self.frames, fps, self.is_cut_off
        )


async def reference_id(state: ServerState, client: Client, body: ParsedBody, name: str, reference: Any) -> str | None:
    """Returns the id of a medium: of a file of the form, or of what a reference stands for.

    A file and a data: URL are there under their id while the block of the body runs.

    Raises:
        ApiError: it names nothing, or several things.
    """
    if (file := body.files.get(name)) is not None:
        if reference is not None:
            raise ApiError(400, f"{name} is given twice.", code="invalid_body", param=name)
        return (await file.check()).id
    if isinstance(reference, MediaReference):
        named = [value for value in (reference.file_id, reference.image_url, reference.id) if value is not None]
        if len(named) != 1:
            raise ApiError(400, f"{name} must have one of file_id, image_url and id.", code="invalid_value", param=name)
        if reference.image_url is None:
            return named[0]
        reference = reference.image_url
    elif reference is None or ":" not in reference:
        return reference
    content = await to_thread.run_sync(decode_data_url, reference)
    upload = body.hold(state.uploads.begin(client.name))
    await upload.write(content)
    return (await upload.check()).id


def find_source(state: ServerState, client: Client, reference: str, index: int) -> MediaSource:
    """Returns the file of an id: an upload's, a completed video's, or `VIDEO/N`, the N-th medium of a video.

    Raises:
        ApiError: there is none, it is another client's, or the video is not completed.
    """
    if is_upload_id(reference):
        upload = state.uploads.get(reference, client.scope)
        return MediaSource(
            state.uploads.path(upload),
            f"{MEDIA_FOLDER}/{index}{upload.suffix}",
            upload.sha256,
            **{name: getattr(upload, name) for name in _FACTS},
        )
    job_id, slash, number = reference.partition("/")
    if not is_job_id(job_id):
        raise ApiError(404, f"there is no upload or video {quote(reference)}.", code="media_not_found")
    job = state.queue.store.get(job_id, client.scope)
    if slash:
        return _medium_of(state, job_id, job.labels.get("media", ()), number, index)
    if job.status != COMPLETED or job.result is None:
        raise ApiError(400, f"{job_id} is {job.status}; only a completed video can be used.", code="video_not_ready")
    width, height = map(int, job.result["size"].split("x"))
    path = state.queue.store.folders.output(job_id) / VIDEO_FILE
    suffix = Path(VIDEO_FILE).suffix
    facts = (width, height, width, height, job.result["frames"], job.result["fps"])
    return MediaSource(path, f"{MEDIA_FOLDER}/{index}{suffix}", job_id, *facts)


def require_file(path: Path, reference: str) -> Path:
    """Returns the file of an id, or of its thumbnail, if it is there.

    Raises:
        ApiError: it is gone.
    """
    if not path.is_file():
        message = f"the file of {reference} is no longer on the server's disk."
        raise ApiError(404, message, code="content_not_found")
    return path


def _medium_of(
    state: ServerState, job_id: str, media: list[Mapping[str, object]], number: str, index: int
) -> MediaSource:
    if not number.isdecimal() or len(number) > 3 or int(number) >= len(media):
        raise ApiError(404, f"{job_id} has no medium {quote(number)}.", code="media_not_found")
    facts = dict(media[int(number)])
    path = state.queue.store.folders.path(job_id) / str(facts.pop("name"))
    return MediaSource(path, f"{MEDIA_FOLDER}/{index}{path.suffix}", **facts)  # type: ignore[arg-type]


def describe_source(source: MediaSource) -> dict[str, object]:
    """Returns what a job stores of a medium."""
    return {name: getattr(source, name) for name in ("name", "digest", *_FACTS)}


def copy_sources(sources: list[MediaSource], folder: Path) -> None:
    """Puts the media of a job into its folder: as links to the same bytes where the disk has them.

    Raises:
        ApiError: its client has deleted one meanwhile.
        StorageError: the disk is full.
    """
    try:
        for source in sources:
            target = folder / source.name
            target.parent.mkdir(exist_ok=True)
            try:
                os.link(source.path, target)
            except OSError:  # another disk, or one without links
                shutil.copyfile(source.path, target)
    except OSError as error:
        if not all(source.path.exists() for source in sources):
            message = "a medium of the request was deleted before it was accepted. Upload it again."
            raise ApiError(404, message, code="media_not_found") from error
        raise storage_error(folder, error) from error
