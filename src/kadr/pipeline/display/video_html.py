"""HTML of a video: the mp4 itself if it is small enough for a notebook, else its first frame and the reason."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image

from kadr.errors import MediaError
from kadr.media.clip import read_video
from kadr.media.encoders.formats import FORMATS_BY_SUFFIX, MP4, frame_path, is_pattern
from kadr.notebook.html import data_url, element, lines
from kadr.planning.plan import format_bytes
from kadr.shapes import Size

MAX_INLINE_BYTES = 8_000_000  # of an mp4; a notebook stores a third more of each that it shows, and sends it at once
_STYLE = "max-width:100%;height:auto"
_JPEG_QUALITY = 85


def video_in_memory_html(frames: np.ndarray, save: Callable[[Path], Path], caption: str, notices: Iterable[str]) -> str:
    """Returns the HTML of frames, uint8 (F, H, W, 3), that `save` writes into an mp4."""
    try:
        with TemporaryDirectory(prefix="kadr-") as folder:
            mp4 = save(Path(folder) / "video.mp4").read_bytes()
    except MediaError as error:
        return _still_html(frames[0], f"This is the first frame: {error}", caption, notices)
    if len(mp4) <= MAX_INLINE_BYTES:
        return _file_html(mp4, MP4.suffixes[0], Size(frames.shape[2], frames.shape[1]), caption, notices)
    return _still_html(frames[0], f'{_too_large(len(mp4))} Save it: video.save("video.mp4")', caption, notices)


def video_file_html(path: Path, size: Size, caption: str, notices: Iterable[str]) -> str:
    """Returns the HTML of a file, or of the first of numbered images; of one that is gone, the lines alone."""
    file = frame_path(path, 1) if is_pattern(path) else path
    try:
        num_bytes = file.stat().st_size
        if num_bytes <= MAX_INLINE_BYTES:
            return _file_html(file.read_bytes(), file.suffix.lower(), size, caption, notices)
        return _still_html(read_video(path, 1).frames[0], f"{_too_large(num_bytes)} It is {path}", caption, notices)
    except (OSError, MediaError) as error:
        return lines((f"{path} cannot be shown: {error}", caption, *notices))


def _too_large(num_bytes: int) -> str:
    limit = format_bytes(MAX_INLINE_BYTES)
    return f"This is the first frame: the mp4 has {format_bytes(num_bytes)}, and a notebook gets at most {limit}."


def _file_html(content: bytes, suffix: str, size: Size, caption: str, notices: Iterable[str]) -> str:
    form = FORMATS_BY_SUFFIX[suffix]
    if not form.codecs:
        sides = {"width": size.width, "height": size.height}
        image = element("img", src=data_url(content, f"image/{form.name}"), style=_STYLE, alt="the video", **sides)
        return image + lines((caption, *notices))
    source = data_url(content, f"video/{form.name}")
    switches = {"controls": True, "autoplay": True, "loop": True, "muted": True, "playsinline": True}
    video = element("video", src=source, width=size.width, height=size.height, style=_STYLE, **switches)
    return video + lines((caption, *notices))


def _still_html(frame: np.ndarray, reason: str, caption: str, notices: Iterable[str]) -> str:
    content = BytesIO()
    Image.fromarray(frame).save(content, "JPEG", quality=_JPEG_QUALITY)
    source, (height, width) = data_url(content.getvalue(), "image/jpeg"), frame.shape[:2]
    image = element("img", src=source, width=width, height=height, style=_STYLE, alt="the first frame")
    return image + lines((reason, caption, *notices))
