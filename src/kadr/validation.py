"""Checks of single values from a user."""

from __future__ import annotations

import math
from typing import Any

from kadr.errors import RequestError


def check_range(
    name: str, value: Any, minimum: float, maximum: float, suffix: str = "", *, is_whole: bool = False
) -> None:
    """Refuses a value that is not a finite number or lies outside [minimum, maximum].

    Raises:
        RequestError: with the value and the limits, and `suffix` behind them.
    """
    limits = f"between {minimum:g} and {maximum:g}{suffix}"
    if not (is_whole_number(value) if is_whole else is_number(value)):
        raise RequestError(f"{name} is {value!r}; it must be a {'whole number' if is_whole else 'number'} {limits}.")
    if not minimum <= value <= maximum:
        raise RequestError(f"{name} is {value}; it must lie {limits}.")


def is_number(value: Any) -> bool:
    """Tells whether a value is a finite number; true and false are not."""
    return math.isfinite(value) if isinstance(value, float) else is_whole_number(value)


def is_whole_number(value: Any) -> bool:
    """Tells whether a value is an integer; true and false are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_bool(name: str, value: Any) -> None:
    """Refuses a value that is neither a boolean nor None.

    Raises:
        RequestError: with the value.
    """
    if not isinstance(value, bool | None):
        raise RequestError(f"{name} is {value!r}; it must be true or false.")
