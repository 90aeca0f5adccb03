"""Images and clips to send, good and hostile. No test file is as large as what it claims to be."""

from __future__ import annotations

import base64
import io
import re
import struct
import zlib
from fractions import Fraction
from functools import cache

import av
import numpy as np
from PIL import Image

GREY_STEP = 50  # from the grey of a frame of `grey_clip` to that of the next
ON_ITS_SIDE = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)  # matrix of a clip, at 40 in "tkhd"


@cache
def image(kind: str = "PNG", width: int = 64, height: int = 64) -> bytes:
    """Returns a small image."""
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(buffer, kind)
    return buffer.getvalue()


@cache
def clip(container: str = "mp4", codec: str = "mpeg4", frames: int = 9, width: int = 64, height: int = 64) -> bytes:
    """Returns a small clip."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        stream = output.add_stream(codec, rate=Fraction(24), width=width, height=height)
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for index in range(frames):
            pixels = np.full((height, width, 3), index, dtype=np.uint8)
            output.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
        output.mux(stream.encode(None))
    return buffer.getvalue()


@cache
def grey_clip() -> bytes:
    """Returns a clip of 5 frames of 640x320 pixels, each lighter than the one before."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as output:
        stream = output.add_stream("mpeg4", rate=Fraction(24), width=640, height=320)
        stream.pix_fmt = "yuv420p"
        for index in range(5):
            pixels = np.full((320, 640, 3), GREY_STEP * index, dtype=np.uint8)
            output.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
        output.mux(stream.encode(None))
    return buffer.getvalue()


def data_url(content: bytes, kind: str = "image/png") -> str:
    """Returns a data: URL."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def png(
    width: int, height: int, *chunks: tuple[bytes, bytes], pixels: bytes | None = None, bit_depth: int = 8
) -> bytes:
    """Returns a PNG that claims a size, and has further chunks. pixels: compressed; None: far too few."""
    header = struct.pack(">IIBBBBB", width, height, bit_depth, 2, 0, 0, 0)
    content = zlib.compress(b"\0" * 100) if pixels is None else pixels
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in ((b"IHDR", header), *chunks, (b"IDAT", content), (b"IEND", b""))
    )


def deflated_zeros(num_bytes: int) -> bytes:
    """Returns zeros, compressed about a thousand times."""
    compressor, block = zlib.compressobj(9), bytes(1 << 20)
    parts = [compressor.compress(block) for _ in range(num_bytes >> 20)]
    return b"".join(parts) + compressor.flush()


def jpeg(width: int, height: int) -> bytes:
    """Returns a JPEG that claims a size."""
    content = bytearray(image("JPEG"))
    start = content.index(b"\xff\xc0")
    content[start + 5 : start + 9] = struct.pack(">HH", height, width)
    return bytes(content)


def patch_box(content: bytes, name: bytes, offset: int, value: bytes) -> bytes:
    """Returns an mp4 with other bytes at an offset behind the name of its first box of a kind."""
    start = content.index(name) + 4 + offset
    return content[:start] + value + content[start + len(value) :]


def clip_of_size(container: str, width: int, height: int) -> bytes:
    """Returns a clip whose headers and frames, which are JPEGs, claim a size."""
    start_of_frame = re.compile(rb"(\xff\xc0\0\x11\x08)....", re.DOTALL)
    size = struct.pack(">HH", height, width)
    content = start_of_frame.sub(lambda match: match[1] + size, clip(container, "mjpeg"))
    if container == "avi":
        return content
    content = patch_box(content, b"mp4v", 24, struct.pack(">HH", width, height))
    return patch_box(content, b"tkhd", 76, struct.pack(">II", width << 16, height << 16))


def mp4_of_frames(frames: int) -> bytes:
    """Returns an mp4 whose headers claim a number of frames."""
    content = patch_box(clip(), b"stts", 8, struct.pack(">I", frames))
    return patch_box(content, b"stsz", 4, struct.pack(">II", 1, frames))
