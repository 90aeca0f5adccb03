"""Checks of single values from a user."""

from __future__ import annotations

import math
from typing import Any

from kadr.errors import RequestError


def check_range(
    name: str, value: Any, minimum: float, maximum: float, suffix: str = "", *, is_whole: bool = False
) -> None:
    """Refuses a value that is not a number or lies outside [minimum, maximum].

    Raises:
        RequestError: with the value and the limits, and `suffix` behind them.
    """
    if not is_number(value) or (is_whole and not isinstance(value, int)):
        raise RequestError(f"{name} is {value!r}; it must be a {'whole number' if is_whole else 'number'}.")
    if not minimum <= value <= maximum:
        raise RequestError(f"{name} is {value}; it must lie between {minimum:g} and {maximum:g}{suffix}.")


def is_number(value: Any) -> bool:
    """Tells whether a value is a finite number; true and false are not."""
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool)


def check_bool(name: str, value: Any) -> None:
    """Refuses a value that is neither a boolean nor None.

    Raises:
        RequestError: with the value.
    """
    if not isinstance(value, bool | None):
        raise RequestError(f"{name} is {value!r}; it must be true or false.")
