"""Checks of single values from a user."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from kadr.errors import CheckpointError, RequestError
from kadr.quoting import quote, show

MAX_FLOAT_BITS = 1024  # a longer integer is past the largest float
MAX_NAME_BYTES, MAX_PATH_BYTES = 255, 4095  # of the common file systems


def check_range(
    name: str, value: Any, minimum: float, maximum: float, suffix: str = "", *, is_whole: bool = False
) -> None:
    """Refuses a value that is not a finite number or lies outside [minimum, maximum].

    Raises:
        RequestError: with the value and the limits, and `suffix` behind them.
    """
    limits = f"between {minimum:g} and {maximum:g}{suffix}"
    if not (is_whole_number(value) if is_whole else is_number(value)):
        raise RequestError(
            f"{name} is {quote(value)}; it must be a {'whole number' if is_whole else 'number'} {limits}."
        )
    if not minimum <= value <= maximum:
        raise RequestError(f"{name} is {quote(value)}; it must lie {limits}.")


def is_number(value: Any) -> bool:
    """Tells whether a value is a finite number that fits into a float; true and false are not."""
    if isinstance(value, float):
        return math.isfinite(value)
    return is_whole_number(value) and value.bit_length() < MAX_FLOAT_BITS


def is_whole_number(value: Any) -> bool:
    """Tells whether a value is an integer; true and false are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_config_count(component: str, key: str, value: Any, maximum: int, minimum: int = 1) -> None:
    """Refuses a size in a config of a checkpoint that no weights can have, before anything is built from it.

    Args:
        component: noun for the component that has the config.

    Raises:
        CheckpointError: it is not a whole number in [minimum, maximum].
    """
    if not is_whole_number(value) or not minimum <= value <= maximum:
        kind = "a positive whole number" if minimum == 1 else f"a whole number, at least {minimum}"
        raise CheckpointError(
            f"the {component} has {key} = {quote(value)}; it must be {kind} and at most {maximum}. Use the file as "
            "released."
        )


def check_config_number(component: str, key: str, value: Any, maximum: float) -> None:
    """Refuses what is not a number above 0 and up to `maximum`, as `check_config_count` does."""
    if not is_number(value) or not 0 < value <= maximum:
        raise CheckpointError(
            f"the {component} has {key} = {quote(value)}; it must be a number above 0, at most {maximum:g}. Use the "
            "file as released."
        )


def check_config_flag(component: str, key: str, value: Any) -> None:
    """Refuses what is neither true nor false, as `check_config_count` does."""
    if not isinstance(value, bool):
        raise CheckpointError(
            f"the {component} has {key} = {quote(value)}; it must be true or false. Use the file as released."
        )


def check_bool(name: str, value: Any) -> None:
    """Refuses a value that is neither a boolean nor None.

    Raises:
        RequestError: with the value.
    """
    if not isinstance(value, bool | None):
        raise RequestError(f"{name} is {quote(value)}; it must be true or false.")


def check_path(name: str, value: Any) -> None:
    """Refuses a value that cannot be the path of a file.

    Raises:
        RequestError: with the value.
    """
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        raise RequestError(f"{name} is {quote(value)}; it must be a path.")
    text = os.fspath(value)
    if "\0" in text:
        raise RequestError(f"{name} is {quote(text)}; no path has a NUL character in it.")
    try:
        encoded = os.fsencode(text)
    except UnicodeEncodeError as error:
        raise RequestError(f"{name} is {quote(text)}; no path has half a character in it.") from error
    # As the system counts: in bytes. A longer name fails in every call that looks at the file.
    names = encoded.replace(os.sep.encode(), b"/").split(b"/")
    if len(encoded) > MAX_PATH_BYTES or max(map(len, names)) > MAX_NAME_BYTES:
        raise RequestError(
            f"{name} is {quote(text)}; a file name has at most {MAX_NAME_BYTES} bytes, and a path {MAX_PATH_BYTES}."
        )


def refuse_overwriting_source(path: Path, files: Iterable[Path]) -> None:
    """Refuses to write over a file that is read, by whatever path or link.

    Raises:
        CheckpointError: `path` is one of the files.
    """
    for file in dict.fromkeys(files):
        if is_same_file(path, file):
            raise CheckpointError(
                f"{path} is {'the input' if path == file else f'a link to the input {file}'}. Write to another path."
            )


def is_same_file(path: Path, other: Path) -> bool:
    """Tells whether two paths lead to one file that exists, also by a link."""
    return path.exists() and other.exists() and path.samefile(other)


def expand_home(path: str | os.PathLike[str]) -> Path:
    """Returns a path with the home folder for its ~; an unknown user's ~name stays, as in a shell."""
    return Path(os.path.expanduser(path))


def is_path_or_none(value: Any) -> bool:
    """Tells whether a value is None or can be the path of a file."""
    if value is None:
        return True
    try:
        check_path("", value)
    except RequestError:
        return False
    return True


def check_fields(kind: type, data: Any, name: str) -> Mapping[str, Any]:
    """Returns the data of a dataclass, if it names only fields of that, and all those without a default.

    Args:
        kind: the dataclass.
        data: plain data, as JSON can hold it.
        name: what it is, for the message.

    Raises:
        RequestError: it is not an object of fields, or names a wrong one. Values are not looked at.
    """
    if not isinstance(data, Mapping):
        raise RequestError(f"{name} is {quote(data)}; it must be an object of fields, as `to_json` writes it.")
    known = [field for field in fields(kind) if field.init]
    names = [field.name for field in known]
    if unknown := sorted(show(key) for key in data if key not in names):
        raise RequestError(f"{name} has {show(', '.join(unknown), 200)}, unknown to this version of kadr.")
    required = [field.name for field in known if field.default is MISSING and field.default_factory is MISSING]
    if missing := [field_name for field_name in required if field_name not in data]:
        raise RequestError(f"{name} lacks {', '.join(missing)}. Write it as `to_json` does.")
    return data


def near_names(name: str, known: Iterable[str], *, count: int = 3) -> list[str]:
    """Returns the known names that a misspelt one may have meant, the likeliest first."""
    names = list(known)
    begun = [item for item in names if name and item.startswith(name)]
    return list(dict.fromkeys([*begun, *get_close_matches(name.strip().lower(), names, n=count)]))[:count]


def suggest_names(name: str, known: Iterable[str], *, count: int = 3) -> str:
    """Returns a sentence with the names that a misspelt one may have meant, or with all where none is near."""
    names = list(known)
    near = near_names(name, names, count=count)
    return f"Did you mean {', '.join(near)}?" if near else f"Known are {', '.join(names)}."
