"""`kadr models`: what can be named, and whether it is here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer

from kadr.cli.commands import pull, verify
from kadr.cli.flags import options
from kadr.cli.terminal.errors import explained, say
from kadr.cli.terminal.table import columns, in_words
from kadr.models.registry import RELEASES, Release
from kadr.spec.locate import find_release_on_disk

EPILOG = (
    "`kadr models pull NAME` fetches a model with all it needs, `kadr models verify NAME` compares it with the hub's "
    "checksums. What is not on disk is also fetched by the first `kadr generate --model NAME` that needs it."
)


def models(context: typer.Context, as_json: options.Json = False) -> None:
    """List the models known by name; fetch them, check them.

    With their licences and sizes, and whether they are on disk.
    """
    if context.invoked_subcommand is None:
        listed(as_json)


def listed(as_json: options.Json = False) -> None:
    """List the models known by name, and the parts they need.

    With their licences and sizes, and whether they are on disk.
    """
    entries = [_entry(released, find_release_on_disk(released)) for released in RELEASES]
    if as_json:
        print(json.dumps(entries))
        return
    head = ("name", "kind", "version", "bytes", "on disk", "licence")
    rows = [_row(released, entry) for released, entry in zip(RELEASES, entries, strict=True)]
    print("\n".join(columns([head, *rows])))
    say(EPILOG)


def _entry(released: Release, place: Path | None) -> dict[str, Any]:
    return {
        "name": released.name,
        "kind": released.kind,
        "version": released.version,
        "bytes": verify.size_of(released, place) if place else released.size_bytes,
        "on_disk": str(place) if place else None,
        "licence": released.licence,
        "repo": released.repo,
        "file": released.file,
    }


def _row(released: Release, entry: dict[str, Any]) -> tuple[str, ...]:
    size = entry["bytes"]
    here = "no" if not entry["on_disk"] else "wrong size" if verify.wrong_size(released, size) else "yes"
    licence = released.licence.partition(",")[0]
    return released.name, released.kind, released.version, in_words(size) if size else "", here, licence


# Without markup, as in `main`.
app = typer.Typer(rich_markup_mode=None, invoke_without_command=True)
app.callback(epilog=EPILOG)(explained()(models))
app.command("list")(explained()(listed))
app.command("pull", epilog=pull.EPILOG)(explained()(pull.pull))
app.command("verify", epilog=verify.EPILOG)(explained()(verify.verify))
