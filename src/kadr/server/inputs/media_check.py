"""Looks at the headers of uploads in a process of its own: what a hostile file does there, it does to nothing else."""

from __future__ import annotations

import json
import math
import multiprocessing
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Lock
from typing import Any
from weakref import WeakValueDictionary

from anyio import CapacityLimiter, Semaphore, to_thread

from kadr.errors import MediaError

HEADER_CHECK_SECONDS = 10.0
MEMORY_BYTES = 3 << 30  # of address space, of which most is the libraries'
MAX_METADATA_BYTES = 1 << 16  # three times the longest prompt
MAX_OUTCOME_BYTES = 1 << 18
RETRY_SECONDS = 5

IMAGE, CLIP = "image", "clip"
_EBML, _RIFF = b"\x1a\x45\xdf\xa3", b"RIFF"
_IMAGE_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"mif1", b"msf1", b"heim", b"heis", b"hevc", b"hevx")


@dataclass(frozen=True)
class MediaLimits:
    """Bounds of an upload, by its header.

    Args:
        max_pixels: of an image.
        max_side: of a clip's frames, in pixels.
        max_frames: of a clip.
    """

    max_pixels: int = 100_000_000
    max_side: int = 8192
    max_frames: int = 36_001


@dataclass(frozen=True)
class MediaFacts:
    """Facts from the header of an image or clip.

    Args:
        width, height: in pixels; of a clip as stored, before any rotation.
        upright_width, upright_height: as it is shown.
        frames, fps, is_cut_off: of a clip, see `ClipHeader`.
        metadata: that kadr stored in a clip, as JSON; "" where it stored none, or more than `MAX_METADATA_BYTES`.
    """

    kind: str
    width: int
    height: int
    upright_width: int
    upright_height: int
    frames: int | None = None
    fps: float | None = None
    is_cut_off: bool = False
    metadata: str = ""


def sniff(head: bytes) -> tuple[str, str] | None:
    """Returns the kind of a file and an ending for its name, by its first 12 bytes; None for what kadr does not read.

    What a client calls the file, or says of it, is not looked at.
    """
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return IMAGE, ".png"
    if head.startswith(b"\xff\xd8\xff"):
        return IMAGE, ".jpg"
    if head.startswith(_RIFF):
        return {b"WEBP": (IMAGE, ".webp"), b"AVI ": (CLIP, ".avi")}.get(head[8:12])
    if head.startswith(_EBML):
        return CLIP, ".mkv"
    if head[4:8] == b"ftyp":
        if head[8:12] in _IMAGE_BRANDS:
            return IMAGE, ".avif" if head[8:11] == b"avi" else ".heic"
        return CLIP, ".mov" if head[8:12] == b"qt  " else ".mp4"
    return (CLIP, ".mov") if head[4:8] in (b"moov", b"mdat", b"wide", b"free") else None


def read_facts(path: Path, kind: str, limits: MediaLimits) -> MediaFacts:
    """Reads the header of an image or clip; of a clip, also its first frame, which alone says how it lies.

    Raises:
        MediaError: it is damaged, or exceeds a limit.
    """
    return _image_facts(path, limits) if kind == IMAGE else _clip_facts(path, limits)


def _image_facts(path: Path, limits: MediaLimits) -> MediaFacts:
    from kadr.media.image import probe_image

    width, height = probe_image(path)
    if width * height > limits.max_pixels:
        limit = limits.max_pixels / 1e6
        raise MediaError(
            f"the image has {width * height / 1e6:.0f} million pixels; this server takes {limit:.0f} million. Make it "
            "smaller."
        )
    return MediaFacts(IMAGE, width, height, width, height)


def _clip_facts(path: Path, limits: MediaLimits) -> MediaFacts:
    from kadr.media.clip import probe_upright_size, probe_video

    header = probe_video(path)
    if max(header.width, header.height) > limits.max_side:
        raise MediaError(
            f"the clip is {header.width}x{header.height} pixels; this server takes sides of {limits.max_side}."
        )
    if header.frames > limits.max_frames:
        raise MediaError(f"the clip has {header.frames} frames; this server takes {limits.max_frames}. Cut it.")
    upright = probe_upright_size(path)
    return MediaFacts(
        CLIP, header.width, header.height, *upright, header.frames, float(header.fps), bool(header.is_cut_off),
        _read_metadata(path),
    )  # fmt: skip


