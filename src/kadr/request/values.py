"""Values of a request: refused where they are none, or out of their range."""

from __future__ import annotations

import math
from typing import Any

from kadr.errors import RequestError

STRONGEST = 10.0  # beyond it any LoRA makes noise: somebody meant per cent
Strength = float | tuple[float, float]  # of a LoRA: in all passes, or in the first and in the second


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


def check_strength(value: Any) -> float:
    """The strength of a LoRA, if it is one.

    Raises:
        RequestError: it is no number, or none that a LoRA survives.
    """
    if not is_number(value):
        raise RequestError(f"the strength of a LoRA is {value!r}; it must be a number.")
    if abs(value) > STRONGEST:
        raise RequestError(
            f"the strength of a LoRA is {value:g}; it must lie between {-STRONGEST:g} and {STRONGEST:g}, and 1 is as "
            "it was trained."
        )
    return float(value)


def strengths_of(given: Any) -> tuple[Strength, ...] | None:
    """Strengths of LoRAs, one or two for each; None is none.

    Raises:
        RequestError: as `check_strength`.
    """
    if given is None:
        return None
    if not isinstance(given, tuple | list):
        raise RequestError(f"lora_strengths is {given!r}; it must be a list, one for each LoRA of the engine.")
    made: list[Strength] = []
    for each in given:
        if isinstance(each, tuple | list):
            if len(each) != 2:
                raise RequestError(
                    f"a LoRA's strength is {each!r}; it must be one number, or one for each of two passes."
                )
            made.append((check_strength(each[0]), check_strength(each[1])))
        else:
            made.append(check_strength(each))
    return tuple(made)
