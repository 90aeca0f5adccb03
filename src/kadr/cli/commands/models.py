"""`kadr models`: lists, fetches and verifies released models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer

from kadr.cli.commands import model_info, pull, verify
from kadr.cli.flags import options
from kadr.cli.terminal.errors import handle_errors, print_stderr, print_stdout
from kadr.cli.terminal.table import format_columns, format_si
from kadr.models.registry import RELEASES, Release
from kadr.spec.locate import find_release_on_disk

MODELS_EPILOG = (
    "`kadr models info NAME` tells what is known of one, `kadr models pull NAME` fetches a model with all it needs, "
    "`kadr models verify NAME` compares it with the hub's checksums. `kadr generate --model NAME` also fetches what is "
    "not on disk."
)


def models(context: typer.Context, as_json: options.Json = False) -> None:
    """List released models; fetch them, verify them.

    Prints their licences and sizes, and whether they are on disk.
    """
    if context.invoked_subcommand is None:
        list_models(as_json)


def list_models(as_json: options.Json = False) -> None:
    """List released models, and the components they need.

    Prints their licences and sizes, and whether they are on disk.
    """
    entries = [_entry(release, find_release_on_disk(release)) for release in RELEASES]
    if as_json:
        print_stdout(json.dumps(entries))
        return
    header = ("name", "kind", "version", "bytes", "on disk", "licence")
    rows = [_row(release, entry) for release, entry in zip(RELEASES, entries, strict=True)]
    print_stdout("\n".join(format_columns([header, *rows])))
    print_stderr(MODELS_EPILOG)


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
app.command("info")(handle_errors()(model_info.info))
app.command("pull", epilog=pull.PULL_EPILOG)(handle_errors()(pull.pull))
app.command("verify", epilog=verify.VERIFY_EPILOG)(handle_errors()(verify.verify))