def _read_metadata(path: Path) -> str:
    """Returns what kadr stored in a clip, as JSON; "" for a clip that it did not make."""
    from kadr.media.clip import read_metadata

    try:
        text = json.dumps(read_metadata(path))
    except (MediaError, ValueError, RecursionError):
        return ""
    return text if len(text) <= MAX_METADATA_BYTES else ""


class MediaChecker:
    """Runs `read_facts` in another process, one file at a time. Threads may share it."""

    def __init__(self, limits: MediaLimits, seconds: float = HEADER_CHECK_SECONDS) -> None:
        self._limits, self._seconds, self._lock = limits, seconds, Lock()
        self._turns = CapacityLimiter(1)  # those that wait take none of the threads that all routes share
        self._turns_of: WeakValueDictionary[str, Semaphore] = WeakValueDictionary()  # one of each client waits for them
        self._process: Any = None
        self._connection: Connection | None = None

    async def check(self, path: Path, kind: str, owner: str = "") -> MediaFacts:
        """Returns the facts of a file.

        Args:
            owner: whose file it is: clients take turns, however many files one has.

        Raises:
            MediaError: as `read_facts`; or the file stopped the process that looked at it.
            ApiError: the process cannot be started.
        """
        turn = self._turns_of.get(owner)
        if turn is None:
            turn = self._turns_of[owner] = Semaphore(1)
        async with turn:
            return await to_thread.run_sync(self._check, path, kind, limiter=self._turns)

    def close(self) -> None:
        """Ends the process."""
        with self._lock:
            self._stop()

    def _check(self, path: Path, kind: str) -> MediaFacts:
        with self._lock:
            connection = self._connection or self._start()
            try:
                connection.send((path, kind, self._limits))
                if not connection.poll(self._seconds):
                    raise EOFError
                # Not unpickled: a file that took over that process must not take over this one.
                outcome = json.loads(connection.recv_bytes(MAX_OUTCOME_BYTES))
                if "facts" in outcome:
                    return _check_facts(**outcome["facts"])
                message = str(outcome["error"])
            except (EOFError, OSError, ValueError, TypeError, KeyError) as error:
                self._stop()
                raise MediaError("the file cannot be read: it is damaged.") from error
        raise MediaError(message.replace(str(path), "the file"))

    def _start(self) -> Connection:
        context = multiprocessing.get_context("spawn")
        connection, theirs = context.Pipe()
        process = context.Process(target=_run, args=(theirs,), name="kadr media check", daemon=True)
        try:
            process.start()
        except OSError as error:
            connection.close()
            from kadr.server.errors import ApiError  # the process that looks at media does without its libraries

            message = "the server cannot look at media now: it has too little memory. Try again later."
            raise ApiError(503, message, code="busy", headers={"retry-after": str(RETRY_SECONDS)}) from error
        finally:
            theirs.close()
        self._connection, self._process = connection, process
        return connection

    def _stop(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._process.kill()
            self._process.join()
        self._connection = self._process = None


def _check_facts(**facts: Any) -> MediaFacts:
    """Returns what another process says of a file, if it can be true.

    Raises:
        ValueError, TypeError: it cannot.
    """
    checked = MediaFacts(**facts)
    sizes = (checked.width, checked.height, checked.upright_width, checked.upright_height)
    is_clip = checked.kind == CLIP
    if (
        checked.kind not in (IMAGE, CLIP)
        or not all(type(size) is int and size > 0 for size in sizes)
        or not (type(checked.frames) is int if is_clip else checked.frames is None)
        or not (type(checked.fps) is float and math.isfinite(checked.fps) if is_clip else checked.fps is None)
        or type(checked.is_cut_off) is not bool
        or type(checked.metadata) is not str
        or len(checked.metadata) > MAX_METADATA_BYTES
    ):
        raise ValueError("these are no facts of a medium")
    return checked


def _run(connection: Connection) -> None:
    """Checks file after file, until the pipe closes."""
    _limit_resources()
    while True:
        try:
            path, kind, limits = connection.recv()
        except (EOFError, OSError):
            return
        connection.send_bytes(json.dumps(_outcome(partial(read_facts, path, kind, limits))).encode())


def _outcome(read: Callable[[], MediaFacts]) -> dict[str, Any]:
    try:
        return {"facts": asdict(read())}
    except MediaError as error:
        return {"error": str(error)}
    except Exception as error:  # of a library, for a file that nobody thought of
        return {"error": f"the file cannot be read: {type(error).__name__}."}


def _limit_resources() -> None:
    """Bounds the memory of this process, and lets it write to no file."""
    if sys.platform.startswith("linux"):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
