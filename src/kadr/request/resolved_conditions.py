"""Conditions resolved for a video: their media are placed at a frame, and checked against each other.

A clip is trimmed to 8k+1 frames as trim_conditioning_sequence of the official package does, with a warning: by the
frames that are asked for, not by the 8k+1 that are sampled.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from kadr.errors import KadrWarning, RequestError
from kadr.request.inputs import Condition
from kadr.request.resolved_media import ResolvedMedia, resolve_condition_clip
from kadr.shapes import TEMPORAL_COMPRESSION, snap_frames

Box = tuple[int, int, int, int]  # x, y, width and height


@dataclass(frozen=True)
class ResolvedCondition:
    """A condition whose image or clip exists.

    Args:
        media: its 8k+1 frames.
        start_frame: pixel frame of the video at which they begin, 0 or later.
    """

    condition: Condition
    media: ResolvedMedia
    start_frame: int

    @property
    def end_frame(self) -> int:
        """Pixel frame of the video after the last one."""
        return self.start_frame + len(self.media)

    def __str__(self) -> str:
        last_frame = self.end_frame - 1
        frames = f"frame {last_frame}" if len(self.media) == 1 else f"frames {self.start_frame} to {last_frame}"
        return f"{self.condition.media} ({frames})"


def resolve_conditions(conditions: Sequence[Condition], frames: int) -> tuple[ResolvedCondition, ...]:
    """Places the conditions of a request in a video of `frames` frames.

    Raises:
        MediaError: a file cannot be read.
        RequestError: a condition lies outside the video, begins where it must not, or overlaps another.
    """
    resolved = tuple(_resolve_condition(condition, frames) for condition in conditions)
    for first, second in combinations(resolved, 2):
        if conditions_intersect(first, second):
            raise RequestError(f"two conditions overlap: {first} and {second}. Leave one out, or move it.")
    return resolved


def _resolve_condition(condition: Condition, frames: int) -> ResolvedCondition:
    """Returns the condition in a video of `frames` frames."""
    if condition.is_clip:
        return _resolve_clip(condition, frames)
    start = condition.frame if condition.frame >= 0 else frames + condition.frame
    if not 0 <= start < frames:
        raise _out_of_range_error(condition, frames)
    return ResolvedCondition(condition, ResolvedMedia.from_image(condition.media), start)


def _resolve_clip(condition: Condition, frames: int) -> ResolvedCondition:
    """Returns a clip at its frame. One placed by its end may end in the frames that are sampled and not shown."""
    sampled_frames, is_placed_by_end = snap_frames(frames), condition.frame < 0
    at = sampled_frames + condition.frame if is_placed_by_end else condition.frame  # its last frame, or its first
    if not 0 <= at < (sampled_frames if is_placed_by_end else frames):
        raise _out_of_range_error(condition, frames)
    max_frames = at + 1 if is_placed_by_end else frames - at
    clip = _trim_clip(condition, resolve_condition_clip(condition.media, condition.frame_range), max_frames)
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


def _trim_clip(condition: Condition, clip: ResolvedMedia, max_frames: int) -> ResolvedMedia:
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
    warnings.warn(KadrWarning(message, topic="clip"), stacklevel=2)


def conditions_intersect(first: ResolvedCondition, second: ResolvedCondition) -> bool:
    """Returns whether both conditions cover the same pixel of the same frame."""
    if first.end_frame <= second.start_frame or second.end_frame <= first.start_frame:
        return False
    if first.condition.box is None or second.condition.box is None:
        return True
    x1, y1, width1, height1 = first.condition.box
    x2, y2, width2, height2 = second.condition.box
    return x1 < x2 + width2 and x2 < x1 + width1 and y1 < y2 + height2 and y2 < y1 + height1
