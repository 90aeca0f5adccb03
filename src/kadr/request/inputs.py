"""What a request is shown: pictures and clips that the video must show, and videos that it follows."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from kadr.errors import RequestError
from kadr.shapes import MAXIMUM_FRAMES
from kadr.validation import is_number, true_or_false, within

Given = TypeVar("Given", bound="Condition | Control")
CLIPS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")  # endings that are taken for clips; others are pictures
CANNY, DEPTH, POSE, READY = "canny", "depth", "pose", "ready"
CONTROLS = (CANNY, DEPTH, POSE, READY)


@dataclass(frozen=True, kw_only=True)
class Condition:
    """A picture or clip that the video must show.

    Args:
        media: path of a picture, or of a clip.
        frame: pixel frame at which it begins; 0 is the first. Below 0 it is counted from the end: at -1 a picture is
            the last frame, and a clip ends with it. A clip that does not begin at 0 begins at a multiple of 8.
        strength: in (0, 1]. 1 keeps it as it is; less lets it be repainted from noise level 1 - strength on.
        clip: whether `media` is a clip; None: as its ending says.
        part: (first, end) frames of the clip that are taken, as a slice of Python's; None where it is open.
        box: (x, y, width, height) of the video, in pixels, that it covers, at frame 0; None: all.
    """

    media: str = field(kw_only=False)
    frame: int = 0
    strength: float = 1.0
    clip: bool | None = None
    part: tuple[int | None, int | None] | None = None
    box: tuple[int, int, int, int] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "media", str(self.media))
        within("strength", self.strength, 0.0, 1.0)
        if self.strength == 0:
            raise RequestError("strength is 0: the picture would do nothing. Give more than 0, or leave it out.")
        within("frame", self.frame, -MAXIMUM_FRAMES, MAXIMUM_FRAMES, whole=True)
        true_or_false("clip", self.clip)
        if self.clip is None:
            object.__setattr__(self, "clip", Path(self.media).suffix.lower() in CLIPS)
        if self.part is not None:
            object.__setattr__(self, "part", _part(self.part, self.media, clip=bool(self.clip)))
        if self.box is not None:
            object.__setattr__(self, "box", self._box())

    def _box(self) -> tuple[int, int, int, int]:
        box = self.box
        if not isinstance(box, tuple | list) or len(box) != 4 or not all(is_number(side) for side in box):
            raise RequestError(f"box is {box!r}; it must be (x, y, width, height) in pixels.")
        x, y, width, height = (int(side) for side in box)
        if min(x, y) < 0 or min(width, height) < 1:
            raise RequestError(f"box is {box}; x and y must not be below 0, width and height not below 1.")
        if self.frame != 0:
            raise RequestError(
                f"box is given at frame {self.frame}; only at frame 0 can a part of the picture be given."
            )
        return x, y, width, height


@dataclass(frozen=True, kw_only=True)
class Control:
    """A video that the new one follows, frame by frame, through an in-context LoRA.

    How closely is the LoRA's strength: the references that these were trained with are always clean.

    Args:
        media: path of a clip, or of a picture for a video of one frame.
        kind: what the LoRA is shown of it: "canny" (edges), "depth" (near is bright), "pose" (skeletons), each made
            from `media`; or "ready", `media` as it is.
        part: (first, end) frames of the clip that are taken, as a slice of Python's; None where it is open.
    """

    media: str = field(kw_only=False)
    kind: str = READY
    part: tuple[int | None, int | None] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "media", str(self.media))
        if self.kind not in CONTROLS:
            raise RequestError(f"the kind of control is {self.kind!r}; it must be one of {', '.join(CONTROLS)}.")
        if self.part is not None:
            object.__setattr__(self, "part", _part(self.part, self.media, clip=self.clip))

    @property
    def clip(self) -> bool:
        """Whether `media` is a clip, by its ending."""
        return Path(self.media).suffix.lower() in CLIPS

    def __str__(self) -> str:
        return self.media if self.kind == READY else f"{self.kind} of {self.media}"


def _part(part: Any, media: str, *, clip: bool) -> tuple[int | None, int | None]:
    if not isinstance(part, tuple | list) or len(part) != 2 or not all(_is_end(end) for end in part):
        raise RequestError(f"part is {part!r}; it must be (first, end) frames of the clip; None leaves one open.")
    if not clip:
        raise RequestError(f"part is given, but {media} is a picture. Only a clip has parts.")
    return part[0], part[1]


def _is_end(value: Any) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool))


def all_of(kind: type[Given], given: Any, name: str) -> tuple[Given, ...]:
    """Conditions, or controls, if they are.

    Raises:
        RequestError: with what they are. name: as a message calls them.
    """
    if not isinstance(given, tuple | list) or not all(isinstance(one, kind) for one in given):
        raise RequestError(f"{name} are {given!r}; they must be a list of {kind.__name__}(media=...).")
    return tuple(given)
