"""`kadr models`: what can be named, and whether it is here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer

from kadr.cli.commands import pull, verify
from kadr.cli.flags import options
from kadr.cli.terminal.errors import handle_errors, print_stderr
from kadr.cli.terminal.table import format_columns, format_si
from kadr.models.registry import RELEASES, Release
from kadr.spec.locate import find_release_on_disk

MODELS_EPILOG = (
    "`kadr models pull NAME` fetches a model with all it needs, `kadr models verify NAME` compares it with the hub's "
    "checksums. What is not on disk is also fetched by the first `kadr generate --model NAME` that needs it."
)


def models(context: typer.Context, as_json: options.Json = False) -> None:
    """List the models known by name; fetch them, check them.

    With their licences and sizes, and whether they are on disk.
    """
    if context.invoked_subcommand is None:
        list_models(as_json)


def list_models(as_json: options.Json = False) -> None:
    """List the models known by name, and the parts they need.

    With their licences and sizes, and whether they are on disk.
    """
    entries = [_entry(released, find_release_on_disk(released)) for released in RELEASES]
    if as_json:
        print(json.dumps(entries))
        return
    head = ("name", "kind", "version", "bytes", "on disk", "licence")
    rows = [_row(released, entry) for released, entry in zip(RELEASES, entries, strict=True)]
    print("\n".join(format_columns([head, *rows])))
    print_stderr(MODELS_EPILOG)


def _entry(released: Release, path: Path | None) -> dict[str, Any]:
    return {
        "name": released.name,
        "kind": released.kind,
        "version": released.version,
        "bytes": verify.bytes_on_disk(released, path) if path else released.size_bytes,
        "on_disk": str(path) if path else None,
        "licence": released.licence,
        "repo": released.repo,
        "file": released.file,
    }


def _row(released: Release, entry: dict[str, Any]) -> tuple[str, ...]:
    size = entry["bytes"]
    here = "no" if not entry["on_disk"] else "wrong size" if verify.has_wrong_size(released, size) else "yes"
    licence = released.licence.partition(",")[0]
    return released.name, released.kind, released.version, format_si(size) if size else "", here, licence


# Without markup, as in `main`.
app = typer.Typer(rich_markup_mode=None, invoke_without_command=True)
app.callback(epilog=MODELS_EPILOG)(handle_errors()(models))
app.command("list")(handle_errors()(list_models))
app.command("pull", epilog=pull.PULL_EPILOG)(handle_errors()(pull.pull))
app.command("verify", epilog=verify.VERIFY_EPILOG)(handle_errors()(verify.verify))
