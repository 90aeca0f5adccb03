"""`kadr models pull`: fetches a model and everything it needs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from kadr.checkpoints import hub
from kadr.cli.commands.models.verify import Name, require_intact, verify_entry
from kadr.cli.flags import options
from kadr.cli.terminal.errors import print_stderr, print_stdout
from kadr.cli.terminal.output import print_path
from kadr.cli.terminal.table import format_si
from kadr.models.registry import Release, find_release, required_releases
from kadr.spec.locate import fetch_release, find_release_on_disk

if TYPE_CHECKING:
    from kadr.checkpoints.hub import RemoteFile

PULL_EPILOG = "Interrupted downloads resume. Files are stored in the hub's own cache, which HF_HOME moves."


def pull(name: Name, as_json: options.Json = False) -> None:
    """Fetch a model with its text encoder and upscaler.

    Compares every file with the hub's checksum, also those on disk already. Prints the path of each.
    """
    entries = required_releases(find_release(name))
    to_fetch = {
        entry: hub.list_missing(entry.repo, entry.file_patterns)
        for entry in entries
        if entry.repo and not find_release_on_disk(entry)
    }
    _announce(entries, to_fetch)
    hub.check_disk_space(name, sum(file.remaining_bytes for files in to_fetch.values() for file in files))
    paths = {}
    for entry in entries:
        print_stderr(f"{'fetching' if entry in to_fetch else 'checking'} {entry.name}")
        if entry not in to_fetch:
            require_intact(list(verify_entry(entry)))
        paths[entry] = fetch_release(entry)
    if as_json:
        files = [
            {"name": entry.name, "kind": entry.kind, "path": str(path), "fetched": entry in to_fetch}
            for entry, path in paths.items()
        ]
        print_stdout(json.dumps({"name": name, "files": files}))
    else:
        for path in paths.values():
            print_path(path)


def _announce(entries: Sequence[Release], to_fetch: Mapping[Release, Sequence[RemoteFile]]) -> None:
    for licence in dict.fromkeys(entry.licence for entry in entries):
        print_stderr(f"licence of {', '.join(entry.name for entry in entries if entry.licence == licence)}: {licence}")
    for entry in entries:
        if entry in to_fetch:
            print_stderr(f"{entry.name} is to be fetched: {_format_bytes(to_fetch[entry])}")
        else:
            print_stderr(f"{entry.name} {'is on disk already' if entry.repo else 'comes with kadr'}")
    if len(to_fetch) > 1:
        print_stderr(f"total: {_format_bytes([file for files in to_fetch.values() for file in files])}")


def _format_bytes(files: Sequence[RemoteFile]) -> str:
    size, remaining = sum(file.size for file in files), sum(file.remaining_bytes for file in files)
    return f"{format_si(size)} bytes" + (
        f", {format_si(size - remaining)} of which are on disk already" if remaining < size else ""
    )
