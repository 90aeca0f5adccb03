"""Windows of a long video: stretches that overlap, each of a length that the model is good at.

Three things tie a window to the others: it starts with the last frames of the window before (the overlap), it is shown
the image at frame 0 as the frame before its first one (the anchor image), and its latents' statistics are moved towards
those of the first window (AdaIN).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from kadr.errors import RequestError
from kadr.quoting import quote
from kadr.shapes import MAX_WINDOW_FRAMES, TEMPORAL_COMPRESSION, snap_frames
from kadr.validation import check_fields, check_range, is_whole_number

DEFAULT_OVERLAP, DEFAULT_OVERLAP_STRENGTH, DEFAULT_ADAIN, DEFAULT_ANCHOR_STRENGTH = 24, 1.0, 0.25, 1.0
MIN_WINDOW_FRAMES = TEMPORAL_COMPRESSION + 1  # two latent frames, of which one may overlap
PROMPT_SEPARATOR = "|"  # between the prompts of two windows
MAX_TIMES_LISTED = 8  # of windows, in an error
TIME_TOLERANCE = 1e-6  # seconds
# "0-3s: a fox runs", "3.5s-: the fox sleeps": the s of seconds tells a time from a prompt that begins with numbers.
_TIME = re.compile(
    r"(?=[\d.\s-]*s)(?P<time>(?P<start>\d+(?:\.\d+)?)\s*s?\s*-\s*(?P<end>\d+(?:\.\d+)?)?\s*s?)\s*:\s*(?P<text>.*\S)\s*",
    re.DOTALL,
)
_TIME_ADVICE = 'Write "0-3s: a fox runs", then "3s-: the fox sleeps": no gaps; an end may be left open.'
WINDOWS_SUFFIX = ".windows"  # suffix of the folder of finished windows


@dataclass(frozen=True, kw_only=True)
class Windows:
    """Settings for sampling a long video window by window. A field that is None is resolved when the model is known.

    Args:
        frames: frames of a window, sampled at the next 8k+1 up; None takes the length of the model's recipe.
        overlap: pixel frames that a window has in common with the one before, a multiple of 8; None is 24, but at most
            two thirds of a window.
        overlap_strength: in (0, 1]; strength of the overlap as a condition, see `Condition`.
        adain: in [0, 1]; how far the statistics of each window's latents are moved towards those of the first window.
        anchor_strength: in [0, 1]; strength with which every window is shown the image at frame 0, as the frame before
            its first one. 0 is off; None is 1 where there is such an image.
    """

    frames: int | None = None
    overlap: int | None = None
    overlap_strength: float = DEFAULT_OVERLAP_STRENGTH
    adain: float = DEFAULT_ADAIN
    anchor_strength: float | None = None

    def __post_init__(self) -> None:
        if self.frames is not None:
            if not is_whole_number(self.frames):
                raise RequestError(f"a window has {quote(self.frames)} frames; it must be a whole number.")
            if not 1 < self.frames <= MAX_WINDOW_FRAMES:
                raise RequestError(
                    f"a window has {quote(self.frames)} frames; it must have between {MIN_WINDOW_FRAMES} and "
                    f"{MAX_WINDOW_FRAMES}."
                )
            object.__setattr__(self, "frames", snap_frames(self.frames))
        if self.overlap is not None:
            self._check_overlap()
        for name in ("overlap_strength", "adain", "anchor_strength"):
            value = getattr(self, name)
            if value is not None or name != "anchor_strength":
                check_range(f"{name} of windows", value, 0.0, 1.0)
        if self.overlap_strength == 0:
            raise RequestError("overlap_strength is 0: windows would be independent of each other. Give more than 0.")

    def _check_overlap(self) -> None:
        overlap: Any = self.overlap
        if not is_whole_number(overlap):
            raise RequestError(f"the overlap of windows is {quote(overlap)}; it must be a whole number of frames.")
        if overlap < TEMPORAL_COMPRESSION or overlap % TEMPORAL_COMPRESSION:
            below = max(
                TEMPORAL_COMPRESSION, min(overlap, MAX_WINDOW_FRAMES) // TEMPORAL_COMPRESSION * TEMPORAL_COMPRESSION
            )
            raise RequestError(
                f"the overlap of windows is {quote(overlap)} frames; it must be a multiple of "
                f"{TEMPORAL_COMPRESSION}, such as {below}."
            )
        if self.frames is not None and overlap >= self.frames:
            raise RequestError(
                f"the overlap is {quote(overlap)} frames, and a window has {self.frames}: no window would add a "
                f"frame. Give at most {self.frames - 1}."
            )

    @classmethod
    def parse(cls, value: Any) -> Windows | None:
        """Returns windows from a `Windows` or a dictionary of its fields; None stays None.

        Raises:
            RequestError: `value` is none of these, or a field does not exist.
        """
        if value is None or isinstance(value, cls):
            return value
        if isinstance(value, dict):
            return cls(**check_fields(cls, value, "windows"))
        raise RequestError(f"windows is {quote(value)}; it must be a Windows.")

    def with_defaults(self, default_frames: int, *, has_anchor_image: bool) -> Windows:
        """Returns the windows with nothing left open.

        Args:
            default_frames: frames of a window, if `frames` is None.
            has_anchor_image: whether the video begins with an image.

        Raises:
            RequestError: there is no anchor image, or the overlap is too long.
        """
        strength = self.anchor_strength
        if strength and not has_anchor_image:
            raise RequestError(
                f"anchor_strength is {strength:g}, but there is no image at frame 0. Give one, or leave it out."
            )
        length = snap_frames(self.frames or max(default_frames, MIN_WINDOW_FRAMES))
        if strength is None:
            strength = DEFAULT_ANCHOR_STRENGTH * has_anchor_image
        return replace(self, frames=length, overlap=self.overlap or _default_overlap(length), anchor_strength=strength)

    @property
    def latent_frames(self) -> tuple[int, int]:
        """Latent frames of a window and of the overlap, when nothing is left open."""
        assert self.frames is not None
        assert self.overlap is not None
        return (self.frames - 1) // TEMPORAL_COMPRESSION + 1, self.overlap // TEMPORAL_COMPRESSION

    def total_frames(self, window_count: int) -> int:
        """Returns the pixel frames of a video of `window_count` windows."""
        length, overlap = self.latent_frames
        return (length + (window_count - 1) * (length - overlap) - 1) * TEMPORAL_COMPRESSION + 1

    def spans(self, frames: int) -> tuple[Span, ...]:
        """Returns the windows of a video of `frames` frames; the last one may be shorter."""
        (length, overlap), total = self.latent_frames, (snap_frames(frames) - 1) // TEMPORAL_COMPRESSION + 1
        starts = range(0, max(total - overlap, 1), length - overlap)
        return tuple(Span(start, min(start + length, total)) for start in starts)


class Span(NamedTuple):
    """Latent frames of the whole video that a window samples: from `start` to before `end`.

    The window's first latent frame stands for a single pixel frame, as in every video. In the whole video that latent
    frame stands for eight, so from the second window on it is dropped.
    """

    start: int
    end: int

    @property
    def frames(self) -> int:
        """Pixel frames of the window."""
        return (self.end - self.start - 1) * TEMPORAL_COMPRESSION + 1

    @property
    def first_frame(self) -> int:
        """Pixel frame of the whole video that is the window's frame 0."""
        return self.start * TEMPORAL_COMPRESSION

    @property
    def output_start(self) -> int:
        """First latent frame of the whole video that comes from this window."""
        return self.start + 1 if self.start else 0


