"""Reads JSON that other programs wrote: what is nested too deeply is refused like a syntax error."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

from kadr.quoting import shorten

MAX_JSON_DEPTH = 64  # objects and lists in each other; what kadr and the official package write has 7


def parse_json(text: str | bytes, *, is_strict: bool = False) -> Any:
    """Parses a JSON text.

    Args:
        is_strict: also refuse NaN and infinities, which are not JSON, numbers that are too large for a float, an object
            with a key twice, of which one would be lost, and half a character (a lone surrogate), which no file and no
            answer can have.

    Raises:
        ValueError: it is not JSON, is nested more than `MAX_JSON_DEPTH` deep, or has a number of thousands of digits.
    """
    try:
        data = json.loads(text, **(_STRICT_HOOKS if is_strict else {}))
    except RecursionError as error:
        raise _too_deep() from error
    level, depth = [data], 0
    while level := _containers(level, is_strict):
        depth += 1
        if depth > MAX_JSON_DEPTH:
            raise _too_deep()
        level = [child for item in level for child in (item.values() if isinstance(item, dict) else item)]
    return data


def _containers(items: list[Any], is_strict: bool) -> list[Any]:
    """Returns the objects and lists among some values, whose texts are checked."""
    if is_strict:
        for item in items:
            for text in (item,) if isinstance(item, str) else item if isinstance(item, dict) else ():
                _refuse_half_character(text)
    return [item for item in items if isinstance(item, dict | list)]


def _refuse_half_character(text: str) -> None:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError("it has half a character, a lone surrogate") from error


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"it has {next(key for key in keys if keys.count(key) > 1)!r} twice in one object")
    return data


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number of JSON")


def _finite_float(text: str) -> float:
    if math.isinf(value := float(text)):
        raise ValueError(f"{shorten(text, 20)} is too large a number")
    return value


_STRICT_HOOKS: dict[str, Any] = {
    "object_pairs_hook": _unique_keys,
    "parse_constant": _refuse_constant,
    "parse_float": _finite_float,
}


def _too_deep() -> ValueError:
    return ValueError(f"it is nested more than {MAX_JSON_DEPTH} deep")
