"""Results of a generation: `Video` in memory, `VideoFile` on disk."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
from torch import Tensor

from kadr.media.encoders.formats import Encoding
from kadr.media.writer import VideoWriter
from kadr.notebook.kernel import notebook_display
from kadr.pipeline.display.player import find_opener, play
from kadr.pipeline.display.video_html import video_file_html, video_in_memory_html
from kadr.quoting import quote
from kadr.request.request import Request
from kadr.shapes import Size

MAX_PROMPT_SHOWN = 60  # characters, in a repr


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

    def save(
        self,
        path: str | Path,
        *,
        codec: str | None = None,
        crf: int | None = None,
        with_metadata: bool = True,
    ) -> Path:
        """Writes a file, beside `path` first, and renames it when complete.

        Args:
            path: its ending decides on the format: .mp4, .webm, .mkv, .gif, .webp, and .png or .jpg for one frame or,
                as frame-%04d.png, for numbered frames.
            codec, crf, with_metadata: see `Encoding`.

        Raises:
            MediaError: the format cannot hold what is asked for, the folder does not exist, the disk is full, or a side
                is an odd number of pixels.
        """
        encoding, count = Encoding(codec, crf, with_metadata=with_metadata), len(self.frames)
        with VideoWriter(path, self.size, self.fps, encoding=encoding, metadata=self.metadata, frames=count) as writer:
            writer.write(self.frames)
        return Path(path)

    def show(self) -> None:
        """Shows the video: in a notebook below the cell, elsewhere in the system's player, from a temporary file.

        The file stays for the player, in the system's folder of temporary files.

        Raises:
            KadrError: there is no player or no screen, or the mp4 cannot be written, see `save`.
        """
        if (display := notebook_display()) is not None:
            display(self)
            return
        find_opener()  # raises before anything is encoded
        folder = Path(mkdtemp(prefix="kadr-"))
        try:
            play(self.save(folder / "video.mp4"))
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def __repr__(self) -> str:
        return f"<Video {self._describe()}>"

    def _repr_html_(self) -> str:
        return video_in_memory_html(self.frames, self.save, self._describe(), self.notices)

    def _describe(self) -> str:
        return _describe(self.size, len(self.frames), self.fps, self.request)


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

    def show(self) -> None:
        """Shows the video: in a notebook below the cell, elsewhere in the system's player.

        Raises:
            KadrError: there is no player, or no screen.
        """
        if (display := notebook_display()) is not None:
            display(self)
        else:
            play(self.path)

    def __repr__(self) -> str:
        return f"<VideoFile {quote(str(self.path))}, {self._describe()}>"

    def _repr_html_(self) -> str:
        return video_file_html(self.path, self.size, self._describe(), self.notices)

    def _describe(self) -> str:
        return _describe(self.size, self.frames, self.fps, self.request)


def _describe(size: Size, num_frames: int, fps: float, request: Request) -> str:
    """Returns a video in a few words, on one line."""
    frames = f"{num_frames} frame{'' if num_frames == 1 else 's'} at {fps:g} per second"
    return f"{size}, {frames}, seed {request.seed}, {quote(request.prompt, MAX_PROMPT_SHOWN)}"
