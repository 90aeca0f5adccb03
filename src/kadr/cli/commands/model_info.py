"""`kadr models info`: tells what is known of a released model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from kadr.cli.commands.verify import Name, bytes_on_disk
from kadr.cli.flags import options
from kadr.cli.terminal.errors import print_stdout
from kadr.cli.terminal.table import format_columns, format_si
from kadr.models.registry import Recipe, Release, find_release, required_releases
from kadr.sampling.settings import Pass
from kadr.spec.locate import find_release_on_disk

_TOO_MANY_WORDS = "any, as of a text encoder that was trained with the whole language"


def info(name: Name, as_json: options.Json = False) -> None:
    """Tell what is known of a released model.

    Prints its description, licence, files and recipe, and for a model of few words all of them.
    """
    release = find_release(name)
    print_stdout(json.dumps(_to_json(release)) if as_json else "\n".join(_lines(release)))


def _to_json(release: Release) -> dict[str, Any]:
    is_model = release.kind == "model"
    return {
        "name": release.name,
        "kind": release.kind,
        "version": release.version,
        "description": release.description,
        "licence": release.licence,
        "repo": release.repo,
        "files": [_file(component) for component in required_releases(release)],
        "recipe": json.loads(json.dumps(asdict(release.recipe))) if is_model else None,
        "words": {kind: list(words) for kind, words in release.words.items()} or None,
    }


def _file(release: Release) -> dict[str, Any]:
    path = find_release_on_disk(release)
    return {
        "name": release.name,
        "kind": release.kind,
        "file": release.file,
        "bytes": bytes_on_disk(release, path) if path else release.size_bytes,
        "on_disk": str(path) if path else None,
    }


def _lines(release: Release) -> Iterator[str]:
    yield f"{release.name}: {release.description}"
    yield f"licence: {release.licence}"
    yield f"source: {f'https://huggingface.co/{release.repo}' if release.repo else 'comes with kadr'}"
    yield ""
    files = [_file(component) for component in required_releases(release)]
    rows = [("component", "kind", "bytes", "on disk", "file")]
    for file in files:
        size = format_si(file["bytes"]) if file["bytes"] else ""
        rows.append((file["name"], file["kind"], size, "yes" if file["on_disk"] else "no", file["file"]))
    yield from format_columns(rows)
    if release.kind == "model":
        yield ""
        yield from _recipe_lines(release.recipe)
        yield ""
        yield from _word_lines(release)


def _recipe_lines(recipe: Recipe) -> Iterator[str]:
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


def _word_lines(release: Release) -> Iterator[str]:
    if not release.words:
        yield f"words: {_TOO_MANY_WORDS}"
        return
    yield "words, all that it was trained with:"
    yield from format_columns([(f"  {kind}", ", ".join(words)) for kind, words in release.words.items()])
