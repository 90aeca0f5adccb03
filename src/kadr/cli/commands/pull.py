"""`kadr models pull`: all that a model needs, brought to this machine."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from kadr.checkpoints import hub
from kadr.cli.commands.verify import Name, require_intact, verify_entry
from kadr.cli.flags import options
from kadr.cli.terminal.errors import print_stderr
from kadr.cli.terminal.table import format_si
from kadr.models.registry import Release, find_release, required_releases
from kadr.spec.locate import fetch_release, find_release_on_disk

if TYPE_CHECKING:
    from kadr.checkpoints.hub import RemoteFile

PULL_EPILOG = "What broke off goes on where it stopped. The files lie in the hub's own cache, which HF_HOME moves."


def pull(name: Name, as_json: options.Json = False) -> None:
    """Fetch a model with its text encoder and upscaler.

    Every file is compared with the hub's checksum, those that are there already too. Prints where they lie.
    """
    entries = required_releases(find_release(name))
    coming = {
        entry: hub.list_missing(entry.repo, entry.file_patterns)
        for entry in entries
        if entry.repo and not find_release_on_disk(entry)
    }
    _announce(entries, coming)
    hub.check_disk_space(name, sum(file.remaining_bytes for files in coming.values() for file in files))
    places = {}
    for entry in entries:
        print_stderr(f"{'fetching' if entry in coming else 'checking'} {entry.name}")
        if entry not in coming:
            require_intact(list(verify_entry(entry)))
        places[entry] = fetch_release(entry)
    if as_json:
        told = [
            {"name": e.name, "kind": e.kind, "path": str(path), "fetched": e in coming} for e, path in places.items()
        ]
        print(json.dumps({"name": name, "files": told}))
    else:
        print("\n".join(map(str, places.values())))


def _announce(entries: Sequence[Release], to_fetch: Mapping[Release, Sequence[RemoteFile]]) -> None:
    for licence in dict.fromkeys(entry.licence for entry in entries):
        print_stderr(f"licence of {', '.join(entry.name for entry in entries if entry.licence == licence)}: {licence}")
    for entry in entries:
        if entry in to_fetch:
            print_stderr(f"{entry.name} is to be fetched: {_format_bytes(to_fetch[entry])}")
        else:
            print_stderr(f"{entry.name} {'is there already' if entry.repo else 'comes with kadr'}")
    if len(to_fetch) > 1:
        print_stderr(f"together {_format_bytes([file for files in to_fetch.values() for file in files])}")


def _format_bytes(files: Sequence[RemoteFile]) -> str:
    size, left = sum(file.size for file in files), sum(file.remaining_bytes for file in files)
    return f"{format_si(size)} bytes" + (f", {format_si(size - left)} of which have come before" if left < size else "")