def _default_overlap(window_frames: int) -> int:
    """Returns the overlap of windows that long: two thirds at most, in whole latent frames, and at least one."""
    two_thirds = window_frames * 2 // 3 // TEMPORAL_COMPRESSION * TEMPORAL_COMPRESSION
    return min(DEFAULT_OVERLAP, max(TEMPORAL_COMPRESSION, two_thirds))


def window_folder_path(video_path: Path) -> Path:
    """Returns the folder where the finished windows of a video are kept while it is generated."""
    return video_path.with_suffix(WINDOWS_SUFFIX)


def split_prompts(prompt: str) -> tuple[str, ...]:
    """Splits a prompt into the prompts of windows.

    Raises:
        RequestError: one of several is empty.
    """
    prompts = tuple(part.strip() for part in prompt.split(PROMPT_SEPARATOR))
    for number, window_prompt in enumerate(prompts, 1):
        if not window_prompt and len(prompts) > 1:
            raise RequestError(
                f"prompt {number} of {len(prompts)} is empty; write what each window shows, separated by "
                f'{PROMPT_SEPARATOR}: "a fox runs {PROMPT_SEPARATOR} the fox sleeps".'
            )
    return prompts


def check_prompt_count(prompts: Sequence[str], window_count: int) -> None:
    """Refuses more prompts than there are windows.

    Raises:
        RequestError: there are more of them than windows.
    """
    if len(prompts) > window_count:
        raise RequestError(
            f"{len(prompts)} prompts are given, one for each window, but the video has {window_count} "
            f"{'window' if window_count == 1 else 'windows'}. Give more --frames or --seconds, or fewer prompts."
        )


