"""`UploadStore`: images and clips that clients send, until they expire. What a client calls them is not used."""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import secrets
import shutil
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from anyio import to_thread

from kadr.atomic_write import write_json
from kadr.errors import CheckpointError
from kadr.jobs.folders import storage_error
from kadr.json_reader import parse_json
from kadr.quoting import quote
from kadr.regular_file import read_text
from kadr.server.errors import ApiError
from kadr.server.media_check import MediaChecker, sniff

UPLOAD_PREFIX, _ID_BYTES = "upload_", 16
SIDECAR, MEDIA_STEM = "upload.json", "media"
MAX_KEPT = 500  # of one client
_HEAD_BYTES = 12


@dataclass(frozen=True)
class StoredUpload:
    """An upload on disk. Facts as `MediaFacts`; suffix: of its file."""

    id: str
    owner: str
    kind: str
    width: int
    height: int
    frames: int | None
    fps: float | None
    bytes: int
    sha256: str
    created_at: float
    suffix: str


class UploadStore:
    """The uploads of a server.

    Args:
        folder: with a folder for each; made where it is missing.
        checker: looks at their headers.
        max_bytes: of one upload.
        max_age: seconds that one is kept.
        clock: seconds since 1970.
    """

    def __init__(
        self,
        folder: Path,
        checker: MediaChecker,
        *,
        max_bytes: int,
        max_age: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.folder, self._checker = folder, checker
        self.max_bytes, self.max_age, self._clock = max_bytes, max_age, clock

    async def receive(self, owner: str, chunks: AsyncIterator[bytes]) -> StoredUpload:
        """Stores what a client sends, and looks at its header. What is incomplete or refused leaves nothing.

        Raises:
            ApiError: it is too large, empty, not a kind that kadr reads, or the client has too many.
            MediaError: its header is damaged, or exceeds a limit.
            StorageError: the disk is full.
        """
        if len(self.find_all(owner)) >= MAX_KEPT:
            raise ApiError(
                429, f"you have {MAX_KEPT} uploads, as many as are kept. Delete some.", code="too_many_uploads"
            )
        upload_id = UPLOAD_PREFIX + secrets.token_hex(_ID_BYTES)
        folder = self.folder / upload_id
        try:
            folder.mkdir(parents=True)
            return await self._write(folder, owner, upload_id, chunks)
        except BaseException as error:
            shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, OSError | CheckpointError):
                raise storage_error(folder, error) from error
            raise

    async def _write(self, folder: Path, owner: str, upload_id: str, chunks: AsyncIterator[bytes]) -> StoredUpload:
        digest, num_bytes, head = hashlib.sha256(), 0, b""
        part = folder / f"{MEDIA_STEM}.part"
        with part.open("wb") as file:
            async for chunk in chunks:
                num_bytes += len(chunk)
                if num_bytes > self.max_bytes:
                    raise ApiError(413, f"the file has more than {self.max_bytes:,} bytes.", code="too_large")
                head = head if len(head) >= _HEAD_BYTES else (head + chunk)[:_HEAD_BYTES]
                digest.update(chunk)
                await to_thread.run_sync(file.write, chunk)
        if (sniffed := sniff(head)) is None:
            raise ApiError(
                415,
                "the file is no image or clip that kadr reads: PNG, JPEG, WebP, AVIF, HEIC; MP4, MOV, MKV, WebM, AVI.",
                code="unsupported_media",
            )
        kind, suffix = sniffed
        path = part.rename(folder / f"{MEDIA_STEM}{suffix}")
        facts = await to_thread.run_sync(self._checker.check, path, kind)
        upload = StoredUpload(
            upload_id, owner, **asdict(facts), bytes=num_bytes, sha256=digest.hexdigest(),
            created_at=self._clock(), suffix=suffix,
        )  # fmt: skip
        write_json(folder / SIDECAR, asdict(upload))
        return upload

    def get(self, upload_id: str, owner: str | None) -> StoredUpload:
        """Returns an upload. owner: None for any.

        Raises:
            ApiError: there is none, or it is another's.
        """
        upload = self._read(upload_id) if is_upload_id(upload_id) else None
        if upload is None or owner not in (None, upload.owner):
            raise ApiError(404, f"there is no upload {quote(upload_id)}. It has expired, or its id is mistyped.",
                           code="upload_not_found")  # fmt: skip
        return upload

    def path(self, upload: StoredUpload) -> Path:
        """Returns the file of an upload."""
        return self.folder / upload.id / f"{MEDIA_STEM}{upload.suffix}"

    def find_all(self, owner: str | None) -> list[StoredUpload]:
        """Returns the uploads of an owner, or of all, newest first."""
        found = [upload for name in self._names() if (upload := self._read(name)) is not None]
        return sorted((item for item in found if owner in (None, item.owner)), key=lambda item: -item.created_at)

    def delete(self, upload_id: str, owner: str | None) -> None:
        """Deletes an upload; jobs that took it have their own.

        Raises:
            ApiError: as `get`.
        """
        shutil.rmtree(self.folder / self.get(upload_id, owner).id, ignore_errors=True)

    def delete_expired(self) -> None:
        """Deletes what is too old, and what a client left half sent when the server ended."""
        for name in self._names():
            upload = self._read(name)
            with suppress(OSError):
                created_at = upload.created_at if upload else os.stat(self.folder / name).st_mtime
                if created_at + self.max_age < self._clock():
                    shutil.rmtree(self.folder / name, ignore_errors=True)

    def _names(self) -> list[str]:
        with suppress(FileNotFoundError):
            return [entry.name for entry in os.scandir(self.folder) if is_upload_id(entry.name)]
        return []

    def _read(self, upload_id: str) -> StoredUpload | None:
        try:
            data: Any = parse_json(read_text(self.folder / upload_id / SIDECAR))
            return StoredUpload(**data)
        except (OSError, ValueError, TypeError):
            return None


def is_upload_id(text: str) -> bool:
    """Tells whether a text has the form of an id, and so is safe as the name of a folder."""
    digits = text.removeprefix(UPLOAD_PREFIX)
    return text.startswith(UPLOAD_PREFIX) and len(digits) == 2 * _ID_BYTES and not set(digits) - set("0123456789abcdef")


def decode_data_url(url: str) -> bytes:
    """Returns the bytes of a data: URL in base64.

    Raises:
        ApiError: it is another URL, which the server would have to fetch, or damaged.
    """
    if not url.startswith("data:"):
        raise ApiError(
            400,
            f"{quote(url)} is not a data: URL, and this server fetches nothing. Upload the file.",
            code="url_refused",
        )
    header, comma, content = url.partition(",")
    if not comma or not header.endswith(";base64"):
        raise ApiError(400, "the data: URL must be data:image/png;base64,... .", code="invalid_media")
    try:
        return base64.b64decode(content, validate=True)
    except (ValueError, binascii.Error) as error:
        raise ApiError(400, "the data: URL is not base64.", code="invalid_media") from error
