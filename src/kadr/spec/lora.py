"""A LoRA's path and strengths. Nothing here loads torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kadr.errors import RequestError
from kadr.quoting import quote
from kadr.validation import check_path, check_range

MAX_LORA_STRENGTH = 10.0  # beyond it any LoRA makes noise: the value was probably meant as a percentage
LoraStrength = float | tuple[float, float]  # for all passes, or for the first and the second


@dataclass(frozen=True)
class Lora:
    """A LoRA for a model, and its default strengths.

    Args:
        path: a .safetensors, a folder as PEFT and diffusers write them, or a registry name.
        strength: 1 as trained, 0 without the LoRA, below 0 away from it.
        second_strength: strength in the second of two passes; None means `strength`.
    """

    path: str
    strength: float = 1.0
    second_strength: float | None = None

    def __post_init__(self) -> None:
        check_path("the path of a LoRA", self.path)
        object.__setattr__(self, "path", str(self.path))
        for value in (self.strength, self.second_strength):
            if value is not None:
                check_lora_strength(value)

    @classmethod
    def parse(cls, value: Any) -> Lora:
        """Parses an entry of `loras` of `Engine.open`: a Lora, a path, or a tuple of a path and one or two strengths.

        Raises:
            RequestError: it is none of these.
        """
        if isinstance(value, Lora):
            return value
        if isinstance(value, str | Path):
            return cls(str(value))
        if isinstance(value, tuple | list) and 1 <= len(value) <= 3 and isinstance(value[0], str | Path):
            return cls(*value)
        raise RequestError(f"a LoRA is given as {quote(value)}; it must be a path, or (path, strength).")

    def pass_strengths(self) -> tuple[float, float]:
        """Returns the strengths in the first and the second pass."""
        return self.strength, self.strength if self.second_strength is None else self.second_strength


def refuse_merged_twice(loras: Iterable[Lora]) -> None:
    """Refuses two strengths of a LoRA that is merged into the one transformer of both passes.

    Raises:
        RequestError: a LoRA has two; the message names the first such LoRA.
    """
    for lora in loras:
        first, second = lora.pass_strengths()
        if first != second:
            raise RequestError(
                f"{lora.path} cannot be merged with strength {first:g} in the first pass and {second:g} in the second: "
                "one transformer runs both. Leave --merge-loras out."
            )


def check_lora_strength(value: Any) -> float:
    """Checks the strength of a LoRA and returns it as a float.

    Raises:
        RequestError: it is not a number, or too large.
    """
    limit = MAX_LORA_STRENGTH
    check_range("the strength of a LoRA", value, -limit, limit, "; 1 is as it was trained")
    return float(value)


def parse_lora_strengths(values: Any) -> tuple[LoraStrength, ...] | None:
    """Parses the strengths of LoRAs, one or two for each; None stays None.

    Raises:
        RequestError: it is not a list of strengths; see `check_lora_strength`.
    """
    if values is None:
        return None
    if not isinstance(values, tuple | list):
        raise RequestError(f"lora_strengths is {quote(values)}; it must be a list, one for each LoRA of the engine.")
    return tuple(map(_parse_lora_strength, values))


def _parse_lora_strength(value: Any) -> LoraStrength:
    """Parses the strength of one LoRA: a number, or one for each of two passes."""
    if not isinstance(value, tuple | list):
        return check_lora_strength(value)
    if len(value) != 2:
        raise RequestError(
            f"a LoRA's strength is {quote(value)}; it must be one number, or one for each of two passes."
        )
    return check_lora_strength(value[0]), check_lora_strength(value[1])
