"""`kadr models info`: tells what is known of a model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from kadr.cli.commands.models.verify import Name, bytes_on_disk
from kadr.cli.flags import options
from kadr.cli.terminal.errors import print_stdout
from kadr.cli.terminal.output import print_lines
from kadr.cli.terminal.recipe import recipe_lines, recipe_to_json, word_lines, words_to_json
from kadr.cli.terminal.table import format_columns, format_si
from kadr.models.registry import Release, required_releases
from kadr.spec.locate import find_release_on_disk, look_up_name, unknown_name_error
from kadr.spec.model_folders import FolderEntry, ModelFolders


def info(name: Name, models_dir: options.ModelsDir = None, as_json: options.Json = False) -> None:
    """Tell what is known of a model.

    Prints the description, licence, files and recipe of a released one, and for a model of few words all of them; of a
    file in a folder of models its place, size and dtype, and the recipe of the release that it is.
    """
    folders = ModelFolders.open(models_dir or ())
    path, release = look_up_name(name, folders)
    if release is not None:
        print_stdout(json.dumps(_to_json(release)) if as_json else "\n".join(_lines(release)))
    elif path is not None:
        from kadr.cli.commands.models.folder_info import FolderModel  # loads torch

        model = FolderModel.open(FolderEntry(folders.kind_of(path), name, path))
        if as_json:
            print_stdout(json.dumps(model.to_json()))
        else:
            print_lines(model.lines())
    else:
        raise unknown_name_error(name, "model", folders)


def _to_json(release: Release) -> dict[str, Any]:
    return {
        "name": release.name,
        "kind": release.kind,
        "version": release.version,
        "description": release.description,
        "licence": release.licence,
        "repo": release.repo,
        "files": [_file(component) for component in required_releases(release)],
        "recipe": recipe_to_json(release.recipe) if release.kind == "model" else None,
        "words": words_to_json(release),
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
        yield from recipe_lines(release.recipe)
        yield ""
        yield from word_lines(release)
