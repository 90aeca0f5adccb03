"""A recipe and the words of a model, as text and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from kadr.cli.terminal.table import format_columns
from kadr.models.registry import Recipe, Release
from kadr.sampling.settings import Pass

_TOO_MANY_WORDS = "any, as of a text encoder that was trained with the whole language"


def recipe_to_json(recipe: Recipe) -> dict[str, Any]:
    """Returns the fields of a recipe as plain data."""
    data: dict[str, Any] = json.loads(json.dumps(asdict(recipe)))
    return data


def words_to_json(release: Release) -> dict[str, list[str]] | None:
    """Returns the words of a model by kind; None for one that was trained with the whole language."""
    return {kind: list(words) for kind, words in release.words.items()} or None


def recipe_lines(recipe: Recipe) -> Iterator[str]:
    """Yields the recipe: the size, and the settings of each pass."""
    yield f"recipe: {recipe.size}, {recipe.frames} frames at {recipe.fps:g} per second"
    only_pass = recipe.first_pass if recipe.single_pass is None else recipe.single_pass
    if not recipe.multi_scale:
        yield f"  single pass: {_describe_pass(only_pass)}"
    if recipe.second_pass is not None:
        default = "" if recipe.multi_scale else ", with --multi-scale"
        yield f"  first pass{default}: {_describe_pass(recipe.first_pass)}"
        yield f"  second pass: {_describe_pass(recipe.second_pass)}"
    if recipe.multi_scale:
        yield f"  with --single-pass: {_describe_pass(only_pass)}"
    yield f"  negative prompt: {recipe.negative_prompt or 'none'}"


def _describe_pass(settings: Pass) -> str:
    steps = f"{settings.steps} steps" if settings.sigmas is None else f"{len(settings.sigmas)} steps at given sigmas"
    counts = ((settings.skip_initial, "first"), (settings.skip_final, "last"))
    skipped = [f"{count} {where}" for count, where in counts if count]
    parts = [steps + (f" less the {' and the '.join(skipped)}" if skipped else "")]
    scales = (("guidance", settings.guidance.cfg_scale, 1.0), ("STG", settings.guidance.stg_scale, 0.0))
    for name, scale, off in scales:
        if scale is not None and scale != off:
            values = scale if isinstance(scale, tuple) else (scale,)
            parts.append(f"{name} {', '.join(f'{value:g}' for value in values)}")
    return "; ".join([*parts, *([f"sampler {settings.sampler}"] if settings.sampler else [])])


def word_lines(release: Release) -> Iterator[str]:
    """Yields the words that a model was trained with, by kind."""
    if not release.words:
        yield f"words: {_TOO_MANY_WORDS}"
        return
    yield "words, all that it was trained with:"
    yield from format_columns([(f"  {kind}", ", ".join(words)) for kind, words in release.words.items()])
