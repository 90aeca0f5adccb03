"""Media inputs of a request: conditions that the video must show, and controls that it follows."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from kadr.errors import RequestError
from kadr.quoting import quote
from kadr.shapes import MAX_FRAMES, MAX_SIDE
from kadr.validation import check_bool, check_path, check_range, is_number, is_whole_number

Input = TypeVar("Input", bound="Condition | Control")
CLIP_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")  # any other suffix is an image's
MAX_CLIP_FRAMES = 10**9  # a year at 30 per second; a larger number is a typing error
CANNY, DEPTH, POSE, READY = "canny", "depth", "pose", "ready"
CONTROL_KINDS = (CANNY, DEPTH, POSE, READY)


@dataclass(frozen=True, kw_only=True)
class Condition:
    """An image or clip that the video must show.

    Args:
        media: path of an image or a clip.
        frame: pixel frame at which it begins; 0 is the first. A negative frame counts from the end: at -1 an image is
            the last frame, and a clip ends with it. A clip that does not begin at 0 begins at a multiple of 8.
        strength: in (0, 1]. 1 keeps it unchanged; less lets it be denoised again from sigma 1 - strength on.
        is_clip: whether `media` is a clip; None decides by its suffix.
        frame_range: (first, end) frames of the clip to use, as a Python slice; None leaves an end open.
        box: (x, y, width, height) of the video, in pixels, that it covers, at frame 0 only; None covers all of it.
    """

    media: str = field(kw_only=False)
    frame: int = 0
    strength: float = 1.0
    is_clip: bool | None = None
    frame_range: tuple[int | None, int | None] | None = None
    box: tuple[int, int, int, int] | None = None

    def __post_init__(self) -> None:
        check_path("media of a condition", self.media)
        object.__setattr__(self, "media", str(self.media))
        check_range("strength", self.strength, 0.0, 1.0)
        if self.strength == 0:
            raise RequestError("strength is 0: the condition would have no effect. Give more than 0, or leave it out.")
        check_range("frame", self.frame, -MAX_FRAMES, MAX_FRAMES, is_whole=True)
        check_bool("is_clip", self.is_clip)
        if self.is_clip is None:
            object.__setattr__(self, "is_clip", Path(self.media).suffix.lower() in CLIP_SUFFIXES)
        if self.frame_range is not None:
            frame_range = _check_frame_range(self.frame_range, self.media, is_clip=bool(self.is_clip))
            object.__setattr__(self, "frame_range", frame_range)
        if self.box is not None:
            object.__setattr__(self, "box", self._checked_box())

    def _checked_box(self) -> tuple[int, int, int, int]:
        box = self.box
        if not isinstance(box, tuple | list) or len(box) != 4 or not all(is_number(side) for side in box):
            raise RequestError(f"box is {quote(box)}; it must be (x, y, width, height) in pixels.")
        x, y, width, height = (int(side) for side in box)
        if min(x, y) < 0 or min(width, height) < 1 or max(x, y, width, height) > MAX_SIDE:
            raise RequestError(
                f"box is {quote(box)}; x and y must not be below 0, width and height not below 1, none "
                f"above {MAX_SIDE}."
            )
        if self.frame != 0:
            raise RequestError(f"box is given at frame {self.frame}; only a condition at frame 0 can have a box.")
        return x, y, width, height


@dataclass(frozen=True, kw_only=True)
class Control:
    """A clip that the video follows, frame by frame, through an in-context LoRA (IC-LoRA).

    The LoRA's strength decides how closely. A control itself has no strength: in training the references are clean.

    Args:
        media: path of a clip, or of an image for a video of one frame.
        kind: the map of `media` that the LoRA is given: "canny" (edges), "depth" (near is bright), "pose"
            (skeletons); or "ready", `media` itself.
        frame_range: (first, end) frames of the clip to use, as a Python slice; None leaves an end open.
    """

    media: str = field(kw_only=False)
    kind: str = READY
    frame_range: tuple[int | None, int | None] | None = None

    def __post_init__(self) -> None:
        check_path("media of a control", self.media)
        object.__setattr__(self, "media", str(self.media))
        if self.kind not in CONTROL_KINDS:
            raise RequestError(
                f"the kind of control is {quote(self.kind)}; it must be one of {', '.join(CONTROL_KINDS)}."
            )
        if self.frame_range is not None:
            frame_range = _check_frame_range(self.frame_range, self.media, is_clip=self.is_clip)
            object.__setattr__(self, "frame_range", frame_range)

    @property
    def is_clip(self) -> bool:
        """True if `media` is a clip, by its suffix."""
        return Path(self.media).suffix.lower() in CLIP_SUFFIXES

    def __str__(self) -> str:
        return self.media if self.kind == READY else f"{self.kind} of {self.media}"


def _check_frame_range(frame_range: Any, media: str, *, is_clip: bool) -> tuple[int | None, int | None]:
    if (
        not isinstance(frame_range, tuple | list)
        or len(frame_range) != 2
        or not all(_is_range_end(end) for end in frame_range)
    ):
        raise RequestError(
            f"frame_range is {quote(frame_range)}; it must be (first, end) frames of the clip, up to "
            f"{MAX_CLIP_FRAMES:,}; None leaves one open."
        )
    if not is_clip:
        raise RequestError(f"frame_range is given, but {media} is an image. Only a clip has a frame range.")
    return frame_range[0], frame_range[1]


def _is_range_end(value: Any) -> bool:
    return value is None or (is_whole_number(value) and abs(value) <= MAX_CLIP_FRAMES)


def as_tuple_of(kind: type[Input], values: Any, name: str) -> tuple[Input, ...]:
    """Returns the values as a tuple, if all of them are conditions or all are controls.

    Args:
        kind: `Condition` or `Control`.
        name: of the field, for the message.

    Raises:
        RequestError: they are not a list of `kind`.
    """
    if not isinstance(values, tuple | list) or not all(isinstance(value, kind) for value in values):
        raise RequestError(f"{name} are {quote(values)}; they must be a list of {kind.__name__}(media=...).")
    return tuple(values)
