"""Parses values of flags; a malformed value is bad usage."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

import typer

from kadr.cli.flags.official import BOX_PREFIX, SEPARATOR
from kadr.errors import RequestError
from kadr.quoting import quote
from kadr.request.inputs import CONTROL_KINDS, READY, Condition, Control
from kadr.request.request import AUTO_SIZE
from kadr.sampling.settings import BlockIndices, ScalarOrList
from kadr.shapes import Size
from kadr.validation import near_names

_FRAME_RANGE = re.compile(r"(-?\d{0,12}):(-?\d{0,12})")
_LIST_SEPARATOR = re.compile("[/;]")


def check_one_of(flag: str, value: str, choices: Sequence[str]) -> None:
    """Refuses a value that is not one of the choices."""
    if value not in choices:
        names = ", ".join(choices)
        near = near_names(value, choices, count=1)
        advice = f" Did you mean {near[0]}?" if near else ""
        raise typer.BadParameter(f"{quote(value)} is not one of {names}.{advice}", param_hint=flag)


def size(text: str | None) -> Size | None:
    """Parses "704x480"."""
    try:
        return None if text is None else Size.parse(text)
    except RequestError as error:
        raise typer.BadParameter(str(error), param_hint="--size") from error


def size_or_auto(text: str | None) -> Size | str | None:
    """Parses "704x480" and "auto"."""
    return text if text == AUTO_SIZE else size(text)


def floats(flag: str, text: str | None) -> tuple[float, ...] | None:
    """Parses "1.0,0.9,0.725"."""
    try:
        return None if text is None else tuple(float(number) for number in text.split(","))
    except ValueError as error:
        raise typer.BadParameter(f"{quote(text)} is not a list of numbers such as 1.0,0.9.", param_hint=flag) from error


def numbers(flag: str, text: str | None) -> ScalarOrList | None:
    """Parses "3" as a number, and "1,6,8" as one for each sigma."""
    values = floats(flag, text)
    return values[0] if values is not None and len(values) == 1 else values


def blocks(flag: str, text: str | None) -> BlockIndices | None:
    """Parses "19" or "11,25" as blocks for all sigmas, and "/11,25/28" as lists, the first of them empty."""
    if text is None:
        return None
    try:
        lists = tuple(
            tuple(int(block) for block in part.split(",") if block.strip()) for part in _LIST_SEPARATOR.split(text)
        )
    except ValueError as error:
        raise typer.BadParameter(
            f"{quote(text)} is not a list of blocks such as 11,25, nor lists with / between them.", param_hint=flag
        ) from error
    return lists[0] if len(lists) == 1 else lists


def condition(flag: str, text: str) -> Condition:
    """Parses one --image or --video. The path is made absolute, because the video stores it."""
    path, *rest = text.split(SEPARATOR)
    box = _box(flag, rest.pop().removeprefix(BOX_PREFIX)) if rest and rest[-1].startswith(BOX_PREFIX) else None
    frame, strength = (*rest, *("0", "1.0")[len(rest) :])
    try:
        frame_index, strength_value = int(frame), float(strength)
    except ValueError as error:
        message = (
            f"frame {quote(frame)} and strength {quote(strength)} must be a whole number and a "
            "number: PATH FRAME STRENGTH."
        )
        raise typer.BadParameter(message, param_hint=flag) from error
    if flag != "--video":
        return Condition(media=absolute_path(path), frame=frame_index, strength=strength_value, box=box)
    path, frame_range = _split_frame_range(flag, path)
    media = absolute_path(path)
    return Condition(
        media=media, frame=frame_index, strength=strength_value, is_clip=True, frame_range=frame_range, box=box
    )


def control(text: str) -> Control:
    """Parses one --control: "canny:clip.mp4#0:25", or a path alone.

    An existing file of that name takes precedence over a kind.
    """
    kind, colon, path = text.partition(":")
    if not colon or _file_exists(text):
        kind, path = READY, text
    elif kind not in CONTROL_KINDS:
        if kind.isalpha() and len(kind) > 1:  # looks like an unknown kind, unless it is a drive letter
            raise typer.BadParameter(
                f"{quote(kind)} is not a kind of control: give one of {', '.join(CONTROL_KINDS)}, or a path alone.",
                param_hint="--control",
            )
        kind, path = READY, text
    path, frame_range = _split_frame_range("--control", path)
    if not path:
        raise typer.BadParameter(
            f"{quote(text)} names no clip; write KIND:PATH, or a path alone.", param_hint="--control"
        )
    return Control(media=absolute_path(path), kind=kind, frame_range=frame_range)


def _file_exists(text: str) -> bool:
    """Returns whether a file of that name exists, with or without a frame range behind it."""
    return any(name and os.path.exists(absolute_path(name)) for name in (text, text.rpartition("#")[0]))


def lora(text: str) -> tuple[str | float, ...]:
    """Parses one --lora: a path, its strength, and its strength in the second pass."""
    path, *strengths = text.split(SEPARATOR)
    return path, *map(float, strengths)


def absolute_path(path: str | os.PathLike[str]) -> str:
    return os.path.abspath(os.path.expanduser(path))


def _split_frame_range(flag: str, text: str) -> tuple[str, tuple[int | None, int | None] | None]:
    """Splits a clip's path from its frame range: "clip.mp4#-25:" is its last 25 frames."""
    path, sign, range_text = text.rpartition("#")
    if not sign or os.path.exists(absolute_path(text)):  # a file name may contain #
        return text, None
    match = _FRAME_RANGE.fullmatch(range_text)
    if match is None or "-" in match.groups():
        raise typer.BadParameter(
            f"{quote(range_text)} is not a range of frames; write the first frame, a colon and the frame it "
            "ends before, "
            f"such as {path}#0:25, or {path}#-25: for the last 25.",
            param_hint=flag,
        )
    first, end = (int(number) if number else None for number in match.groups())
    return path, (first, end)


def _box(flag: str, text: str) -> tuple[int, int, int, int]:
    try:
        x, y, width, height = (int(side) for side in text.split(","))
    except ValueError as error:
        raise typer.BadParameter(
            f"{BOX_PREFIX}{text} must be {BOX_PREFIX}X,Y,WIDTH,HEIGHT in pixels.", param_hint=flag
        ) from error
    return x, y, width, height
