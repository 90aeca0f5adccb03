"""Conditions resolved for a video: their media are opened, placed at a frame, and checked against each other.

A clip is trimmed to 8k+1 frames as trim_conditioning_sequence of the official package does, with a warning.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from kadr.errors import KadrWarning, RequestError
from kadr.media.clip import ClipReader, probe_video
from kadr.media.image import load_image
from kadr.request.inputs import Condition
from kadr.request.request import Request
from kadr.shapes import TEMPORAL_COMPRESSION, snap_frames

Frames = Sequence["str | np.ndarray"] | ClipReader
Box = tuple[int, int, int, int]  # x, y, width and height


@dataclass(frozen=True)
class ResolvedCondition:
    """A condition whose image or clip exists and can be read.

    Args:
        frames: 8k+1 frames. Those of a clip are decoded when they are iterated over.
        start_frame: pixel frame of the video at which they begin, 0 or later.
    """

    condition: Condition
    frames: Frames
    start_frame: int

    @property
    def end_frame(self) -> int:
        """Pixel frame of the video after the last one."""
        return self.start_frame + len(self.frames)

    def __str__(self) -> str:
        last_frame = self.end_frame - 1
        frames = f"frame {last_frame}" if len(self.frames) == 1 else f"frames {self.start_frame} to {last_frame}"
        return f"{self.condition.media} ({frames})"


def resolve_conditions(request: Request) -> list[ResolvedCondition]:
    """Opens all conditions of a request whose frames are known, and places them.

    Raises:
        MediaError: a file cannot be read.
        RequestError: a condition lies outside the video, begins where it must not, or overlaps another.
    """
    assert request.frames is not None
    conditions = [_resolve_condition(condition, request.frames) for condition in request.conditions]
    for first, second in combinations(conditions, 2):
        if conditions_intersect(first, second):
            raise RequestError(f"two conditions overlap: {first} and {second}. Leave one out, or move it.")
    return conditions


def _resolve_condition(condition: Condition, frames: int) -> ResolvedCondition:
    """Returns the condition in a video of `frames` frames, which is sampled at the next 8k+1 up."""
    if condition.is_clip:
        return _resolve_clip(condition, frames)
    start = condition.frame if condition.frame >= 0 else frames + condition.frame
    if not 0 <= start < frames:
        raise _out_of_range_error(condition, frames)
    load_image(condition.media)  # refuses a bad image here; it is read again by its path, which errors name
    return ResolvedCondition(condition, [condition.media], start)


def _resolve_clip(condition: Condition, frames: int) -> ResolvedCondition:
    sampled_frames, is_placed_by_end = snap_frames(frames), condition.frame < 0
    at = sampled_frames + condition.frame if is_placed_by_end else condition.frame  # its last frame, or its first
    if not 0 <= at < (sampled_frames if is_placed_by_end else frames):
        raise _out_of_range_error(condition, frames)
    max_frames = at + 1 if is_placed_by_end else sampled_frames - at
    clip = _trim_clip(condition, open_condition_clip(condition), max_frames)
    start = at + 1 - len(clip) if is_placed_by_end else at
    if start >= frames:
        raise _out_of_range_error(condition, frames)
    if start % TEMPORAL_COMPRESSION and len(clip) > 1:
        raise _misaligned_start_error(condition, start)
    if is_placed_by_end and at >= frames:
        _warn(
            f"{condition.media} ends at frame {at}, but the video has {frames} frames, so the clip's last "
            f"{at + 1 - frames} are not shown. Ask for {sampled_frames} frames."
        )
    return ResolvedCondition(condition, clip, start)


def _out_of_range_error(condition: Condition, frames: int) -> RequestError:
    return RequestError(
        f"{condition.media} is placed at frame {condition.frame}, outside a video of {frames} frames. "
        f"Give 0 to {frames - 1}, or more frames."
    )


def _misaligned_start_error(condition: Condition, start: int) -> RequestError:
    below = start // TEMPORAL_COMPRESSION * TEMPORAL_COMPRESSION
    return RequestError(
        f"{condition.media} would begin at frame {start}; a clip must begin at a multiple of "
        f"{TEMPORAL_COMPRESSION}: {below} or {below + TEMPORAL_COMPRESSION}."
    )


def open_condition_clip(condition: Condition) -> ClipReader:
    """Opens the frame range of a condition's clip.

    Raises:
        MediaError: the clip cannot be read.
        RequestError: the range is empty.
    """
    clip = open_clip(condition.media, condition.frame_range)
    if not len(clip):
        count, _ = probe_video(condition.media)
        frame_range = _format_range(*(condition.frame_range or (None, None)))
        raise RequestError(f"the range {frame_range} of {condition.media} is empty; the clip has {count} frames.")
    return clip


def open_clip(
    media: str, frame_range: tuple[int | None, int | None] | None, max_frames: int | None = None
) -> ClipReader:
    """Opens a frame range of a clip; it may be empty.

    Args:
        frame_range: (first, end) as a Python slice; None is the whole clip.
        max_frames: number of frames needed; the reader stops there, unless the range counts from the end.

    Raises:
        MediaError: the clip cannot be read.
    """
    first, end = frame_range or (None, None)
    limit = None
    if (first is None or first >= 0) and (end is None or end >= 0):
        ends = [*([end] if end is not None else []), *([(first or 0) + max_frames] if max_frames is not None else [])]
        limit = max(1, min(ends)) if ends else None
    clip = ClipReader.open(media, limit)
    return clip.select(range(len(clip))[first:end])


def _format_range(first: int | None, end: int | None) -> str:
    return f"{'' if first is None else first}:{'' if end is None else end}"


def _trim_clip(condition: Condition, clip: ClipReader, max_frames: int) -> ClipReader:
    """Returns the 8k+1 frames that fit: the first ones, or the last ones if the clip is placed by its end."""
    available = min(len(clip), max_frames)
    used = (available - 1) // TEMPORAL_COMPRESSION * TEMPORAL_COMPRESSION + 1
    if used < len(clip):
        which = "last" if condition.frame < 0 else "first"
        _warn(
            f"{condition.media} has {len(clip)} frames and {max_frames} fit; a clip is used in 8k+1 frames, so only "
            f"its {which} {used} are."
        )
    indices = range(len(clip))
    return clip.select(indices[-used:] if condition.frame < 0 else indices[:used])


def _warn(message: str) -> None:
    warnings.warn(message, KadrWarning, stacklevel=2)


def conditions_intersect(first: ResolvedCondition, second: ResolvedCondition) -> bool:
    """Returns whether both conditions cover the same pixel of the same frame."""
    if first.end_frame <= second.start_frame or second.end_frame <= first.start_frame:
        return False
    if first.condition.box is None or second.condition.box is None:
        return True
    x1, y1, width1, height1 = first.condition.box
    x2, y2, width2, height2 = second.condition.box
    return x1 < x2 + width2 and x2 < x1 + width1 and y1 < y2 + height2 and y2 < y1 + height1


def open_input_video(request: Request) -> ClipReader:
    """Opens the 8k+1 frames of the input video that a request needs; its last frame is repeated to fill them up.

    Raises:
        MediaError: it cannot be read.
        RequestError: it is shorter than the requested video.
    """
    assert request.input_video is not None
    assert request.frames is not None
    clip = ClipReader.open(request.input_video, request.frames)
    if len(clip) < request.frames:
        raise RequestError(
            f"{request.input_video} has {len(clip)} frames, fewer than the {request.frames} of the video. "
            f"Ask for {len(clip)} or fewer."
        )
    last = len(clip) - 1
    return clip.select(min(frame, last) for frame in range(snap_frames(request.frames)))
