"""The recipe that a request is compared with, pass by pass, and its settings as flags."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kadr.request.passes import ResolvedPass
from kadr.request.resolved_request import ResolvedRequest
from kadr.sampling.settings import Guidance, Pass
from kadr.spec.model import ModelSpec


@dataclass(frozen=True)
class PassOfRecipe:
    """A pass of a request, and the settings that the recipe has for it.

    Args:
        settings: of the recipe.
        is_distilled: the model was distilled to few steps without guidance.
    """

    resolved: ResolvedPass
    settings: Pass
    is_distilled: bool


def passes_of_recipe(spec: ModelSpec, resolved: ResolvedRequest) -> list[PassOfRecipe]:
    """Returns the passes of a request that the recipe is for: a LoRA for few steps has its own."""
    recipe = spec.recipe
    single = (recipe.single_pass or recipe.first_pass,)
    expected = single if len(resolved.passes) == 1 else (recipe.first_pass, recipe.second_pass)
    return [
        PassOfRecipe(resolved_pass, settings, is_distilled_model(spec, index))
        for index, (resolved_pass, settings) in enumerate(zip(resolved.passes, expected, strict=True))
        if settings is not None and (is_distilled_model(spec, index) or not distilling_loras(spec, resolved, index))
    ]


def is_distilled_model(spec: ModelSpec, pass_index: int) -> bool:
    """Returns whether the model of a pass was distilled to few steps without guidance."""
    release = spec.names_and_releases[pass_index][1]
    return spec.schedules[pass_index].allowed_sigmas is not None or (release is not None and release.is_distilled)


def distilling_loras(spec: ModelSpec, resolved: ResolvedRequest, pass_index: int) -> list[str]:
    """Returns the active LoRAs that make a model run in few steps: those whose name says so."""
    strengths = resolved.lora_strengths[pass_index]
    entries = zip(spec.loras.entries, strengths, strict=True)
    return [lora.path for lora, strength in entries if strength and "distill" in Path(lora.path).name.lower()]


def count_steps(settings: Pass) -> int:
    """Returns the number of steps of a pass, before a denoise strength leaves out any."""
    if settings.sigmas is not None:
        return len(settings.sigmas)
    return (settings.steps or 0) - settings.skip_initial - settings.skip_final


def schedule_flags(settings: Pass, number: int) -> str:
    """Returns the flags of a pass's schedule; those of the second pass have names of their own."""
    prefix = "--" if number == 1 else "--second-"
    if settings.sigmas is not None:
        return f"{prefix}sigmas {_join(settings.sigmas)}"
    flags = [f"{prefix}steps {settings.steps}"]
    flags += [f"{prefix}skip-initial {settings.skip_initial}"] if settings.skip_initial else []
    flags += [f"{prefix}skip-final {settings.skip_final}"] if settings.skip_final and number == 1 else []
    return " ".join(flags)


def cfg_flags(guidance: Guidance, number: int) -> str:
    """Returns the flags of the recipe's CFG scale; "" for lists in a second pass, which no flag takes."""
    scale = guidance.cfg_scale
    if number > 1:
        values = scale if isinstance(scale, tuple) else (scale,)
        return f"--second-guidance {values[0]:g}" if len(values) == 1 and values[0] is not None else ""
    return _list_flags("--guidance", scale, guidance)


def stg_flags(guidance: Guidance) -> str:
    """Returns the flags of the recipe's STG scale."""
    return _list_flags("--stg", 0.0 if guidance.stg_scale is None else guidance.stg_scale, guidance)


def max_scale(scale: float | Sequence[float] | None, default: float) -> float:
    """Returns the largest value of a scale of guidance."""
    if scale is None:
        return default
    return max(scale) if isinstance(scale, Sequence) else scale


def _list_flags(flag: str, scale: float | tuple[float, ...] | None, guidance: Guidance) -> str:
    if isinstance(scale, tuple):
        return f"{flag} {_join(scale)} --guidance-sigmas {_join(guidance.sigmas or ())}"
    return f"{flag} {1.0 if scale is None else scale:g}"


def _join(values: Sequence[float]) -> str:
    return ",".join(f"{value:g}" for value in values)
