"""Windows: a long video is made in stretches that overlap, each of a length that the model is good at.

A window knows the others by three things: the end of what there is, which it is shown as its own beginning; the
picture that the video began with, which it is shown as the frame before; and the colours of the first window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from kadr.errors import RequestError
from kadr.shapes import MAX_WINDOW_FRAMES, TEMPORAL_COMPRESSION, snap_frames

OVERLAP, STRENGTH, ADAIN, REMEMBER = 24, 1.0, 0.25, 1.0
SHORTEST = TEMPORAL_COMPRESSION + 1  # frames: two latents, of which one may overlap
BETWEEN = "|"  # the prompts of two windows
FOLDER = ".windows"  # the ending of where finished windows are kept


@dataclass(frozen=True, kw_only=True)
class Windows:
    """How a long video is made window by window. What is None is filled in when the model is known.

    Args:
        frames: of a window, made at the next 8k+1 up; None: as many as the model's recipe has.
        overlap: pixel frames that a window has in common with the one before, a multiple of 8; None: 24, but at most
            two thirds of a window.
        strength: in (0, 1]. How firmly a window is held to the end of the one before, as that of a `Condition`.
        adain: in [0, 1]. How far the colours and contrasts of each window are moved to those of the first.
        remember: in [0, 1]. How firmly every window is shown the picture at frame 0, as the frame before its own first
            one; 0 does not show it, None is 1 where there is such a picture.
    """

    frames: int | None = None
    overlap: int | None = None
    strength: float = STRENGTH
    adain: float = ADAIN
    remember: float | None = None

    def __post_init__(self) -> None:
        if self.frames is not None:
            if not isinstance(self.frames, int) or isinstance(self.frames, bool):
                raise RequestError(f"a window has {self.frames!r} frames; it must be a whole number of them.")
            if not 1 < self.frames <= MAX_WINDOW_FRAMES:
                raise RequestError(
                    f"a window has {self.frames} frames; it must have between {SHORTEST} and {MAX_WINDOW_FRAMES}."
                )
            object.__setattr__(self, "frames", snap_frames(self.frames))
        if self.overlap is not None:
            self._check_overlap()
        for name in ("strength", "adain", "remember"):
            _share(name, getattr(self, name))
        if self.strength == 0:
            raise RequestError(
                "the strength of the overlap is 0: windows would know nothing of each other. Give more than 0."
            )

    def _check_overlap(self) -> None:
        overlap: Any = self.overlap
        if not isinstance(overlap, int) or isinstance(overlap, bool):
            raise RequestError(f"the overlap of windows is {overlap!r}; it must be a whole number of frames.")
        if overlap < TEMPORAL_COMPRESSION or overlap % TEMPORAL_COMPRESSION:
            below = max(TEMPORAL_COMPRESSION, overlap // TEMPORAL_COMPRESSION * TEMPORAL_COMPRESSION)
            raise RequestError(
                f"the overlap of windows is {overlap} frames; it must be a multiple of {TEMPORAL_COMPRESSION}, such as {below}."
            )
        if self.frames is not None and overlap >= self.frames:
            raise RequestError(
                f"the overlap is {overlap} frames, and a window has {self.frames}: nothing new would come. Give at "
                f"most {self.frames - 1}."
            )

    @classmethod
    def of(cls, given: Any) -> Windows | None:
        """Windows from themselves, or what `dataclasses.asdict` made of them; None is none.

        Raises:
            RequestError: it is none of these.
            TypeError: a field that does not exist.
        """
        if given is None or isinstance(given, cls):
            return given
        if isinstance(given, dict):
            return cls(**given)
        raise RequestError(f"windows is {given!r}; it must be a Windows.")

    def filled(self, frames: int, *, picture: bool) -> Windows:
        """With nothing left open.

        Args:
            frames: of a window, if this does not say.
            picture: the video begins with a picture.

        Raises:
            RequestError: there is nothing to remember, or the overlap is too long.
        """
        if self.remember and not picture:
            raise RequestError(
                f"remember is {self.remember:g}, and there is no picture at frame 0 to be remembered. Give one, or "
                "leave it out."
            )
        length = snap_frames(self.frames or max(frames, SHORTEST))
        usual = min(OVERLAP, max(TEMPORAL_COMPRESSION, length * 2 // 3 // TEMPORAL_COMPRESSION * TEMPORAL_COMPRESSION))
        remember = REMEMBER * picture if self.remember is None else self.remember
        return replace(self, frames=length, overlap=self.overlap or usual, remember=remember)

    @property
    def latents(self) -> tuple[int, int]:
        """Latent frames of a window, and of the overlap, when nothing is left open."""
        assert self.frames is not None
        assert self.overlap is not None
        return (self.frames - 1) // TEMPORAL_COMPRESSION + 1, self.overlap // TEMPORAL_COMPRESSION

    def lasting(self, count: int) -> int:
        """The frames of a video of so many windows."""
        length, overlap = self.latents
        return (length + (count - 1) * (length - overlap) - 1) * TEMPORAL_COMPRESSION + 1

    def spans(self, frames: int) -> tuple[Span, ...]:
        """The windows of a video of `frames` frames; the last one may be shorter."""
        (length, overlap), total = self.latents, (snap_frames(frames) - 1) // TEMPORAL_COMPRESSION + 1
        starts = range(0, max(total - overlap, 1), length - overlap)
        return tuple(Span(start, min(start + length, total)) for start in starts)


class Span(NamedTuple):
    """Latent frames of the whole video that a window makes: from `start` to before `end`.

    Its own first latent stands for a single frame, as that of every video. In the whole video that place has eight
    frames, so from the second window on it is dropped.
    """

    start: int
    end: int

    @property
    def frames(self) -> int:
        """Pixel frames of the window alone."""
        return (self.end - self.start - 1) * TEMPORAL_COMPRESSION + 1

    @property
    def first_frame(self) -> int:
        """The pixel frame of the whole video that the window's frame 0 is."""
        return self.start * TEMPORAL_COMPRESSION

    @property
    def kept_from(self) -> int:
        """The first latent frame of the whole video that comes from this window."""
        return self.start + 1 if self.start else 0


def folder_of(video: Path) -> Path:
    """Where the finished windows of a video are kept while it is made."""
    return video.with_suffix(FOLDER)


def prompts_of(prompt: str) -> tuple[str, ...]:
    """The prompts of windows.

    Raises:
        RequestError: one is empty.
    """
    parts = tuple(part.strip() for part in prompt.split(BETWEEN))
    for number, part in enumerate(parts, 1):
        if not part:
            raise RequestError(
                f"prompt {number} of {len(parts)} is empty; write what each window shows, with {BETWEEN} between: "
                f'"a fox runs {BETWEEN} the fox sleeps".'
            )
    return parts


def check_prompts(prompts: Sequence[str], windows: int) -> None:
    """Refuse prompts that no window would show.

    Raises:
        RequestError: there are more of them than windows.
    """
    if len(prompts) > windows:
        raise RequestError(
            f"{len(prompts)} prompts are given, one for each window, and the video has {windows} "
            f"{'window' if windows == 1 else 'windows'}. Give more --frames or --seconds, or fewer prompts."
        )


def _share(name: str, value: Any) -> None:
    if value is None and name == "remember":
        return
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1:
        raise RequestError(f"{name} of windows is {value!r}; it must be a number between 0 and 1.")
