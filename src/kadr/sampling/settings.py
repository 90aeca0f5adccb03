"""Settings of a sampler, as data: guidance (CFG, STG, APG), and one pass over a schedule of sigmas."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple, TypeAlias

from kadr.errors import RequestError
from kadr.quoting import quote
from kadr.sampling.samplers import SAMPLERS
from kadr.validation import check_bool, check_fields, check_range, is_number, is_whole_number

ScalarOrList: TypeAlias = "float | tuple[float, ...]"
BlockIndices: TypeAlias = "tuple[int, ...] | tuple[tuple[int, ...], ...]"

ATTENTION_VALUES, ATTENTION_SKIP, TRANSFORMER_BLOCK = "attention_values", "attention_skip", "transformer_block"
STG_MODES = (ATTENTION_VALUES, ATTENTION_SKIP, TRANSFORMER_BLOCK)
MAX_SCALE = 100.0
MAX_STEPS = 1000
MAX_BLOCK = 10_000  # no transformer has as many blocks; blocks that a model lacks are refused when it is known


class StepGuidance(NamedTuple):
    """The guidance at one sigma: the fields of `Guidance` that may be lists, with one value each."""

    cfg_scale: float
    stg_scale: float
    rescale: float
    skip_blocks: tuple[int, ...]

    @property
    def model_evaluations(self) -> int:
        """Forward passes of the transformer at that sigma: conditional, unconditional (CFG), perturbed (STG)."""
        return 1 + (self.cfg_scale > 1) + (self.stg_scale > 0)


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """Classifier-free guidance (CFG) and spatio-temporal guidance (STG) of a pass. None leaves a value to the recipe.

    A list has one value for each entry of `sigmas`: an evaluation at sigma s takes the value of the first entry that is
    at most s, and the last value if there is none.

    Args:
        cfg_scale: CFG scale, away from the negative prompt; 1 is off.
        stg_scale: STG scale, away from the prediction with some transformer blocks perturbed; 0 is off.
        rescale: how far the guided prediction is rescaled to the standard deviation of the conditional one, on steps
            with STG; 1 and 0 are off, as in the official package.
        skip_blocks: the perturbed blocks, counted from 0.
        stg_mode: "attention_values" (each token attends to itself only), "attention_skip" (attention returns its
            input) or "transformer_block" (the block returns its input).
        sigmas: one for each entry of the lists, not increasing.
        cfg_star: scale the unconditional prediction to its projection on the conditional one (CFG-Zero*).
        apg: factor of the guidance's component parallel to the clean prediction (adaptive projected guidance, APG); a
            negative value turns APG off.
        apg_norm: limit on the norm of the guidance when `apg` is on; 0 is none.
    """

    cfg_scale: ScalarOrList | None = None
    stg_scale: ScalarOrList | None = None
    rescale: ScalarOrList | None = None
    skip_blocks: BlockIndices | None = None
    stg_mode: str | None = None
    sigmas: tuple[float, ...] | None = None
    cfg_star: bool | None = None
    apg: float | None = None
    apg_norm: float | None = None

    def __post_init__(self) -> None:
        for name, minimum, maximum in (
            ("cfg_scale", 1.0, MAX_SCALE),
            ("stg_scale", 0.0, MAX_SCALE),
            ("rescale", 0.0, 1.0),
        ):
            value = _check_scalar_or_list(_NAMES_IN_MESSAGES[name], getattr(self, name), minimum, maximum)
            object.__setattr__(self, name, value)
        object.__setattr__(self, "skip_blocks", _parse_blocks(self.skip_blocks))
        if self.sigmas is not None:
            object.__setattr__(self, "sigmas", _parse_decreasing_sigmas(self.sigmas))
        if self.stg_mode is not None and self.stg_mode not in STG_MODES:
            hint = " In these models it changes nothing." if self.stg_mode in ("residual", "stg_r") else ""
            raise RequestError(
                f"the mode of STG is {quote(self.stg_mode)}; it must be one of {', '.join(STG_MODES)}.{hint}"
            )
        check_bool("cfg_star", self.cfg_star)
        _check_number("apg", self.apg, -1.0, 1.0)
        _check_number("apg_norm", self.apg_norm, 0.0, math.inf)

    def with_defaults(self, defaults: Guidance) -> Guidance:
        """Returns this guidance, with what it leaves open taken from `defaults`."""
        unset = [f.name for f in fields(self) if getattr(self, f.name) is None]
        return replace(self, **{name: getattr(defaults, name) for name in unset})

    def at_sigma(self, sigma: float) -> StepGuidance:
        """Returns the guidance of an evaluation at `sigma`; what is still open is off.

        Raises:
            RequestError: a list and `sigmas` differ in length.
        """
        self.check_lists()
        index = self._index(sigma)
        blocks = self.skip_blocks or ()
        step_blocks: Any = blocks[index] if _is_nested(blocks) else blocks
        return StepGuidance(
            _value_at(self.cfg_scale, index, 1.0),
            _value_at(self.stg_scale, index, 0.0),
            _value_at(self.rescale, index, 1.0),
            tuple(step_blocks),
        )

    def check_lists(self) -> None:
        """Refuses lists that do not fit `sigmas`.

        Raises:
            RequestError: a list and `sigmas` differ in length.
        """
        lists: dict[str, Sequence[Any]] = {
            _NAMES_IN_MESSAGES[name]: value
            for name in ("cfg_scale", "stg_scale", "rescale")
            if isinstance(value := getattr(self, name), tuple)
        }
        if self.skip_blocks and _is_nested(self.skip_blocks):
            lists["the skipped blocks"] = self.skip_blocks
        for name, values in lists.items():
            if self.sigmas is None:
                raise RequestError(f"{name} has {len(values)} values, and no sigmas that they are for. Give `sigmas`.")
            if len(values) != len(self.sigmas):
                raise RequestError(f"{name} has {len(values)} values for {len(self.sigmas)} sigmas; give one for each.")

    def _index(self, sigma: float) -> int:
        # In fp32, as the sigmas of a schedule are: 0.9767 does not cover 29.3/30.
        sigmas = () if self.sigmas is None else self.sigmas
        return next(
            (i for i, entry in enumerate(sigmas) if _round_to_fp32(entry) <= _round_to_fp32(sigma)),
            max(len(sigmas) - 1, 0),
        )


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One denoising run over a schedule of sigmas. None leaves a value to the recipe.

    Args:
        steps: of the model's own schedule.
        sigmas: the sigmas themselves, decreasing from at most 1, instead of `steps`.
        skip_initial, skip_final: sigmas left out at the front and at the back of the schedule.
        guidance: what it leaves open is off.
        sampler: a name of `samplers.SAMPLERS`.
        tone_map: how strongly the extremes of the latents are compressed before they are decoded, in [0, 1].
    """

    steps: int | None = None
    sigmas: tuple[float, ...] | None = None
    skip_initial: int = 0
    skip_final: int = 0
    guidance: Guidance = field(default_factory=Guidance)
    sampler: str | None = None
    tone_map: float | None = None

    def __post_init__(self) -> None:
        _check_number("steps", self.steps, 1, MAX_STEPS, is_whole=True)
        for name in ("skip_initial", "skip_final"):
            _check_number(name, getattr(self, name), 0, MAX_STEPS, is_whole=True)
        _check_number("tone_map", self.tone_map, 0.0, 1.0)
        if self.sigmas is not None:
            object.__setattr__(self, "sigmas", parse_sigmas(self.sigmas))
            if self.skip_initial or self.skip_final:
                raise RequestError("both sigmas and skipped steps are given; give one or the other.")
        if not isinstance(self.guidance, Guidance):
            raise RequestError(f"guidance is {quote(self.guidance)}; it must be a Guidance.")
        check_sampler(self.sampler)

    def with_defaults(self, defaults: Pass) -> Pass:
        """Returns this pass, with what it leaves open taken from `defaults`."""
        merged = replace(self, guidance=self.guidance.with_defaults(defaults.guidance))
        if merged.sigmas is None and merged.steps is None and not (merged.skip_initial or merged.skip_final):
            timing = ("steps", "sigmas", "skip_initial", "skip_final")
            merged = replace(merged, **{name: getattr(defaults, name) for name in timing})
        elif merged.sigmas is None and merged.steps is None:
            merged = replace(merged, steps=defaults.steps or (len(defaults.sigmas) if defaults.sigmas else None))
        unset = {n: getattr(defaults, n) for n in ("sampler", "tone_map") if getattr(merged, n) is None}
        return replace(merged, **unset)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Pass:
        """Reads the result of `dataclasses.asdict` after a round trip through JSON.

        Raises:
            RequestError: a field does not exist, or a value is out of its range.
        """
        data = dict(check_fields(cls, data, "a pass"))
        if isinstance(data.get("guidance"), Mapping):
            data["guidance"] = Guidance(**check_fields(Guidance, data["guidance"], "guidance"))
        return cls(**data)


