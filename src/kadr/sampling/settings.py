"""How a sampling is run, as data: guidance, and one pass over the noise levels."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple, TypeAlias

from kadr.errors import RequestError

Numbers: TypeAlias = "float | tuple[float, ...]"
Blocks: TypeAlias = "tuple[int, ...] | tuple[tuple[int, ...], ...]"

ATTENTION_VALUES, ATTENTION_SKIP, TRANSFORMER_BLOCK = "attention_values", "attention_skip", "transformer_block"
MODES = (ATTENTION_VALUES, ATTENTION_SKIP, TRANSFORMER_BLOCK)
MAXIMUM_SCALE = 100.0
MAXIMUM_STEPS = 1000


class Strengths(NamedTuple):
    """The guidance of one step: as `Guidance`, with one value each."""

    scale: float
    stg: float
    rescale: float
    skip_blocks: tuple[int, ...]

    @property
    def evaluations(self) -> int:
        """How often the network is asked."""
        return 1 + (self.scale > 1) + (self.stg > 0)


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """How far the velocity is pushed beyond what the network says. What is None is taken from the model's own recipe.

    Lists hold a value for each entry of `at`: a step at level t takes that of the first entry that is at most t, and
    the last one where there is none.

    Args:
        scale: away from the negative prompt (classifier-free guidance); 1 is off.
        stg: away from what the network says with some blocks disturbed (spatio-temporal guidance); 0 is off.
        rescale: how much of the growth in contrast that guidance brings is taken back, where `stg` acts; 1 is off, as
            in the official package, and so is 0.
        skip_blocks: which blocks are disturbed, counted from 0.
        mode: how: "attention_values" (tokens see only themselves), "attention_skip" (attention gives back what it was
            given) or "transformer_block" (the block does nothing).
        at: noise levels that the lists are for, falling.
        cfg_star: scale the velocity of the negative prompt to the share of it that is in the other.
        apg: the part of the guidance that runs along the clean picture is multiplied by this (adaptive projected
            guidance); a negative value turns it off.
        apg_norm: limit on the norm of the guidance when `apg` is on; 0 is none.
    """

    scale: Numbers | None = None
    stg: Numbers | None = None
    rescale: Numbers | None = None
    skip_blocks: Blocks | None = None
    mode: str | None = None
    at: tuple[float, ...] | None = None
    cfg_star: bool | None = None
    apg: float | None = None
    apg_norm: float | None = None

    def __post_init__(self) -> None:
        for name, least, most in (("scale", 1.0, MAXIMUM_SCALE), ("stg", 0.0, MAXIMUM_SCALE), ("rescale", 0.0, 1.0)):
            object.__setattr__(self, name, _numbers(_TOLD[name], getattr(self, name), least, most))
        object.__setattr__(self, "skip_blocks", _blocks(self.skip_blocks))
        if self.at is not None:
            object.__setattr__(self, "at", _falling(self.at))
        if self.mode is not None and self.mode not in MODES:
            why = " In these models it changes nothing." if self.mode in ("residual", "stg_r") else ""
            raise RequestError(f"the mode of STG is {self.mode!r}; it must be one of {', '.join(MODES)}.{why}")
        if not isinstance(self.cfg_star, bool | None):
            raise RequestError(f"cfg_star is {self.cfg_star!r}; it must be true or false.")
        _number("apg", self.apg, -1.0, 1.0)
        _number("apg_norm", self.apg_norm, 0.0, math.inf)

    def over(self, other: Guidance) -> Guidance:
        """This guidance, with what it leaves open taken from `other`."""
        open_ = [f.name for f in fields(self) if getattr(self, f.name) is None]
        return replace(self, **{name: getattr(other, name) for name in open_})

    def strengths(self, level: float) -> Strengths:
        """What holds for a step at `sigma`; what is left open is off.

        Raises:
            RequestError: a list and `at` are not of one length.
        """
        self.check_lists()
        index = self._index(level)
        blocks = self.skip_blocks or ()
        own: Any = blocks[index] if _nested(blocks) else blocks
        return Strengths(
            _pick(self.scale, index, 1.0), _pick(self.stg, index, 0.0), _pick(self.rescale, index, 1.0), tuple(own)
        )

    def check_lists(self) -> None:
        """Refuse lists that do not fit `at`.

        Raises:
            RequestError: they do not.
        """
        lists: dict[str, Sequence[Any]] = {
            _TOLD[name]: value
            for name in ("scale", "stg", "rescale")
            if isinstance(value := getattr(self, name), tuple)
        }
        if self.skip_blocks and _nested(self.skip_blocks):
            lists["the skipped blocks"] = self.skip_blocks
        for name, values in lists.items():
            if self.at is None:
                raise RequestError(f"{name} has {len(values)} values, and no levels that they are for. Give `at`.")
            if len(values) != len(self.at):
                raise RequestError(f"{name} has {len(values)} values for {len(self.at)} levels; give one for each.")

    def _index(self, level: float) -> int:
        # In fp32, as the levels are: 0.9767 does not cover 29.3/30.
        levels = () if self.at is None else self.at
        return next((i for i, known in enumerate(levels) if _fp32(known) <= _fp32(level)), max(len(levels) - 1, 0))


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One pass over the noise levels. What is None is left to the recipe.

    Args:
        steps: of the model's own schedule.
        levels: the noise levels themselves, falling from at most 1, instead of `steps`.
        skip_initial, skip_final: levels left out at the front and at the back of the schedule.
        guidance: see there; what it leaves open is off.
        stochastic: every step draws fresh noise instead of following the flow.
        tone_map: how strongly the latents' extremes are pressed together before they are decoded, in [0, 1].
    """

    steps: int | None = None
    levels: tuple[float, ...] | None = None
    skip_initial: int = 0
    skip_final: int = 0
    guidance: Guidance = field(default_factory=Guidance)
    stochastic: bool | None = None
    tone_map: float | None = None

    def __post_init__(self) -> None:
        _number("steps", self.steps, 1, MAXIMUM_STEPS, whole=True)
        for name in ("skip_initial", "skip_final"):
            _number(name, getattr(self, name), 0, MAXIMUM_STEPS, whole=True)
        _number("tone_map", self.tone_map, 0.0, 1.0)
        if self.levels is not None:
            object.__setattr__(self, "levels", as_levels(self.levels))
            if self.skip_initial or self.skip_final:
                raise RequestError("levels are given, and skipped levels too; give the one or the other.")
        if not isinstance(self.guidance, Guidance):
            raise RequestError(f"guidance is {self.guidance!r}; it must be a Guidance.")
        if not isinstance(self.stochastic, bool | None):
            raise RequestError(f"stochastic is {self.stochastic!r}; it must be true or false.")

    def over(self, other: Pass) -> Pass:
        """This pass, with what it leaves open taken from `other`."""
        made = replace(self, guidance=self.guidance.over(other.guidance))
        if made.levels is None and made.steps is None and not (made.skip_initial or made.skip_final):
            timing = ("steps", "levels", "skip_initial", "skip_final")
            made = replace(made, **{name: getattr(other, name) for name in timing})
        elif made.levels is None and made.steps is None:
            made = replace(made, steps=other.steps or (len(other.levels) if other.levels else None))
        left = {n: getattr(other, n) for n in ("stochastic", "tone_map") if getattr(made, n) is None}
        return replace(made, **left)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Pass:
        """Read what `dataclasses.asdict` made of one, after JSON.

        Raises:
            RequestError: a value out of its range.
            TypeError: a field that does not exist.
        """
        data = dict(data)
        if isinstance(data.get("guidance"), Mapping):
            data["guidance"] = Guidance(**data["guidance"])
        return cls(**data)


