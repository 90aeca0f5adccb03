"""Decodes images and single frames of clips, in a process of its own."""

from __future__ import annotations

import io
import struct
from pathlib import Path

from kadr.server.inputs.media_process import MediaProcess

MAX_SIDE_PIXELS = 320  # of a thumbnail
DECODE_SECONDS = 30.0
MAX_FRAME_BYTES = 256 << 20  # of a PNG: 8192x8192 pixels that do not compress have 201 million
_JPEG_QUALITY = 85
_PNG_EFFORT = 1  # a frame of a film hardly compresses better, and 8192x8192 pixels would take 20 s
_SIDES = struct.Struct(">HH")


class FrameReader(MediaProcess):
    """Decodes files of clients in another process, one at a time. Threads may share it."""

    def __init__(self, seconds: float = DECODE_SECONDS) -> None:
        too_slow = f"the frame was not decoded in {seconds:g} seconds. Cut the clip to the part that you need."
        super().__init__(_decode, seconds=seconds, max_bytes=MAX_FRAME_BYTES, too_slow=too_slow)

    async def read_thumbnail(self, path: Path, frame: int | None, owner: str = "") -> bytes:
        """Returns a JPEG of an image or of a frame of a clip: upright, at most 320 pixels a side.

        Args:
            frame: of a clip, from 0; the last one stands for those beyond it. None: the file is an image.
            owner: of the file, see `MediaChecker.check`.

        Raises:
            MediaError: the file is damaged, or takes too long.
            ApiError: the process cannot be started.
        """
        thumbnail: bytes = await self._take_turn(owner, self._read_thumbnail, path, frame)
        return thumbnail

    async def read_png(self, path: Path, frame: int, owner: str = "") -> bytes:
        """Returns a PNG of a frame of a clip: upright, with the pixels as they are decoded.

        The PNG is as foreign as the clip: whoever took over that process may have written it.

        Args:
            frame: from 0; a negative one counts from the end.

        Raises:
            MediaError: there is no such frame; and as `read_thumbnail`.
            ApiError: as `read_thumbnail`.
        """
        png: bytes = await self._take_turn(owner, self._read_png, path, frame)
        return png

    def _read_thumbnail(self, path: Path, frame: int | None) -> bytes:
        thumbnail: bytes = self._ask(path, frame, MAX_SIDE_PIXELS, parse=_encode_thumbnail)
        return thumbnail

    def _read_png(self, path: Path, frame: int) -> bytes:
        png: bytes = self._ask(path, frame, None, parse=bytes)
        return png


def _decode(path: Path, frame: int | None, side: int | None) -> bytes:
    """Returns a PNG of an image or a frame, or, to fit a side, its width and height and its RGB pixels."""
    from PIL import Image

    from kadr.media.clip import read_frame
    from kadr.media.image import fit_within, load_image

    if frame is None:
        image = load_image(path)
    else:
        image = Image.fromarray(read_frame(path, frame, or_last=side is not None))
    if side is not None:
        image = fit_within(image, side)
        return _SIDES.pack(*image.size) + image.tobytes()
    png = io.BytesIO()
    image.save(png, "PNG", compress_level=_PNG_EFFORT)
    return png.getvalue()


def _encode_thumbnail(answer: bytes) -> bytes:
    """Returns a JPEG of pixels that another process sends, if they can be true.

    Raises:
        ValueError: they cannot.
    """
    from PIL import Image

    if len(answer) < _SIDES.size:
        raise ValueError("this has no size")
    width, height = _SIDES.unpack_from(answer)
    pixels = answer[_SIDES.size :]
    if not (0 < width <= MAX_SIDE_PIXELS and 0 < height <= MAX_SIDE_PIXELS and len(pixels) == 3 * width * height):
        raise ValueError("these are no pixels of a thumbnail")
    jpeg = io.BytesIO()
    Image.frombytes("RGB", (width, height), pixels).save(jpeg, "JPEG", quality=_JPEG_QUALITY)
    return jpeg.getvalue()