_NAMES_IN_MESSAGES = {"cfg_scale": "guidance", "stg_scale": "stg", "rescale": "rescale"}


def parse_sigmas(value: Any) -> tuple[float, ...]:
    """Returns a list of numbers as a tuple.

    Raises:
        RequestError: it is not a list of numbers.
    """
    if not isinstance(value, tuple | list) or not all(is_number(sigma) for sigma in value):
        raise RequestError(f"sigmas are {quote(value)}; they must be a list of numbers, such as (1.0, 0.9, 0.5).")
    return tuple(value)


def check_sampler(name: Any) -> None:
    """Refuses what is not the name of a sampler; None passes.

    Raises:
        RequestError: it is not one.
    """
    if name is not None and (not isinstance(name, str) or name not in SAMPLERS):
        raise RequestError(f"the sampler is {quote(name)}; it must be one of {', '.join(SAMPLERS)}.")


def _check_scalar_or_list(name: str, scalar_or_list: Any, minimum: float, maximum: float) -> ScalarOrList | None:
    if isinstance(scalar_or_list, list | tuple):
        if not scalar_or_list:
            raise RequestError(f"{name} is an empty list; give a number, or one for each sigma.")
        for value in scalar_or_list:
            _check_number(name, value, minimum, maximum)
        return tuple(scalar_or_list)
    _check_number(name, scalar_or_list, minimum, maximum)
    return scalar_or_list


