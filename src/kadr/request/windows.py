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

DEFAULT_OVERLAP, DEFAULT_OVERLAP_STRENGTH, DEFAULT_ADAIN, DEFAULT_ANCHOR_STRENGTH = 24, 1.0, 0.25, 1.0
MIN_WINDOW_FRAMES = TEMPORAL_COMPRESSION + 1  # frames: two latents, of which one may overlap
PROMPT_SEPARATOR = "|"  # the prompts of two windows
WINDOWS_SUFFIX = ".windows"  # the ending of where finished windows are kept


@dataclass(frozen=True, kw_only=True)
class Windows:
    """How a long video is made window by window. What is None is filled in when the model is known.

    Args:
        frames: of a window, made at the next 8k+1 up; None: as many as the model's recipe has.
        overlap: pixel frames that a window has in common with the one before, a multiple of 8; None: 24, but at most
            two thirds of a window.
        overlap_strength: in (0, 1]. How firmly a window is held to the end of the one before, as that of a `Condition`.
        adain: in [0, 1]. How far the colours and contrasts of each window are moved to those of the first.
        anchor_strength: in [0, 1]. How firmly every window is shown the picture at frame 0, as the frame before its own first
            one; 0 does not show it, None is 1 where there is such a picture.
    """

    frames: int | None = None
    overlap: int | None = None
    overlap_strength: float = DEFAULT_OVERLAP_STRENGTH
    adain: float = DEFAULT_ADAIN
    anchor_strength: float | None = None

    def __post_init__(self) -> None:
        if self.frames is not None:
            if not isinstance(self.frames, int) or isinstance(self.frames, bool):
                raise RequestError(f"a window has {self.frames!r} frames; it must be a whole number of them.")
            if not 1 < self.frames <= MAX_WINDOW_FRAMES:
                raise RequestError(
                    f"a window has {self.frames} frames; it must have between {MIN_WINDOW_FRAMES} and {MAX_WINDOW_FRAMES}."
                )
            object.__setattr__(self, "frames", snap_frames(self.frames))
        if self.overlap is not None:
            self._check_overlap()
        for name in ("overlap_strength", "adain", "anchor_strength"):
            _check_fraction(name, getattr(self, name))
        if self.overlap_strength == 0:
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
    def parse(cls, value: Any) -> Windows | None:
        """Windows from themselves, or what `dataclasses.asdict` made of them; None is none.

        Raises:
            RequestError: it is none of these.
            TypeError: a field that does not exist.
        """
        if value is None or isinstance(value, cls):
            return value
        if isinstance(value, dict):
            return cls(**value)
        raise RequestError(f"windows is {value!r}; it must be a Windows.")

    def with_defaults(self, default_frames: int, *, has_anchor_image: bool) -> Windows:
        """With nothing left open.

        Args:
            default_frames: of a window, if this does not say.
            has_anchor_image: the video begins with a picture.

        Raises:
            RequestError: there is nothing to remember, or the overlap is too long.
        """
        if self.anchor_strength and not has_anchor_image:
            raise RequestError(
                f"remember is {self.anchor_strength:g}, and there is no picture at frame 0 to be remembered. Give one, or "
                "leave it out."
            )
        length = snap_frames(self.frames or max(default_frames, MIN_WINDOW_FRAMES))
        usual = min(
            DEFAULT_OVERLAP, max(TEMPORAL_COMPRESSION, length * 2 // 3 // TEMPORAL_COMPRESSION * TEMPORAL_COMPRESSION)
        )
        remember = DEFAULT_ANCHOR_STRENGTH * has_anchor_image if self.anchor_strength is None else self.anchor_strength
        return replace(self, frames=length, overlap=self.overlap or usual, anchor_strength=remember)

    @property
    def latent_frames(self) -> tuple[int, int]:
        """Latent frames of a window, and of the overlap, when nothing is left open."""
        assert self.frames is not None
        assert self.overlap is not None
        return (self.frames - 1) // TEMPORAL_COMPRESSION + 1, self.overlap // TEMPORAL_COMPRESSION

    def total_frames(self, window_count: int) -> int:
        """The frames of a video of so many windows."""
        length, overlap = self.latent_frames
        return (length + (window_count - 1) * (length - overlap) - 1) * TEMPORAL_COMPRESSION + 1

    def spans(self, frames: int) -> tuple[Span, ...]:
        """The windows of a video of `frames` frames; the last one may be shorter."""
        (length, overlap), total = self.latent_frames, (snap_frames(frames) - 1) // TEMPORAL_COMPRESSION + 1
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
    def output_start(self) -> int:
        """The first latent frame of the whole video that comes from this window."""
        return self.start + 1 if self.start else 0


def window_folder_path(video_path: Path) -> Path:
    """Where the finished windows of a video are kept while it is made."""
    return video_path.with_suffix(WINDOWS_SUFFIX)


def split_prompts(prompt: str) -> tuple[str, ...]:
    """The prompts of windows.

    Raises:
        RequestError: one is empty.
    """
    parts = tuple(part.strip() for part in prompt.split(PROMPT_SEPARATOR))
    for number, part in enumerate(parts, 1):
        if not part:
            raise RequestError(
                f"prompt {number} of {len(parts)} is empty; write what each window shows, with {PROMPT_SEPARATOR} between: "
                f'"a fox runs {PROMPT_SEPARATOR} the fox sleeps".'
            )
    return parts


def check_prompt_count(prompts: Sequence[str], window_count: int) -> None:
    """Refuse prompts that no window would show.

    Raises:
        RequestError: there are more of them than windows.
    """
    if len(prompts) > window_count:
        raise RequestError(
            f"{len(prompts)} prompts are given, one for each window, and the video has {window_count} "
            f"{'window' if window_count == 1 else 'windows'}. Give more --frames or --seconds, or fewer prompts."
        )


def _check_fraction(name: str, value: Any) -> None:
    if value is None and name == "anchor_strength":
        return
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1:
        raise RequestError(f"{name} of windows is {value!r}; it must be a number between 0 and 1.")
