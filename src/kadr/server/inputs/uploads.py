"""`UploadStore`: images and clips that clients send, until they expire. What a client calls them is not used."""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import shutil
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import RLock
from typing import Any

from anyio import to_thread

from kadr.atomic_write import write_json
from kadr.errors import CheckpointError
from kadr.file_names import replace_file
from kadr.jobs.folders import storage_error
from kadr.jobs.job import is_id, new_id
from kadr.json_reader import parse_json
from kadr.quoting import quote
from kadr.regular_file import read_text
from kadr.server.errors import ApiError
from kadr.server.inputs.media_check import MediaChecker, sniff

UPLOAD_PREFIX = "upload_"
SIDECAR, MEDIA_STEM = "upload.json", "media"
RETRY_SECONDS = 5  # of a client with too many uploads on their way
_HEAD_BYTES = 12
_LOOK_BYTES = 16 << 20  # between two looks at the free space of the disk


@dataclass(frozen=True)
class UploadLimits:
    """Bounds of uploads.

    Args:
        max_bytes: of one file.
        max_age: seconds that one is kept.
        max_count, max_client_bytes: of one client, those on their way included.
        max_total_bytes: of all clients.
        max_incoming: of one client, on their way at the same time.
        min_free_bytes: of the disk, which uploads leave to the videos.
    """

    max_bytes: int = 512 << 20
    max_age: float = 24 * 3600.0
    max_count: int = 500
    max_client_bytes: int = 8 << 30
    max_total_bytes: int = 32 << 30
    max_incoming: int = 64
    min_free_bytes: int = 0


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
    upright_width: int
    upright_height: int
    is_cut_off: bool = False
    metadata: str = ""


class UploadStore:
    """The uploads of a server, which alone writes into their folder. Threads may share it.

    Args:
        folder: with a folder for each; made where it is missing. What a client left half sent there is removed.
        checker: looks at their headers.
        limits: see `UploadLimits`.
        clock: seconds since 1970.
    """

    def __init__(
        self, folder: Path, checker: MediaChecker, limits: UploadLimits, *, clock: Callable[[], float] = time.time
    ) -> None:
        self.folder, self.checker, self.limits, self.clock = folder, checker, limits, clock
        self._lock = RLock()
        self._incoming: dict[str, IncomingUpload] = {}
        self._stored: dict[str, StoredUpload] = {}
        self._num_bytes: Counter[str] = Counter()  # by owner, those on their way included
        for upload_id in self._ids_on_disk():
            if (upload := self._read(upload_id)) is None:
                shutil.rmtree(folder / upload_id, ignore_errors=True)
            else:
                self._stored[upload_id] = upload
                self._num_bytes[upload.owner] += upload.bytes

    def begin(self, owner: str) -> IncomingUpload:
        """Returns a new upload on its way in, which takes the room that it needs as it grows.

        Raises:
            ApiError: the client has too many.
        """
        with self._lock:
            num_incoming = sum(item.owner == owner for item in self._incoming.values())
            if num_incoming >= self.limits.max_incoming:
                raise _too_many(f"{num_incoming} of your uploads are on their way, as many as may be. Wait for one.")
            if num_incoming + len(self.find_all(owner)) >= self.limits.max_count:
                raise _too_many(f"you have {self.limits.max_count} uploads, as many as are kept. Delete some.")
            upload = IncomingUpload(self, owner)
            self._incoming[upload.id] = upload
        return upload

    async def receive(self, owner: str, chunks: AsyncIterator[bytes]) -> StoredUpload:
        """Stores what a client sends, and looks at its header. What is incomplete or refused leaves nothing.

        Raises:
            ApiError, MediaError, StorageError: as `begin` and the methods of `IncomingUpload`.
        """
        with self.begin(owner) as incoming:
            async for chunk in chunks:
                await incoming.write(chunk)
            return await incoming.keep()

    def get(self, upload_id: str, owner: str | None) -> StoredUpload:
        """Returns an upload, also one that is there only for the request that brought it. owner: None for any.

        Raises:
            ApiError: there is none, or it is another's.
        """
        with self._lock:
            incoming = self._incoming.get(upload_id)
            upload = self._stored.get(upload_id) or (incoming.facts if incoming is not None else None)
        if upload is None or owner not in (None, upload.owner):
            raise ApiError(404, f"there is no upload {quote(upload_id)}. It has expired, or its id is mistyped.",
                           code="upload_not_found")  # fmt: skip
        return upload

    def path(self, upload: StoredUpload) -> Path:
        """Returns the file of an upload."""
        return self.folder / upload.id / f"{MEDIA_STEM}{upload.suffix}"

    def find_all(self, owner: str | None) -> list[StoredUpload]:
        """Returns the uploads of an owner, or of all, newest first."""
        with self._lock:
            found = [item for item in self._stored.values() if owner in (None, item.owner)]
        return sorted(found, key=lambda item: -item.created_at)

    def delete(self, upload_id: str, owner: str | None) -> None:
        """Deletes an upload; jobs that took it have their own.

        Raises:
            ApiError: as `get`.
        """
        with self._lock:
            upload = self.get(upload_id, owner)
            if self._stored.pop(upload_id, None) is not None:
                self._num_bytes[upload.owner] -= upload.bytes
        shutil.rmtree(self.folder / upload_id, ignore_errors=True)

    def delete_expired(self) -> None:
        """Deletes what is too old."""
        oldest = self.clock() - self.limits.max_age
        for upload in self.find_all(None):
            if upload.created_at < oldest:
                with suppress(ApiError):  # its client deleted it meanwhile
                    self.delete(upload.id, None)

    def take_room(self, upload: IncomingUpload, num_bytes: int) -> None:
        """Counts the next bytes of an upload.

        Raises:
            ApiError: it is too large, or its client's share or that of all is full.
            StorageError: the disk is full.
        """
        limits = self.limits
        with self._lock:
            total = upload.num_bytes + num_bytes
            if total > limits.max_bytes:
                raise ApiError(413, f"the file has more than {limits.max_bytes:,} bytes.", code="too_large",
                               headers={"connection": "close"})  # fmt: skip
            if self._num_bytes[upload.owner] + num_bytes > limits.max_client_bytes:
                raise _too_many(
                    f"{limits.max_client_bytes:,} bytes of your uploads are kept, and no more. Delete some."
                )
            if self._num_bytes.total() + num_bytes > limits.max_total_bytes:
                raise _too_many("the server has no more room for uploads. Try again later.")
            if not upload.num_bytes or upload.num_bytes // _LOOK_BYTES != total // _LOOK_BYTES:
                self._refuse_full_disk(num_bytes)
            upload.num_bytes = total
            self._num_bytes[upload.owner] += num_bytes

    def end(self, upload: IncomingUpload, stored: StoredUpload | None) -> None:
        """Ends an upload's way in: it is `stored`, or all of it is removed."""
        with self._lock:
            self._incoming.pop(upload.id, None)
            if stored is not None:
                self._stored[upload.id] = stored
                return
            self._num_bytes[upload.owner] -= upload.num_bytes
        shutil.rmtree(upload.folder, ignore_errors=True)

    def _refuse_full_disk(self, num_bytes: int) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.folder).free
        except OSError as error:
            raise storage_error(self.folder, error) from error
        if free - num_bytes < self.limits.min_free_bytes:
            raise storage_error(self.folder, OSError(f"{free / 1e6:.0f} MB are free, which are for the videos"))

    def _ids_on_disk(self) -> list[str]:
        with suppress(FileNotFoundError):
            return [entry.name for entry in os.scandir(self.folder) if is_upload_id(entry.name)]
        return []

    def _read(self, upload_id: str) -> StoredUpload | None:
        try:
            data: Any = parse_json(read_text(self.folder / upload_id / SIDECAR))
            return StoredUpload(**data)
        except (OSError, ValueError, TypeError):
            return None


