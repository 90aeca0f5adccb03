"""`kadr models`: what can be named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import kadr
from kadr.cli import options
from kadr.cli.faults import say
from kadr.cli.table import columns, in_words
from kadr.models.registry import RELEASED, Released

EPILOG = "A model that is not on disk is fetched from the hub by the first `kadr generate --model NAME` that needs it."


def models(as_json: options.Json = False) -> None:
    """List the models known by name.

    With their licences and sizes, and whether they are on disk.
    """
    entries = [_entry(released) for released in RELEASED]
    if as_json:
        print(json.dumps(entries))
        return
    rows = [("name", "version", "bytes", "on disk", "licence")]
    for entry in entries:
        size = in_words(entry["bytes"]) if entry["bytes"] else ""
        licence = entry["licence"].partition(",")[0]
        rows.append((entry["name"], entry["version"], size, "yes" if entry["on_disk"] else "no", licence))
    print("\n".join(columns(rows)))
    say(EPILOG)


def _entry(released: Released) -> dict[str, Any]:
    place = on_disk(released)
    return {
        "name": released.name,
        "version": released.version,
        "bytes": place.stat().st_size if place else released.size_bytes,
        "on_disk": str(place) if place else None,
        "licence": released.licence,
        "repo": released.repo,
        "file": released.file,
    }


def on_disk(released: Released) -> Path | None:
    """The file, if it is here already. Looks in folders only; the hub is not asked."""
    if released.repo is None:
        path = Path(kadr.__file__).parent / released.file
        return path if path.is_file() else None
    from kadr.checkpoints import hub

    return hub.on_disk(released.repo, released.file)
