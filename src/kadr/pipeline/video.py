"""Results of a generation: `Video` in memory, `VideoFile` on disk."""

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
        request: the request with the model's defaults.
        metadata: everything stored in the mp4 beside the frames: version, model, request, notices.
        notices: what was degraded or retried on the way, and why.
    """

    frames: np.ndarray
    latents: Tensor
    fps: float
    request: Request
    metadata: dict[str, Any]
    notices: tuple[str, ...] = ()

    @property
    def size(self) -> Size:
        return Size(self.frames.shape[2], self.frames.shape[1])

    def save(self, path: str | Path) -> Path:
        """Writes an mp4 (H.264, yuv420p), beside `path` first, and renames it when complete.

        Raises:
            MediaError: the folder does not exist, the disk is full, or a side is an odd number of pixels.
        """
        with VideoWriter(path, self.size, self.fps, metadata=self.metadata) as writer:
            writer.write(self.frames)
        return Path(path)


@dataclass(frozen=True)
class VideoFile:
    """A video that was written to its file while it was decoded.

    Args:
        path: path of the mp4.
        frames, size, fps: number of frames, size and frame rate as written.
        seconds: duration of the whole generation.
        latents: float32 (128, f, h, w) on the CPU, normalised.
        request: the request with the model's defaults.
        notices: see `Video`.
    """

    path: Path
    frames: int
    size: Size
    fps: float
    seconds: float
    latents: Tensor
    request: Request
    notices: tuple[str, ...] = ()
