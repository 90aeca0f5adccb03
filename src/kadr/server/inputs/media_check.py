"""Looks at the headers of uploads in a process of its own: what a hostile file does there, it does to nothing else."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kadr.errors import MediaError
from kadr.server.inputs.media_process import MediaProcess

HEADER_CHECK_SECONDS = 10.0
MAX_METADATA_BYTES = 1 << 16  # three times the longest prompt
MAX_OUTCOME_BYTES = 1 << 18

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
        text = json.dumps(read_metadata(path, absolute_paths=False))  # never where this server keeps the file
    except (MediaError, ValueError, RecursionError):
        return ""
    return text if len(text) <= MAX_METADATA_BYTES else ""


class MediaChecker(MediaProcess):
    """Runs `read_facts` in another process, one file at a time. Threads may share it."""

    def __init__(self, limits: MediaLimits, seconds: float = HEADER_CHECK_SECONDS) -> None:
        super().__init__(_read_facts_as_json, seconds=seconds, max_bytes=MAX_OUTCOME_BYTES)
        self._limits = limits

    async def check(self, path: Path, kind: str, owner: str = "") -> MediaFacts:
        """Returns the facts of a file.

        Args:
            owner: whose file it is: clients take turns, however many files one has.

        Raises:
            MediaError: as `read_facts`; or the file stopped the process that looked at it.
            ApiError: the process cannot be started.
        """
        facts: MediaFacts = await self._take_turn(owner, self._check, path, kind)
        return facts

    def _check(self, path: Path, kind: str) -> MediaFacts:
        facts: MediaFacts = self._ask(path, kind, self._limits, parse=_parse_facts)
        return facts


def _read_facts_as_json(path: Path, kind: str, limits: MediaLimits) -> bytes:
    return json.dumps(asdict(read_facts(path, kind, limits))).encode()


def _parse_facts(answer: bytes) -> MediaFacts:
    return _check_facts(**json.loads(answer))


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
