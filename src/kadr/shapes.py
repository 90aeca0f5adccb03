"""Sizes and frame counts. Multiples of 32 pixels and counts of 8k+1 frames are defined here and nowhere else.

The video VAE compresses 32 x 32 pixels to one latent position. In time it is causal: the first frame becomes one latent
frame, and so does each group of eight after it. So a video of 8k+1 frames has k+1 latent frames.
"""

from __future__ import annotations

from dataclasses import dataclass

from kadr.errors import RequestError
from kadr.quoting import quote
from kadr.validation import check_range

SPATIAL_COMPRESSION = 32  # pixels per latent position, in height and in width
TEMPORAL_COMPRESSION = 8  # frames per latent frame, after the first
MAX_SIDE = 8192  # pixels; no released model makes larger videos, so a larger number is likely a typing error
MAX_FRAMES = 36001  # twenty minutes at 30 per second
MAX_WINDOW_FRAMES = 4097  # denoised at once; longer videos are made in windows


@dataclass(frozen=True)
class Size:
    """Width and height of an image or a video in pixels."""

    width: int
    height: int

    def __post_init__(self) -> None:
        for name, value in (("width", self.width), ("height", self.height)):
            check_range(name, value, 1, MAX_SIDE, " pixels", is_whole=True)

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"

    @classmethod
    def parse(cls, text: str) -> Size:
        """Parses a size such as "704x480"."""
        width, cross, height = str(text).lower().replace("×", "x").partition("x")
        if not (cross and _is_side(width.strip()) and _is_side(height.strip())):
            raise RequestError(f"size is {quote(text)}; write WIDTHxHEIGHT in pixels, such as 704x480.")
        return cls(int(width), int(height))

    def snap(self) -> Size:
        """Rounds both sides up to multiples of 32."""
        return Size(
            -(-self.width // SPATIAL_COMPRESSION) * SPATIAL_COMPRESSION,
            -(-self.height // SPATIAL_COMPRESSION) * SPATIAL_COMPRESSION,
        )

    def padding(self) -> tuple[int, int, int, int]:
        """Returns the pixels (left, right, top, bottom) that `snap()` adds; an odd pixel goes right and below."""
        snapped = self.snap()
        extra_width, extra_height = snapped.width - self.width, snapped.height - self.height
        return (
            extra_width // 2,
            extra_width - extra_width // 2,
            extra_height // 2,
            extra_height - extra_height // 2,
        )


def _is_side(text: str) -> bool:
    return text.isdecimal() and len(text) <= 12  # Python does not convert thousands of digits


def snap_frames(frames: int) -> int:
    """Rounds a frame count up to the form 8k+1."""
    check_range("frames", frames, 1, MAX_FRAMES, is_whole=True)
    return -(-(frames - 1) // TEMPORAL_COMPRESSION) * TEMPORAL_COMPRESSION + 1


@dataclass(frozen=True)
class LatentGrid:
    """Latent frames, rows and columns of a video. Tokens are in the order (frame, row, column), columns fastest."""

    frames: int
    height: int
    width: int

    @classmethod
    def for_video(cls, size: Size, frames: int) -> LatentGrid:
        """Returns the grid for a size and a frame count, both snapped up first."""
        snapped = size.snap()
        return cls(
            (snap_frames(frames) - 1) // TEMPORAL_COMPRESSION + 1,
            snapped.height // SPATIAL_COMPRESSION,
            snapped.width // SPATIAL_COMPRESSION,
        )

    @property
    def num_tokens(self) -> int:
        return self.frames * self.height * self.width

    @property
    def video_size(self) -> Size:
        return Size(self.width * SPATIAL_COMPRESSION, self.height * SPATIAL_COMPRESSION)

    @property
    def video_frames(self) -> int:
        return (self.frames - 1) * TEMPORAL_COMPRESSION + 1