def _check_number(name: str, value: Any, minimum: float, maximum: float, *, is_whole: bool = False) -> None:
    """Refuses what is not a number in [minimum, maximum]; None passes."""
    if value is not None:
        hint = {"guidance": "; 1 is off", "stg": "; 0 is off"}.get(name, "")
        check_range(name, value, minimum, maximum, hint, is_whole=is_whole)


def _parse_blocks(value: Any) -> BlockIndices | None:
    if value is None:
        return None
    if isinstance(value, list | tuple):
        if all(isinstance(blocks, list | tuple) for blocks in value) and value:
            if all(_is_block(block) for blocks in value for block in blocks):
                return tuple(tuple(blocks) for blocks in value)
        elif all(_is_block(block) for block in value):
            return tuple(value)
    raise RequestError(
        f"the skipped blocks are {quote(value)}; they must be a list of whole numbers, or one list per sigma."
    )


def _is_block(value: Any) -> bool:
    return is_whole_number(value) and 0 <= value < MAX_BLOCK


def _is_nested(blocks: Sequence[Any]) -> bool:
    return bool(blocks) and isinstance(blocks[0], tuple)


def _parse_decreasing_sigmas(value: Any) -> tuple[float, ...]:
    sigmas = parse_sigmas(value)
    if not sigmas or not all(0 <= sigma <= 1 for sigma in sigmas) or sorted(sigmas, reverse=True) != list(sigmas):
        raise RequestError(f"the sigmas of guidance are {quote(value)}; they must decrease and lie between 0 and 1.")
    return sigmas


def _value_at(value: ScalarOrList | None, index: int, default: float) -> float:
    if value is None:
        return default
    return value[index] if isinstance(value, tuple) else value


def _round_to_fp32(value: float) -> float:
    return struct.unpack("f", struct.pack("f", value))[0]
