"""A LoRA as a person names it, and how strongly it acts. Nothing here loads torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kadr.errors import RequestError
from kadr.validation import is_number

MAX_LORA_STRENGTH = 10.0  # beyond it any LoRA makes noise: somebody meant per cent


LoraStrength = float | tuple[float, float]  # of a LoRA: in all passes, or in the first and in the second


@dataclass(frozen=True)
class Lora:
    """A LoRA for a model, and how strongly it acts where a request does not say.

    Args:
        path: a .safetensors, a folder as PEFT and diffusers write them, or a name of the registry.
        strength: 1 is as it was trained, 0 is without it, below 0 is away from it.
        second_strength: in the second of two passes; None: as `strength`.
    """

    path: str
    strength: float = 1.0
    second_strength: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", str(self.path))
        for value in (self.strength, self.second_strength):
            if value is not None:
                check_lora_strength(value)

    @classmethod
    def parse(cls, value: Any) -> Lora:
        """From what `Engine.open` takes: a Lora, a path, or a tuple of a path and one strength or two.

        Raises:
            RequestError: it is none of these.
        """
        if isinstance(value, Lora):
            return value
        if isinstance(value, str | Path):
            return cls(str(value))
        if isinstance(value, tuple | list) and 1 <= len(value) <= 3 and isinstance(value[0], str | Path):
            return cls(*value)
        raise RequestError(f"a LoRA is given as {value!r}; it must be a path, or (path, strength).")

    def pass_strengths(self) -> tuple[float, float]:
        """In the first pass and in the second."""
        return self.strength, self.strength if self.second_strength is None else self.second_strength


def refuse_merged_twice(loras: Iterable[Lora]) -> None:
    """Refuse other strengths in each of two passes that are made with the same merged weights.

    Raises:
        RequestError: with the first.
    """
    for use in loras:
        first, second = use.pass_strengths()
        if first != second:
            raise RequestError(
                f"{use.path} is to be merged, with strength {first:g} in the first pass and {second:g} in the second: "
                "one transformer makes both. Leave --merge-loras out."
            )


def check_lora_strength(value: Any) -> float:
    """The strength of a LoRA, if it is one.

    Raises:
        RequestError: it is no number, or none that a LoRA survives.
    """
    if not is_number(value):
        raise RequestError(f"the strength of a LoRA is {value!r}; it must be a number.")
    if abs(value) > MAX_LORA_STRENGTH:
        raise RequestError(
            f"the strength of a LoRA is {value:g}; it must lie between {-MAX_LORA_STRENGTH:g} and {MAX_LORA_STRENGTH:g}, and 1 is as "
            "it was trained."
        )
    return float(value)


def parse_lora_strengths(values: Any) -> tuple[LoraStrength, ...] | None:
    """Strengths of LoRAs, one or two for each; None is none.

    Raises:
        RequestError: as `check_lora_strength`.
    """
    if values is None:
        return None
    if not isinstance(values, tuple | list):
        raise RequestError(f"lora_strengths is {values!r}; it must be a list, one for each LoRA of the engine.")
    made: list[LoraStrength] = []
    for each in values:
        if isinstance(each, tuple | list):
            if len(each) != 2:
                raise RequestError(
                    f"a LoRA's strength is {each!r}; it must be one number, or one for each of two passes."
                )
            made.append((check_lora_strength(each[0]), check_lora_strength(each[1])))
        else:
            made.append(check_lora_strength(each))
    return tuple(made)
