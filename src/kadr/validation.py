"""Checks of single values that a person gives."""

from __future__ import annotations

import math
from typing import Any

from kadr.errors import RequestError


def within(name: str, value: Any, low: float, high: float, what: str = "", *, whole: bool = False) -> None:
    """Refuse what is no number, or lies outside [low, high].

    Raises:
        RequestError: with the value and the limits, and `what` behind them.
    """
    if not is_number(value) or (whole and not isinstance(value, int)):
        raise RequestError(f"{name} is {value!r}; it must be a {'whole number' if whole else 'number'}.")
    if not low <= value <= high:
        raise RequestError(f"{name} is {value}; it must lie between {low:g} and {high:g}{what}.")


def is_number(value: Any) -> bool:
    """Whether it is one, finite, and not true or false."""
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool)


def true_or_false(name: str, value: Any) -> None:
    """Refuse what is neither, nor None.

    Raises:
        RequestError: with the value.
    """
    if not isinstance(value, bool | None):
        raise RequestError(f"{name} is {value!r}; it must be true or false.")
