"""`kadr models`: lists released models and those in folders; fetches and verifies released ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from kadr.cli.commands.models import info, pull, rm, verify
from kadr.cli.flags import options
from kadr.cli.terminal.errors import handle_errors, print_stderr, print_stdout
from kadr.cli.terminal.output import print_lines
from kadr.cli.terminal.table import format_columns, format_si
from kadr.models.registry import RELEASES, Release
from kadr.quoting import one_line, show
from kadr.spec.locate import find_release_on_disk
from kadr.spec.model_folders import ModelFolders

if TYPE_CHECKING:
    from kadr.spec.folder_listing import ListedModel

MAX_NAME, MAX_STATE = 160, 200  # characters of a name and of a problem in the table; --json has all
MODELS_EPILOG = (
    "`kadr models info NAME` tells what is known of one, `kadr models pull NAME` fetches a model with all it needs, "
    "`kadr models verify NAME` compares it with the hub's checksums, `kadr models rm NAME` removes it. `kadr generate "
    "--model NAME` also fetches what is not on disk."
)


def models(context: typer.Context, models_dir: options.ModelsDir = None, as_json: options.Json = False) -> None:
    """List released models and those in your folders; fetch and verify released ones.

    Prints their licences and sizes, and whether they are on disk.
    """
    if context.invoked_subcommand is None:
        list_models(models_dir, as_json)
    elif models_dir or as_json:
        raise typer.BadParameter(f"give it after {context.invoked_subcommand}.", param_hint="--models-dir or --json")


def list_models(models_dir: options.ModelsDir = None, as_json: options.Json = False) -> None:
    """List released models, the components they need, and the models in your folders.

    Prints licences and sizes, and whether a release is on disk; of a file in a folder its dtype, and the reason if kadr
    does not open it.
    """
    entries = [_entry(release, find_release_on_disk(release)) for release in RELEASES]
    found = _list_folders(ModelFolders.open(models_dir or ()))
    if as_json:
        print_stdout(json.dumps([*entries, *map(_folder_entry, found)]))
        return
    header = ("name", "kind", "version", "bytes", "on disk", "licence")
    rows = [_row(release, entry) for release, entry in zip(RELEASES, entries, strict=True)]
    print_lines(format_columns([header, *rows]))
    if found:
        folder_rows = [("name", "folder", "bytes", "dtype", "state"), *map(_folder_row, found)]
        print_lines(["", *format_columns(folder_rows)])
    print_stderr(MODELS_EPILOG)


def _list_folders(folders: ModelFolders) -> list[ListedModel]:
    """Returns the models in the folders; says which folders are not there."""
    for path in folders.missing:
        print_stderr(f"warning: {path} is configured as a folder of models, and has none in it now")
    if not folders.folders:
        return []
    from kadr.spec.folder_listing import list_models  # loads torch

    return list(list_models(folders))


def _folder_entry(model: ListedModel) -> dict[str, Any]:
    """Returns the object of --json for a model in a folder."""
    entry = model.entry
    return {
        "name": entry.name,
        "kind": entry.kind,
        "version": None,
        "bytes": model.size_bytes,
        "on_disk": str(entry.path),
        "licence": None,
        "repo": None,
        "file": str(entry.path),
        "dtype": model.dtype,
        "problem": entry.problem,
    }


def _folder_row(model: ListedModel) -> tuple[str, ...]:
    entry = model.entry
    state = "ok" if entry.problem is None else one_line(entry.problem, MAX_STATE)
    return show(entry.name, MAX_NAME), entry.kind, format_si(model.size_bytes), model.dtype or "", state


def _entry(release: Release, path: Path | None) -> dict[str, Any]:
    return {
        "name": release.name,
        "kind": release.kind,
        "version": release.version,
        "bytes": verify.bytes_on_disk(release, path) if path else release.size_bytes,
        "on_disk": str(path) if path else None,
        "licence": release.licence,
        "description": release.description,
        "repo": release.repo,
        "file": release.file,
    }


def _row(release: Release, entry: dict[str, Any]) -> tuple[str, ...]:
    size = entry["bytes"]
    disk_state = "no" if not entry["on_disk"] else "wrong size" if verify.has_wrong_size(release, size) else "yes"
    licence = release.licence.partition(",")[0]
    return release.name, release.kind, release.version, format_si(size) if size else "", disk_state, licence


# Without markup, as in `main`.
app = typer.Typer(rich_markup_mode=None, invoke_without_command=True)
app.callback(epilog=MODELS_EPILOG)(handle_errors()(models))
app.command("list")(handle_errors()(list_models))
app.command("info")(handle_errors()(info.info))
app.command("pull", epilog=pull.PULL_EPILOG)(handle_errors()(pull.pull))
app.command("rm", epilog=rm.RM_EPILOG)(handle_errors()(rm.rm))
app.command("verify", epilog=verify.VERIFY_EPILOG)(handle_errors()(verify.verify))
