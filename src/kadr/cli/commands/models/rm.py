"""`kadr models rm`: removes what was fetched for a model."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from kadr.checkpoints import hub
from kadr.cli.commands.models.verify import Name
from kadr.cli.flags import options
from kadr.cli.terminal.errors import print_stderr, print_stdout
from kadr.cli.terminal.output import print_path
from kadr.cli.terminal.table import format_si
from kadr.errors import RequestError
from kadr.models.registry import MODEL_RELEASES, Release, find_release, required_releases
from kadr.spec.locate import find_release_on_disk

RM_EPILOG = "Only files in the hub's own cache are removed, never your own. `kadr models pull NAME` fetches them again."
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


def rm(name: Name, yes: Yes = False, as_json: options.Json = False) -> None:
    """Remove a model's files from the hub's cache, and the components that no other model on disk needs.

    Asks first, and prints the path of each file that is removed.
    """
    release = find_release(name)
    if release.repo is None:
        raise RequestError(f"{name} comes with kadr: it goes with `pip uninstall kadr`.")
    shared = {entry: user for entry in required_releases(release)[1:] if (user := _other_user(entry, release))}
    entries = [entry for entry in required_releases(release) if entry.repo is not None and entry not in shared]
    files = {path for entry in entries for path in hub.list_stored(str(entry.repo), entry.file_patterns)}
    for entry, user in shared.items():
        print_stderr(f"{entry.name} stays: {user.name} needs it")
    if not files:
        raise RequestError(f"nothing of {name} is in the cache, {hub.cache_folder()}.")
    size = sum(path.stat().st_size for path in files if path.exists())
    names = ", ".join(entry.name for entry in entries)
    if not yes:
        _ask(f"Remove {len(files)} files, {format_si(size)} bytes, of {names}?")
    removed = hub.remove_stored(sorted(files))
    if as_json:
        print_stdout(json.dumps({"name": name, "bytes": size, "removed": [str(path) for path in removed]}))
        return
    for path in removed:
        print_path(path)
    print_stderr(f"removed {format_si(size)} bytes of {names}")


def _other_user(entry: Release, release: Release) -> Release | None:
    """Returns another model on disk that needs a component; None where there is none."""
    others = (model for model in MODEL_RELEASES if model is not release and entry in required_releases(model))
    return next((model for model in others if model.repo is not None and find_release_on_disk(model)), None)


def _ask(question: str) -> None:
    """Asks on a terminal.

    Raises:
        RequestError: there is none.
        Exit: the answer is no.
    """
    if not sys.stdin.isatty():
        raise RequestError(f"{question} Nobody can be asked here; to do it, add --yes.")
    typer.confirm(question, abort=True, err=True)