class IncomingUpload:
    """An upload on its way in, until the block around it ends: then it is kept, or nothing of it remains.

    Args:
        store: takes it.
        owner: name of the client.

    Attributes:
        id: of the upload.
        num_bytes: that have come.
        facts: of the whole file, once it was checked.
    """

    def __init__(self, store: UploadStore, owner: str) -> None:
        self._store, self.owner = store, owner
        self.id = new_id(UPLOAD_PREFIX)
        self.folder = store.folder / self.id
        self.num_bytes, self.facts = 0, None  # type: tuple[int, StoredUpload | None]
        self._digest, self._head, self._is_kept = hashlib.sha256(), b"", False

    def __enter__(self) -> IncomingUpload:
        return self

    def __exit__(self, *exception: object) -> None:
        self._store.end(self, self.facts if self._is_kept else None)

    async def write(self, chunk: bytes) -> None:
        """Takes the next bytes.

        Raises:
            ApiError: there are too many, or the file is not of a kind that kadr reads.
            StorageError: the disk is full.
        """
        if len(self._head) < _HEAD_BYTES:
            self._head = (self._head + chunk)[:_HEAD_BYTES]
            if len(self._head) == _HEAD_BYTES:
                _sniff(self._head)  # refused at once, not when all of it has come
        self._store.take_room(self, len(chunk))
        await to_thread.run_sync(self._append, chunk)

    async def check(self) -> StoredUpload:
        """Looks at the header of the whole file, and returns its facts.

        Raises:
            ApiError: it is not of a kind that kadr reads.
            MediaError: its header is damaged, or exceeds a limit.
        """
        kind, suffix = _sniff(self._head)
        path = self.folder / f"{MEDIA_STEM}{suffix}"
        await to_thread.run_sync(replace_file, self._part, path)
        facts = await self._store.checker.check(path, kind, self.owner)
        self.facts = StoredUpload(
            self.id, self.owner, **asdict(facts), bytes=self.num_bytes, sha256=self._digest.hexdigest(),
            created_at=self._store.clock(), suffix=suffix,
        )  # fmt: skip
        return self.facts

    async def keep(self) -> StoredUpload:
        """Keeps the whole file until it expires.

        Raises:
            ApiError, MediaError, StorageError: as `check` and `write`.
        """
        facts = await self.check()
        try:
            await to_thread.run_sync(write_json, self.folder / SIDECAR, asdict(facts))
        except CheckpointError as error:
            raise storage_error(self.folder, error) from error
        self._is_kept = True
        return facts

    @property
    def _part(self) -> Path:
        return self.folder / f"{MEDIA_STEM}.part"

    def _append(self, chunk: bytes) -> None:
        self._digest.update(chunk)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._part.open("ab") as file:
                file.write(chunk)
        except OSError as error:
            raise storage_error(self.folder, error) from error


def is_upload_id(text: str) -> bool:
    """Tells whether a text has the form of an upload's id; see `is_id`."""
    return is_id(text, UPLOAD_PREFIX)


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


def _sniff(head: bytes) -> tuple[str, str]:
    """Returns what `media_check.sniff` does.

    Raises:
        ApiError: kadr does not read the file.
    """
    if (sniffed := sniff(head)) is None:
        raise ApiError(
            415,
            "the file is no image or clip that kadr reads: PNG, JPEG, WebP, AVIF, HEIC; MP4, MOV, MKV, WebM, AVI.",
            code="unsupported_media",
        )
    return sniffed


def _too_many(message: str) -> ApiError:
    return ApiError(429, message, code="too_many_uploads", headers={"retry-after": str(RETRY_SECONDS)})
