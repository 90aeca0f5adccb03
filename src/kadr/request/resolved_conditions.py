"""The request's pictures and clips: looked into, given their places, and checked against each other.

A clip is cut to 8k+1 frames as trim_conditioning_sequence of the official package does, with a warning.
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
    """A condition whose medium is known to be there and whole.

    Args:
        frames: the pictures; 8k+1 of them. Those of a clip are decoded when they are gone through.
        start_frame: pixel frame of the video at which they begin, 0 or later.
    """

    condition: Condition
    frames: Frames
    start_frame: int

    @property
    def end_frame(self) -> int:
        return self.start_frame + len(self.frames)

    def __str__(self) -> str:
        what = (
            f"frame {self.start_frame}"
            if len(self.frames) == 1
            else f"frames {self.start_frame} to {self.end_frame - 1}"
        )
        return f"{self.condition.media} ({what})"


def resolve_conditions(request: Request) -> list[ResolvedCondition]:
    """Look into all conditions of a request whose frames are known, and check that each has its place.

    Raises:
        MediaError: a file cannot be read.
        RequestError: a condition lies past the end, begins where it cannot, or lies over another.
    """
    assert request.frames is not None
    placed = [_resolve_condition(condition, request.frames) for condition in request.conditions]
    for one, other in combinations(placed, 2):
        if conditions_intersect(one, other):
            raise RequestError(f"two conditions lie over each other: {one} and {other}. Leave one out, or move it.")
    return placed


def _resolve_condition(condition: Condition, frames: int) -> ResolvedCondition:
    """The condition in a video of `frames` frames, made at the next 8k+1 up."""
    if condition.is_clip:
        return _resolve_clip(condition, frames)
    start = condition.frame if condition.frame >= 0 else frames + condition.frame
    if not 0 <= start < frames:
        raise _out_of_range_error(condition, frames)
    load_image(condition.media)  # refuses here what is no picture; later it is read by its path, which errors name
    return ResolvedCondition(condition, [condition.media], start)


def _resolve_clip(condition: Condition, frames: int) -> ResolvedCondition:
    made, by_end = snap_frames(frames), condition.frame < 0
    at = made + condition.frame if by_end else condition.frame  # where it ends, or begins
    if not 0 <= at < (made if by_end else frames):
        raise _out_of_range_error(condition, frames)
    pictures = _trim_clip(condition, open_condition_clip(condition), at + 1 if by_end else made - at)
    start = at + 1 - len(pictures) if by_end else at
    if start >= frames:
        raise _out_of_range_error(condition, frames)
    if start % TEMPORAL_COMPRESSION and len(pictures) > 1:
        below = start // TEMPORAL_COMPRESSION * TEMPORAL_COMPRESSION
        raise RequestError(
            f"{condition.media} is to begin at frame {start}; a clip begins at a multiple of {TEMPORAL_COMPRESSION}: "
            f"{below} or {below + TEMPORAL_COMPRESSION}."
        )
    if by_end and at >= frames:
        _warn(
            f"{condition.media} ends at frame {at}, and the video after {frames} frames, so its last {at + 1 - frames} "
            f"are not shown. Ask for {made} frames."
        )
    return ResolvedCondition(condition, pictures, start)


def _out_of_range_error(condition: Condition, frames: int) -> RequestError:
    return RequestError(
        f"{condition.media} is to stand at frame {condition.frame}, past the ends of a video of {frames} frames. "
        f"Give 0 to {frames - 1}, or more frames."
    )


def open_condition_clip(condition: Condition) -> ClipReader:
    """The frames of a clip that are asked for.

    Raises:
        MediaError: it cannot be read.
        RequestError: there is none.
    """
    chosen = open_clip(condition.media, condition.frame_range)
    if not len(chosen):
        count, _ = probe_video(condition.media)
        told = _format_range(*(condition.frame_range or (None, None)))
        raise RequestError(f"the part {told} of {condition.media} is empty; the clip has {count} frames.")
    return chosen


def open_clip(
    media: str, frame_range: tuple[int | None, int | None] | None, max_frames: int | None = None
) -> ClipReader:
    """A part of a clip, as a slice of Python's: some of the frames that can be read, or none.

    Args:
        max_frames: frames that are wanted; more are not looked into where that can be told from the front.

    Raises:
        MediaError: it cannot be read.
    """
    first, end = frame_range or (None, None)
    limit = None
    if (first is None or first >= 0) and (end is None or end >= 0):
        ends = [*([end] if end is not None else []), *([(first or 0) + max_frames] if max_frames is not None else [])]
        limit = max(1, min(ends)) if ends else None
    film = ClipReader.open(media, limit)
    return film.select(range(len(film))[first:end])


def _format_range(first: int | None, end: int | None) -> str:
    return f"{'' if first is None else first}:{'' if end is None else end}"


def _trim_clip(condition: Condition, clip: ClipReader, max_frames: int) -> ClipReader:
    """As many frames as fit, 8k+1: the first ones, or the last where the clip is placed by its end."""
    count = min(len(clip), max_frames)
    kept = (count - 1) // TEMPORAL_COMPRESSION * TEMPORAL_COMPRESSION + 1
    if kept < len(clip):
        which = "last" if condition.frame < 0 else "first"
        _warn(
            f"{condition.media} has {len(clip)} frames for {max_frames}; clips are used in 8k+1, so its {which} {kept} "
            "are."
        )
    every = range(len(clip))
    return clip.select(every[-kept:] if condition.frame < 0 else every[:kept])


def _warn(message: str) -> None:
    warnings.warn(message, KadrWarning, stacklevel=2)


def conditions_intersect(one: ResolvedCondition, other: ResolvedCondition) -> bool:
    """Whether there is a frame, and a pixel of it, that both cover."""
    if one.end_frame <= other.start_frame or other.end_frame <= one.start_frame:
        return False
    if one.condition.box is None or other.condition.box is None:
        return True
    (x, y, width, height), (u, v, across, down) = one.condition.box, other.condition.box
    return x < u + across and u < x + width and y < v + down and v < y + height


def open_input_video(request: Request) -> ClipReader:
    """The frames of the video that a request starts from, 8k+1 of them: the last is repeated to fill them up.

    Raises:
        MediaError: it cannot be read.
        RequestError: it is shorter than what is to be made.
    """
    assert request.input_video is not None
    assert request.frames is not None
    film = ClipReader.open(request.input_video, request.frames)
    if len(film) < request.frames:
        raise RequestError(
            f"{request.input_video} has {len(film)} frames, and {request.frames} are to be made from it. "
            f"Ask for {len(film)} or fewer."
        )
    last = len(film) - 1
    return film.select(min(place, last) for place in range(snap_frames(request.frames)))