_TOLD = {"scale": "guidance", "stg": "stg", "rescale": "rescale"}


def as_levels(given: Any) -> tuple[float, ...]:
    """A list of numbers, as a tuple.

    Raises:
        RequestError: it is none.
    """
    if not isinstance(given, tuple | list) or not all(_is_number(level) for level in given):
        raise RequestError(f"levels are {given!r}; they must be a list of numbers, such as (1.0, 0.9, 0.5).")
    return tuple(given)


def _numbers(name: str, given: Any, least: float, most: float) -> Numbers | None:
    if isinstance(given, list | tuple):
        if not given:
            raise RequestError(f"{name} is an empty list; give a number, or one for each level.")
        for value in given:
            _number(name, value, least, most)
        return tuple(given)
    _number(name, given, least, most)
    return given


def _number(name: str, value: Any, least: float, most: float, *, whole: bool = False) -> None:
    """Refuse what is no number, or lies outside [least, most]; None is none of it."""
    if value is None:
        return
    if not _is_number(value) or (whole and not isinstance(value, int)):
        raise RequestError(f"{name} is {value!r}; it must be a {'whole number' if whole else 'number'}.")
    if not least <= value <= most:
        off = {"guidance": "; 1 is off", "stg": "; 0 is off"}.get(name, "")
        raise RequestError(f"{name} is {value}; it must lie between {least:g} and {most:g}{off}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _blocks(given: Any) -> Blocks | None:
    if given is None:
        return None
    if isinstance(given, list | tuple):
        if all(isinstance(part, list | tuple) for part in given) and given:
            if all(_is_block(block) for part in given for block in part):
                return tuple(tuple(part) for part in given)
        elif all(_is_block(block) for block in given):
            return tuple(given)
    raise RequestError(
        f"the skipped blocks are {given!r}; they must be a list of whole numbers, or one list per level."
    )


def _is_block(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _nested(blocks: Sequence[Any]) -> bool:
    return bool(blocks) and isinstance(blocks[0], tuple)


def _falling(given: Any) -> tuple[float, ...]:
    levels = as_levels(given)
    if not levels or not all(0 <= level <= 1 for level in levels) or sorted(levels, reverse=True) != list(levels):
        raise RequestError(f"the levels that guidance changes at are {given!r}; they must fall, between 1 and 0.")
    return levels


def _pick(value: Numbers | None, index: int, off: float) -> float:
    if value is None:
        return off
    return value[index] if isinstance(value, tuple) else value


def _fp32(value: float) -> float:
    return struct.unpack("f", struct.pack("f", value))[0]
