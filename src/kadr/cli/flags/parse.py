"""Words of the command line into values; what cannot be read is bad usage."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

import typer

from kadr.cli.flags.official import BOX_PREFIX, SEPARATOR
from kadr.errors import RequestError
from kadr.request.inputs import CONTROL_KINDS, READY, Condition, Control
from kadr.sampling.settings import BlockIndices, ScalarOrList
from kadr.shapes import Size

_FRAME_RANGE = re.compile(r"(-?\d*):(-?\d*)")
_LIST_SEPARATOR = re.compile("[/;]")


def check_one_of(flag: str, value: str, known: Sequence[str]) -> None:
    """Refuse a word that is none of those known."""
    if value not in known:
        raise typer.BadParameter(f"{value!r} is not one of {', '.join(known)}.", param_hint=flag)


def size(text: str | None) -> Size | None:
    """Read "704x480"."""
    try:
        return None if text is None else Size.parse(text)
    except RequestError as error:
        raise typer.BadParameter(str(error), param_hint="--size") from error


def floats(flag: str, text: str | None) -> tuple[float, ...] | None:
    """Read "1.0,0.9,0.725"."""
    try:
        return None if text is None else tuple(float(level) for level in text.split(","))
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not a list of numbers such as 1.0,0.9.", param_hint=flag) from error


def numbers(flag: str, text: str | None) -> ScalarOrList | None:
    """Read "3" as a number, and "1,6,8" as one for each level."""
    read = floats(flag, text)
    return read[0] if read is not None and len(read) == 1 else read


def blocks(flag: str, text: str | None) -> BlockIndices | None:
    """Read "19" or "11,25" as blocks for all levels, and "/11,25/28" as lists, the first of them empty."""
    if text is None:
        return None
    try:
        lists = tuple(
            tuple(int(block) for block in part.split(",") if block.strip()) for part in _LIST_SEPARATOR.split(text)
        )
    except ValueError as error:
        raise typer.BadParameter(
            f"{text!r} is not a list of blocks such as 11,25, nor several with / between them.", param_hint=flag
        ) from error
    return lists[0] if len(lists) == 1 else lists


def condition(flag: str, text: str) -> Condition:
    """Read the parts of one --image or --video. The path is made absolute, because the video remembers it."""
    path, *rest = text.split(SEPARATOR)
    box = _box(flag, rest.pop().removeprefix(BOX_PREFIX)) if rest and rest[-1].startswith(BOX_PREFIX) else None
    frame, strength = (*rest, *("0", "1.0")[len(rest) :])
    try:
        at, share = int(frame), float(strength)
    except ValueError as error:
        wanted = f"frame {frame!r} and strength {strength!r} must be a whole number and a number: PATH FRAME STRENGTH."
        raise typer.BadParameter(wanted, param_hint=flag) from error
    if flag != "--video":
        return Condition(media=absolute_path(path), frame=at, strength=share, box=box)
    path, part = _split_frame_range(flag, path)
    return Condition(media=absolute_path(path), frame=at, strength=share, is_clip=True, frame_range=part, box=box)


def control(text: str) -> Control:
    """Read the parts of one --control: "canny:clip.mp4#0:25", or a path alone.

    A file that is called so goes before a kind.
    """
    kind, colon, path = text.partition(":")
    if not colon or _file_exists(text):
        kind, path = READY, text
    elif kind not in CONTROL_KINDS:
        if kind.isalpha() and len(kind) > 1:  # what looks like a kind is none, unless it is a drive
            raise typer.BadParameter(
                f"{kind!r} is no kind of control: give one of {', '.join(CONTROL_KINDS)}, or a path alone.",
                param_hint="--control",
            )
        kind, path = READY, text
    path, part = _split_frame_range("--control", path)
    if not path:
        raise typer.BadParameter(f"{text!r} names no clip; write KIND:PATH, or a path alone.", param_hint="--control")
    return Control(media=absolute_path(path), kind=kind, frame_range=part)


def _file_exists(text: str) -> bool:
    """Whether there is a file that is called so, with a part of it behind the name or not."""
    return any(name and os.path.exists(absolute_path(name)) for name in (text, text.rpartition("#")[0]))


def lora(text: str) -> tuple[str | float, ...]:
    """Read the parts of one --lora: a path, its strength, and that in the second pass."""
    path, *strengths = text.split(SEPARATOR)
    return path, *map(float, strengths)


def absolute_path(path: str | os.PathLike[str]) -> str:
    return os.path.abspath(os.path.expanduser(path))


def _split_frame_range(flag: str, text: str) -> tuple[str, tuple[int | None, int | None] | None]:
    """The path of a clip, and the frames that are taken of it: "clip.mp4#-25:" are its last 25."""
    path, sign, part = text.rpartition("#")
    if not sign or os.path.exists(absolute_path(text)):  # a file may have the sign in its name
        return text, None
    found = _FRAME_RANGE.fullmatch(part)
    if found is None or "-" in found.groups():
        raise typer.BadParameter(
            f"{part!r} is no part of a clip; write the first frame, a colon and the frame it ends before, such as "
            f"{path}#0:25, or {path}#-25: for the last 25.",
            param_hint=flag,
        )
    first, end = (int(number) if number else None for number in found.groups())
    return path, (first, end)


def _box(flag: str, text: str) -> tuple[int, int, int, int]:
    try:
        x, y, width, height = (int(side) for side in text.split(","))
    except ValueError as error:
        raise typer.BadParameter(
            f"{BOX_PREFIX}{text} must be {BOX_PREFIX}X,Y,WIDTH,HEIGHT in pixels.", param_hint=flag
        ) from error
    return x, y, width, height
