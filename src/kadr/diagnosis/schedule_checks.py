"""Checks of a request's steps, sigmas and samplers against the recipe."""

from __future__ import annotations

from collections.abc import Iterator

from kadr.diagnosis.finding import NOTE, QUALITY, SPEED, Finding
from kadr.diagnosis.recipe import PassOfRecipe, count_steps, passes_of_recipe, schedule_flags
from kadr.request.resolved_request import ResolvedRequest
from kadr.sampling.samplers import EULER, EULER_STOCHASTIC
from kadr.spec.model import ModelSpec

MIN_STEP_SHARE, MAX_STEP_SHARE, MAX_DISTILLED_SHARE = 0.6, 2.0, 1.5  # of the recipe's steps
MIN_FIRST_SIGMA = 0.9  # of a pass that begins with noise


def check_schedules(spec: ModelSpec, resolved: ResolvedRequest) -> Iterator[Finding]:
    """Yields the findings about steps, sigmas, samplers and the number of passes."""
    passes = passes_of_recipe(spec, resolved)
    for item in passes:
        if resolved.input_video is None:  # from an input video, any part of a schedule may be meant
            yield from _check_steps(item)
            yield from _check_ends(item, is_last=item is passes[-1])
        yield from _check_sampler(item)
    if spec.recipe.multi_scale and len(resolved.passes) == 1 and resolved.windows is None:
        message = "a single pass is run, and this model's recipe has two: the second adds the fine details."
        yield Finding(NOTE, "passes", message, "--multi-scale")


def _check_steps(item: PassOfRecipe) -> Iterator[Finding]:
    count, expected = count_steps(item.resolved.settings), count_steps(item.settings)
    number, fix = item.resolved.number, schedule_flags(item.settings, item.resolved.number)
    steps = f"pass {number} has {count} step{'s' * (count != 1)}, and the recipe {expected}"
    if count < MIN_STEP_SHARE * expected and not item.is_distilled:
        yield Finding(QUALITY, "steps", f"{steps}: with so few, shapes stay soft and motion breaks.", fix)
    elif count < MIN_STEP_SHARE * expected:
        yield Finding(QUALITY, "steps", f"{steps}: it was distilled to those, and not to fewer.", fix)
    elif item.is_distilled and count > MAX_DISTILLED_SHARE * expected and expected <= count:
        yield Finding(
            QUALITY, "steps", f"{steps}: it was distilled to those; more make it harsh, and take longer.", fix
        )
    elif count > MAX_STEP_SHARE * expected:
        yield Finding(
            SPEED, "steps", f"{steps}: so many change little and take {count / expected:.1f} times as long.", fix
        )


def _check_ends(item: PassOfRecipe, *, is_last: bool) -> Iterator[Finding]:
    """Yields findings about a schedule that begins below its noise, or ends before it is gone."""
    first, settings = item.resolved.sigmas[0], item.resolved.settings
    number, fix = item.resolved.number, schedule_flags(item.settings, item.resolved.number)
    if number == 1 and first < MIN_FIRST_SIGMA <= (item.settings.sigmas or (1.0,))[0]:
        message = f"the first sigma is {first:g}, and the video begins as pure noise, which is sigma 1: noise remains."
        yield Finding(QUALITY, "sigmas", message, fix)
    if is_last and settings.skip_final and not item.settings.skip_final:
        last = item.resolved.sigmas[-1]
        message = f"the last {settings.skip_final} sigmas are skipped: a single step goes from {last:g} to 0."
        yield Finding(QUALITY, "sigmas", message, "--skip-final 0")


def _check_sampler(item: PassOfRecipe) -> Iterator[Finding]:
    sampler, expected = item.resolved.settings.sampler or EULER, item.settings.sampler or EULER
    if EULER_STOCHASTIC not in (sampler, expected) or sampler == expected:
        return
    reason = (
        "the model was distilled for a sampler that adds new noise at each step"
        if expected == EULER_STOCHASTIC
        else "it adds new noise at each step, which this model was not made for"
    )
    flag = "--sampler" if item.resolved.number == 1 else "--second-sampler"
    message = f"the sampler of pass {item.resolved.number} is {sampler}, and the recipe's {expected}: {reason}."
    yield Finding(QUALITY, "sampler", message, f"{flag} {expected}")
