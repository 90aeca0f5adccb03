"""Checks of a request's guidance against the recipe: CFG, STG and the negative prompt.

`request.passes.warn_distilled_guidance` warns of CFG on a distilled model, for every verb.
"""

from __future__ import annotations

from collections.abc import Iterator

from kadr.diagnosis.finding import NOTE, QUALITY, SPEED, Finding
from kadr.diagnosis.recipe import PassOfRecipe, cfg_flags, max_scale, passes_of_recipe, stg_flags
from kadr.request.request import Request
from kadr.request.resolved_request import ResolvedRequest
from kadr.spec.model import ModelSpec

MAX_SHARE = 2.5  # of the recipe's largest scale


def check_guidance(spec: ModelSpec, request: Request, resolved: ResolvedRequest) -> Iterator[Finding]:
    """Yields the findings about guidance.

    Args:
        request: as it was given, before the recipe filled it in.
    """
    passes = passes_of_recipe(spec, resolved)
    for item in passes:
        if not item.is_distilled:
            yield from _check_cfg(item, has_input_video=resolved.input_video is not None)
        yield from _check_stg(item)
    if request.negative_prompt and not resolved.uses_cfg:
        message = "a negative prompt is given, and guidance is off, so nothing is guided away from it."
        fix = cfg_flags(passes[0].settings.guidance, 1) if passes and not passes[0].is_distilled else ""
        yield Finding(NOTE, "negative prompt", message if fix else f"{message} Leave it out.", fix)


def _check_cfg(item: PassOfRecipe, *, has_input_video: bool) -> Iterator[Finding]:
    scale = max(guidance.cfg_scale for guidance in item.resolved.evaluation_guidance)
    number, guidance = item.resolved.number, item.settings.guidance
    recipe_scale = max_scale(guidance.cfg_scale, 1.0)
    if recipe_scale <= 1:
        return
    fix = cfg_flags(guidance, number)
    if scale <= 1 and not has_input_video:
        message = (
            f"guidance is off in pass {number}, and this model was trained to be guided: it follows the prompt loosely."
        )
        yield Finding(QUALITY, "guidance", message, fix)
    elif scale > MAX_SHARE * recipe_scale:
        message = f"guidance is {scale:g} in pass {number}, and the recipe's {recipe_scale:g}: colours burn out."
        yield Finding(QUALITY, "guidance", message, fix)


def _check_stg(item: PassOfRecipe) -> Iterator[Finding]:
    steps = [step for step in item.resolved.evaluation_guidance if step.stg_scale > 0]
    if not steps:
        return
    scale, recipe_scale = max(step.stg_scale for step in steps), max_scale(item.settings.guidance.stg_scale, 0.0)
    fix = stg_flags(item.settings.guidance) if item.resolved.number == 1 else ""
    where = f"STG is {scale:g} in pass {item.resolved.number}"
    if all(not step.skip_blocks for step in steps):
        message = f"{where} and perturbs no block: it takes time and changes nothing. Name blocks with --skip-blocks."
        yield Finding(SPEED, "STG", message, fix)
    elif item.is_distilled:
        message = f"{where}, but the model is distilled, and was made to run without guidance."
        yield Finding(QUALITY, "STG", message, "--stg 0" if fix else "")
    elif recipe_scale and scale > MAX_SHARE * recipe_scale:
        message = f"{where}, and the recipe's is {recipe_scale:g}: motion and contrast become harsh."
        yield Finding(QUALITY, "STG", message, fix)
