"""Writes the video of a generation into an mp4, frame by frame; windows of a long video are stored until then."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from kadr.errors import RequestError
from kadr.kernels.choices import record_choices
from kadr.media.writer import VideoWriter
from kadr.pipeline.generation import Generation
from kadr.pipeline.longvideo.window_folder import WindowFolder, check_resumable
from kadr.pipeline.metadata import restore_kernels, window_identity, with_outcome
from kadr.pipeline.video import VideoFile
from kadr.request.windows import window_folder_path


def write_video(generation: Generation, path: Path, metadata: dict[str, Any], *, resume: bool) -> VideoFile:
    """Generates the video and writes its frames as they are decoded.

    Args:
        metadata: see `metadata.video_metadata`.
        resume: see `Engine.write`.

    Raises:
        As `Engine.write`.
    """
    began, resolved = time.monotonic(), generation.resolved
    writer = VideoWriter(path, resolved.size, resolved.fps, metadata=lambda: with_outcome(metadata, generation))
    with _open_window_folder(generation, path, metadata, resume) as window_folder:
        # Sample windows before the writer opens its file: if interrupted, nothing but finished windows remains.
        windowed = None if window_folder is None else generation.denoise_windows(window_folder)
        with writer:
            latents = generation.denoise() if windowed is None else windowed
            # Closed also if the disk is full: the error keeps the stage's frame, which would keep the decoder acquired.
            with closing(generation.decode(latents)) as chunks:
                writer.write_all(frames.numpy() for frames in chunks)
        if not isinstance(latents, Tensor):
            latents = latents.to_tensor()
        if window_folder is not None:
            window_folder.remove()
    return VideoFile(
        path=path,
        frames=resolved.frames,
        size=resolved.size,
        fps=resolved.fps,
        seconds=time.monotonic() - began,
        latents=latents[0].cpu(),
        request=resolved.request,
        notices=generation.notices,
    )


@contextmanager
def _open_window_folder(
    generation: Generation, path: Path, metadata: dict[str, Any], resume: bool
) -> Iterator[WindowFolder | None]:
    """Yields the folder for the windows of a long video, or None for a video without windows."""
    folder = window_folder_path(path)
    if not generation.resolved.window_passes:
        if resume:
            raise RequestError(
                "there is nothing to resume: only a long video, made in windows, is stored before it is finished. "
                "Leave out --resume."
            )
        check_resumable(folder, resume=False)  # refuses to write over an unfinished long video
        yield None
        return
    identity, shapes = window_identity(generation, metadata), generation.window_latents_shapes()
    record = partial(record_choices, generation.device)
    with WindowFolder.open(folder, identity, shapes, resume=resume, record_kernels=record) as window_folder:
        restore_kernels(generation, window_folder.kernels)
        yield window_folder