class TimedPrompt(NamedTuple):
    """A prompt for a stretch of a long video.

    Args:
        start, end: seconds; an end of None is that of the video.
        time: as it was written, such as "0-3s".
    """

    start: float
    end: float | None
    text: str
    time: str


def timed_prompts(prompts: Sequence[str]) -> tuple[TimedPrompt, ...]:
    """Parses prompts that say when they are shown: "0-3s: a fox runs", "3s-: the fox sleeps"; () where none does.

    Raises:
        RequestError: only some say so, the first does not begin at 0, or one does not begin where the one before ends.
    """
    matches = [_TIME.fullmatch(prompt) for prompt in prompts]
    if not any(matches):
        return ()
    timed: list[TimedPrompt] = []
    for prompt, match in zip(prompts, matches, strict=True):
        if match is None:
            reason = "does not say when it is shown, and others do"
            raise RequestError(f"the prompt {quote(prompt)} {reason}. {_TIME_ADVICE}")
        start, end = float(match["start"]), float(match["end"]) if match["end"] else None
        expected = 0.0 if not timed else timed[-1].end
        if expected is None and start > timed[-1].start:  # an open end is where the next one begins
            timed[-1], expected = timed[-1]._replace(end=start), start
        if start != expected:
            known = f"at {expected:g} s" if expected is not None else f"after {timed[-1].start:g} s"
            raise RequestError(f"the prompt {quote(prompt)} begins at {start:g} s, not {known}. {_TIME_ADVICE}")
        if end is not None and end <= start:
            raise RequestError(f"the prompt {quote(prompt)} ends at {end:g} s, before it begins. {_TIME_ADVICE}")
        timed.append(TimedPrompt(start, end, match["text"], match["time"]))
    return tuple(timed)


def split_time(prompt: str) -> tuple[str, str]:
    """Splits a timed prompt into its time, with the colon behind it, and its text; another one has the time ""."""
    match = _TIME.fullmatch(prompt)
    return ("", prompt) if match is None else (f"{match['time']}: ", match["text"])


def prompts_of_windows(prompts: Sequence[str], spans: Sequence[Span], fps: float) -> tuple[str, ...]:
    """Returns the prompts of the windows. Prompts without times are for one window each, the last one for all others.

    Of timed prompts each window has the one that is shown when the frames begin that only this window makes.

    Raises:
        RequestError: as `timed_prompts`, or no window begins within the time of a prompt.
    """
    timed = timed_prompts(prompts)
    if not timed:
        return tuple(prompts)
    ends = (((span.end - 1) * TEMPORAL_COMPRESSION + 1) / fps for span in spans[:-1])
    starts = [0.0, *ends]
    chosen = [_shown_at(timed, start) for start in starts]
    for prompt in timed:
        if prompt not in chosen:
            begins = ", ".join(f"{start:.3g}" for start in starts[:MAX_TIMES_LISTED])
            more = ", ..." if len(starts) > MAX_TIMES_LISTED else ""
            raise RequestError(
                f"no window begins within {prompt.time}, so {quote(prompt.text)} would not be shown; windows begin at "
                f"{begins}{more} s. Give shorter windows, or a longer time."
            )
    return tuple(prompt.text for prompt in chosen)


def _shown_at(timed: Sequence[TimedPrompt], seconds: float) -> TimedPrompt:
    """Returns the last prompt that has begun; a window that begins a rounded frame too early has the next one."""
    return [prompt for prompt in timed if prompt.start <= seconds + TIME_TOLERANCE][-1]
