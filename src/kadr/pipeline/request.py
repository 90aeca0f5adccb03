"""What to make: a request, checked at birth, and its form as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from kadr.errors import RequestError
from kadr.shapes import Size, snap_frames

MAXIMUM_STEPS = 1000
MAXIMUM_FPS = 240


def _within(name: str, value: Any, low: float, high: float, what: str = "", *, whole: bool = False) -> None:
    """Refuse what is no number, or lies outside [low, high]."""
    if not _is_number(value) or (whole and not isinstance(value, int)):
        raise RequestError(f"{name} is {value!r}; it must be a {'whole number' if whole else 'number'}.")
    if not low <= value <= high:
        raise RequestError(f"{name} is {value}; it must lie between {low:g} and {high:g}{what}.")


def _is_number(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True, kw_only=True)
class Condition:
    """A picture that the video must show.

    Args:
        media: path of a picture.
        frame: pixel frame at which it stands; 0 is the first, and the only one so far.
        strength: in (0, 1]. 1 keeps it as it is; less lets it be repainted from that noise level on.
    """

    media: str
    frame: int = 0
    strength: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "media", str(self.media))
        _within("strength", self.strength, 0.0, 1.0)
        if self.strength == 0:
            raise RequestError("strength is 0: the picture would do nothing. Give more than 0, or leave it out.")
        if self.frame != 0:
            raise RequestError(f"frame is {self.frame}; a picture can be given at frame 0 only, so far.")


# Field, lowest and highest value, and whether it must be whole.
_LIMITS: tuple[tuple[str, float, float, bool], ...] = (
    ("fps", 0.1, MAXIMUM_FPS, False),
    ("steps", 1, MAXIMUM_STEPS, True),
    ("guidance", 1.0, 100.0, False),
    ("image_noise", 0.0, 10.0, False),
    ("image_crf", 0, 51, True),
    ("decode_timestep", 0.0, 1.0, False),
    ("decode_noise", 0.0, 1.0, False),
)


@dataclass(frozen=True, kw_only=True)
class Request:
    """One video. What is None is taken from the model's own recipe.

    Args:
        prompt: what to show.
        size: width and height in pixels, a `Size` or a pair. Made at the next multiples of 32 up, then cropped.
        frames: made at the next 8k+1 up, then trimmed.
        fps: frames per second. The model hears of it: it decides how fast things move.
        seed: any whole number. The same seed gives the same noise on every device.
        steps: of denoising.
        levels: the noise levels themselves, falling from at most 1, instead of `steps`.
        skip_initial, skip_final: levels left out at the front and at the back of the schedule.
        guidance: how far to go beyond the prompt; 1 is off.
        guidance_batch: evaluate with and without the prompt in one batch instead of one after the other.
        negative_prompt: what to guide away from.
        stochastic: add fresh noise at every step, as some distilled models want.
        conditions: pictures to keep.
        image_noise: times level squared, the noise on kept pictures at each step.
        image_crf: H.264 quality a picture is passed through before it is encoded, as the training clips were; 0 is off.
        decode_timestep: the noise level the decoder is told.
        decode_noise: the share of noise mixed into the latents before they are decoded.
    """

    prompt: str
    size: Size | tuple[int, int] | None = None
    frames: int | None = None
    fps: float | None = None
    seed: int = 0
    steps: int | None = None
    levels: tuple[float, ...] | None = None
    skip_initial: int = 0
    skip_final: int = 0
    guidance: float | None = None
    guidance_batch: bool = False
    negative_prompt: str | None = None
    stochastic: bool | None = None
    conditions: tuple[Condition, ...] = ()
    image_noise: float | None = None
    image_crf: int | None = None
    decode_timestep: float | None = None
    decode_noise: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str) or not self.prompt.strip():
            raise RequestError("the prompt is empty; say what to show, in quotes.")
        if not isinstance(self.negative_prompt, str | None):
            raise RequestError(f"the negative prompt is {self.negative_prompt!r}; it must be text.")
        if not isinstance(self.size, Size | None):
            object.__setattr__(self, "size", _size(self.size))
        if self.frames is not None:
            snap_frames(self.frames)
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise RequestError(f"seed is {self.seed!r}; it must be a whole number.")
        object.__setattr__(self, "conditions", _conditions(self.conditions))
        if self.levels is not None:
            object.__setattr__(self, "levels", _levels(self.levels))
        for name, low, high, whole in _LIMITS:
            if (value := getattr(self, name)) is not None:
                _within(name, value, low, high, "; 1 is off" if name == "guidance" else "", whole=whole)
        for name in ("skip_initial", "skip_final"):
            _within(name, getattr(self, name), 0, MAXIMUM_STEPS, whole=True)
        if self.levels is not None and (self.steps is not None or self.skip_initial or self.skip_final):
            raise RequestError("levels are given, and steps or skipped levels too; give the one or the other.")

    def filled(self, defaults: Mapping[str, Any]) -> Request:
        """The request with what was left out taken from `defaults`."""
        known = {field.name for field in fields(self)}
        left_out = {k: v for k, v in defaults.items() if v is not None and k in known and getattr(self, k) is None}
        if self.steps is not None or self.skip_initial or self.skip_final:
            left_out.pop("levels", None)
        if self.levels is not None or "levels" in left_out:
            left_out.pop("steps", None)
        return replace(self, **left_out)

    def to_json(self) -> dict[str, Any]:
        """Plain data. `from_json` reads it back to an equal request."""
        data = asdict(self)
        data["size"] = None if self.size is None else str(self.size)
        return json.loads(json.dumps(data))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Request:
        """Read what `to_json` wrote.

        Raises:
            RequestError: an unknown field, one that is missing, or a value out of its range.
        """
        data = dict(data)
        unknown = set(data) - {field.name for field in fields(cls)}
        if unknown:
            raise RequestError(f"the request has {', '.join(sorted(unknown))}, unknown to this version of kadr.")
        try:
            if data.get("size") is not None:
                data["size"] = Size.parse(data["size"])
            data["conditions"] = tuple(Condition(**condition) for condition in data.get("conditions", ()))
            return cls(**data)
        except (TypeError, AttributeError) as error:
            raise RequestError(f"the request cannot be read: {error}. Write it as `to_json` does.") from error

    def media(self) -> tuple[Path, ...]:
        """The files the request needs."""
        return tuple(Path(condition.media) for condition in self.conditions)


def _size(given: Any) -> Size:
    if not isinstance(given, tuple | list) or len(given) != 2:
        raise RequestError(f"size is {given!r}; it must be a Size or a pair, (width, height) in pixels.")
    return Size(*given)


def _levels(given: Any) -> tuple[float, ...]:
    if not isinstance(given, tuple | list) or not all(isinstance(level, int | float) for level in given):
        raise RequestError(f"levels are {given!r}; they must be a list of numbers, such as (1.0, 0.9, 0.5).")
    return tuple(given)


def _conditions(given: Any) -> tuple[Condition, ...]:
    if not isinstance(given, tuple | list) or not all(isinstance(one, Condition) for one in given):
        raise RequestError(f"conditions are {given!r}; they must be a list of Condition(media=...).")
    if len(given) > 1:
        raise RequestError(f"{len(given)} pictures are given for frame 0; one can stand there.")
    return tuple(given)
