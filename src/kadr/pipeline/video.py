"""What comes out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from kadr.media.writer import VideoWriter
from kadr.request.request import Request
from kadr.shapes import Size


@dataclass(frozen=True)
class Video:
    """A finished video.

    Args:
        frames: uint8 (F, H, W, 3): RGB, full range.
        latents: float32 (128, f, h, w) on the CPU, normalised.
        fps: frames per second.
        request: what was asked, with the model's own defaults filled in.
        metadata: everything that is stored in an mp4 beside the pictures: version, model, request.
    """

    frames: np.ndarray
    latents: Tensor
    fps: float
    request: Request
    metadata: dict[str, Any]

    @property
    def size(self) -> Size:
        return Size(self.frames.shape[2], self.frames.shape[1])

    def save(self, path: str | Path) -> Path:
        """Write an mp4 (H.264, yuv420p). Written beside `path` and renamed when whole.

        Raises:
            MediaError: the folder does not exist, the disk is full, or a side is odd.
        """
        with VideoWriter(path, self.size, self.fps, metadata=self.metadata) as writer:
            writer.write(self.frames)
        return Path(path)


@dataclass(frozen=True)
class VideoFile:
    """A video that went to its file as it was decoded.

    Args:
        path: of the mp4.
        frames, size, fps: as written.
        seconds: the whole generation took.
        latents: float32 (128, f, h, w) on the CPU, normalised.
        request: what was asked, with the model's own defaults filled in.
    """

    path: Path
    frames: int
    size: Size
    fps: float
    seconds: float
    latents: Tensor
    request: Request
