"""Comments in GIF, WebP, PNG and JPEG files, which hold the request as the comment tag of an mp4 does.

They are put into the finished file: what became known with the last frame is in it. Frames are not encoded again.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

from kadr.errors import MediaError
from kadr.file_names import replace_file

PNG_KEYWORD = "Comment"
EXIF_DESCRIPTION = 0x010E  # ImageDescription
_MAX_SEGMENT = 65_533  # bytes of a JPEG comment
_WEBP_EXIF_FLAG = 0x08
_PNG_HEADER_END = 8 + 25  # the signature and IHDR


def write_comment(path: Path, comment: str) -> None:
    """Puts a comment, in ASCII, into an image file that was written just now.

    Raises:
        OSError: it cannot be written.
    """
    content = path.read_bytes()
    tagged = _WRITERS[path.suffix.lower()](content, comment.encode("ascii"))
    copy = path.with_name(f"{path.name}.tagged{path.suffix}")
    try:
        copy.write_bytes(tagged)
        replace_file(copy, path)
    finally:
        copy.unlink(missing_ok=True)


def read_comment(path: Path) -> str | None:
    """Returns the comment of an image file; None where it has none.

    Raises:
        MediaError: it is no image.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return _comment_of(image)
    except FileNotFoundError:
        raise MediaError(f"{path}: there is no such file.") from None
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise MediaError(f"{path} cannot be read as an image: {error}.") from error


def _comment_of(image: Any) -> str | None:
    if image.format == "WEBP":
        found = image.getexif().get(EXIF_DESCRIPTION)
    elif image.format == "PNG":
        found = image.info.get(PNG_KEYWORD)
    elif image.format == "JPEG":
        found = b"".join(content for name, content in image.applist if name == "COM")
    else:
        found = image.info.get("comment")
    return found.decode("utf-8", "replace") if isinstance(found, bytes) else found


def _tag_png(content: bytes, comment: bytes) -> bytes:
    body = b"tEXt" + PNG_KEYWORD.encode() + b"\0" + comment
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    return content[:_PNG_HEADER_END] + chunk + content[_PNG_HEADER_END:]


def _tag_jpeg(content: bytes, comment: bytes) -> bytes:
    first_length = struct.unpack(">H", content[4:6])[0]  # of APP0, which Pillow writes first and readers want there
    end = 4 + first_length
    parts = [comment[start : start + _MAX_SEGMENT] for start in range(0, len(comment), _MAX_SEGMENT)]
    segments = (b"\xff\xfe" + struct.pack(">H", len(part) + 2) + part for part in parts)
    return content[:end] + b"".join(segments) + content[end:]


def _tag_gif(content: bytes, comment: bytes) -> bytes:
    flags = content[10]
    end = 13 + (3 << ((flags & 7) + 1) if flags & 0x80 else 0)  # behind the colours that all frames share
    blocks = b"".join(
        bytes([len(part)]) + part for part in (comment[start : start + 255] for start in range(0, len(comment), 255))
    )
    return content[:end] + b"\x21\xfe" + blocks + b"\0" + content[end:]


def _tag_webp(content: bytes, comment: bytes) -> bytes:
    from PIL import Image

    exif = Image.Exif()
    exif[EXIF_DESCRIPTION] = comment.decode("ascii")
    body = exif.tobytes()
    body = body.removeprefix(b"Exif\0\0")
    chunk = b"EXIF" + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2)
    chunks = content[12:]
    if chunks[:4] == b"VP8X":
        chunks = chunks[:8] + bytes([chunks[8] | _WEBP_EXIF_FLAG]) + chunks[9:]
    else:  # a single frame has no extended header
        with Image.open(BytesIO(content)) as image:
            sides = b"".join(struct.pack("<I", side - 1)[:3] for side in image.size)
        chunks = b"VP8X" + struct.pack("<I", 10) + bytes([_WEBP_EXIF_FLAG, 0, 0, 0]) + sides + chunks
    body = b"WEBP" + chunks + chunk
    return b"RIFF" + struct.pack("<I", len(body)) + body


_WRITERS: dict[str, Callable[[bytes, bytes], bytes]] = {
    ".png": _tag_png,
    ".jpg": _tag_jpeg,
    ".jpeg": _tag_jpeg,
    ".gif": _tag_gif,
    ".webp": _tag_webp,
}
TAGGED_SUFFIXES = tuple(_WRITERS)
