"""Writes the video of a generation into its file, frame by frame; windows of a long video are stored until then."""

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
from kadr.media.clip import ClipHeader, probe_video
from kadr.media.encoders.formats import Encoding
from kadr.media.encoders.sound import Sound, has_sound
from kadr.media.frame_rate import exact_fps
from kadr.media.writer import VideoWriter
from kadr.pipeline.generation import Generation
from kadr.pipeline.longvideo.window_folder import WindowFolder, check_resumable
from kadr.pipeline.metadata import restore_kernels, window_identity, with_outcome
from kadr.pipeline.video import VideoFile
from kadr.request.request import Request
from kadr.request.windows import window_folder_path

MAX_FPS_DIFFERENCE = 0.005  # of the rates of a clip and a video that has its sound: 25 ms in 5 s


def write_video(
    generation: Generation, path: Path, metadata: dict[str, Any], encoding: Encoding, *, resume: bool
) -> VideoFile:
    """Generates the video and writes its frames as they are decoded.

    Args:
        metadata: see `metadata.video_metadata`.
        encoding: see `Engine.write`.
        resume: see `Engine.write`.

    Raises:
        As `Engine.write`.
    """
    began, resolved = time.monotonic(), generation.resolved
    writer = VideoWriter(
        path,
        resolved.size,
        resolved.fps,
        encoding=encoding,
        metadata=lambda: with_outcome(metadata, generation),
        sound=find_sound(resolved.request, resolved.frames, resolved.fps) if encoding.keep_audio else None,
        frames=resolved.frames,
    )
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


def find_sound(request: Request, frames: int, fps: float) -> Sound:
    """Returns the sound that a video keeps: that of its input video, else of the only clip that is a condition.

    The sound of a condition begins where its frames do.

    Args:
        frames, fps: of the video.

    Raises:
        RequestError: there is no clip or more than one, it has no sound, or plays at another rate.
        MediaError: the clip cannot be read.
    """
    clips = [condition for condition in request.conditions if condition.is_clip]
    rate = exact_fps(fps)
    if request.input_video is not None:
        header, path, start, delay = _heard(request.input_video, fps), request.input_video, 0, 0
    elif len(clips) == 1:
        (clip,) = clips
        header, path = _heard(clip.media, fps), clip.media
        first, end, _ = slice(*(clip.frame_range or (None, None))).indices(header.frames)
        begins = clip.frame if clip.frame >= 0 else frames + clip.frame + 1 - (end - first)
        start, delay = first + max(0, -begins), max(0, begins)
    else:
        raise RequestError(
            f"the sound to keep is that of the input video, or of one clip that is a condition; there are {len(clips)} "
            "such clips. Give one, or do not keep the sound."
        )
    return Sound(Path(path), start / header.fps, delay / rate, frames / rate)


def _heard(path: str, fps: float) -> ClipHeader:
    """Returns the header of a clip whose sound fits a video of that rate."""
    if not has_sound(path):
        raise RequestError(f"{path} has no sound to keep. Do not ask for it, or give a clip that has some.")
    header = probe_video(path)
    if abs(float(header.fps) / fps - 1) > MAX_FPS_DIFFERENCE:
        raise RequestError(
            f"{path} plays at {float(header.fps):g} frames per second and the video at {fps:g}, so its sound would not "
            f"fit. Make the video at {float(header.fps):g}, or do not keep the sound."
        )
    return header


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
