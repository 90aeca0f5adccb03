"""Sizes and frame counts: the 32s and the 8k+1, and only here.

The video VAE of the family maps 32 x 32 pixels to one latent position and, causally, one first frame plus groups of
eight frames to one latent frame each. So a video of 8k+1 frames has k+1 latent frames.
"""

from __future__ import annotations

from dataclasses import dataclass

from kadr.errors import RequestError

SPATIAL_COMPRESSION = 32  # pixels per latent position, each way
TEMPORAL_COMPRESSION = 8  # frames per latent frame, after the first
MAX_SIDE = 8192  # pixels; above this no released model makes a picture and a typing error is likelier
MAX_FRAMES = 36001  # twenty minutes at 30 per second
MAX_WINDOW_FRAMES = 4097  # in one sampling; more are made in windows


@dataclass(frozen=True)
class Size:
    """Width and height of a picture in pixels."""

    width: int
    height: int

    def __post_init__(self) -> None:
        for name, value in (("width", self.width), ("height", self.height)):
            if not isinstance(value, int) or isinstance(value, bool):
                raise RequestError(f"{name} is {value!r}; it must be a whole number of pixels.")
            if not 1 <= value <= MAX_SIDE:
                raise RequestError(f"{name} is {value} pixels; it must lie between 1 and {MAX_SIDE}.")

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"

    @classmethod
    def parse(cls, text: str) -> Size:
        """Read "704x480"."""
        width, cross, height = text.lower().replace("×", "x").partition("x")
        if not (cross and width.strip().isdecimal() and height.strip().isdecimal()):
            raise RequestError(f"size is {text!r}; write WIDTHxHEIGHT in pixels, such as 704x480.")
        return cls(int(width), int(height))

    def snap(self) -> Size:
        """The next size up whose sides are multiples of 32."""
        return Size(
            -(-self.width // SPATIAL_COMPRESSION) * SPATIAL_COMPRESSION,
            -(-self.height // SPATIAL_COMPRESSION) * SPATIAL_COMPRESSION,
        )

    def padding(self) -> tuple[int, int, int, int]:
        """(left, right, top, bottom) pixels by which `snapped()` is larger; an odd pixel goes right and below."""
        made = self.snap()
        across, down = made.width - self.width, made.height - self.height
        return across // 2, across - across // 2, down // 2, down - down // 2


def snap_frames(frames: int) -> int:
    """The next count up of the form 8k+1."""
    if not isinstance(frames, int) or isinstance(frames, bool):
        raise RequestError(f"frames is {frames!r}; it must be a whole number.")
    if not 1 <= frames <= MAX_FRAMES:
        raise RequestError(f"frames is {frames}; it must lie between 1 and {MAX_FRAMES}.")
    return -(-(frames - 1) // TEMPORAL_COMPRESSION) * TEMPORAL_COMPRESSION + 1


@dataclass(frozen=True)
class LatentGrid:
    """Latent frames, rows and columns of a video. Tokens are counted frame by frame, row by row, column by column."""

    frames: int
    height: int
    width: int

    @classmethod
    def for_video(cls, size: Size, frames: int) -> LatentGrid:
        """The grid for a picture size and frame count, both snapped up first."""
        made = size.snap()
        return cls(
            (snap_frames(frames) - 1) // TEMPORAL_COMPRESSION + 1,
            made.height // SPATIAL_COMPRESSION,
            made.width // SPATIAL_COMPRESSION,
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
