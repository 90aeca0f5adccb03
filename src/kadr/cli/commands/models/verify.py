"""`kadr models verify`: compares a model's files with the hub's checksums."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from kadr.checkpoints import hub
from kadr.checkpoints.verify import ABSENT, DAMAGED, UNVERIFIED, FileVerification, verify_files
from kadr.cli.flags import options
from kadr.cli.flags.completion import release_completer
from kadr.cli.terminal.errors import print_stdout
from kadr.cli.terminal.output import print_lines
from kadr.cli.terminal.table import format_columns, format_si
from kadr.errors import CheckpointError
from kadr.models.registry import Release, find_release, required_releases
from kadr.spec.locate import PACKAGE_ROOT

VERIFY_EPILOG = "Needs no network where the cache is made of links, as it is everywhere but on most Windows machines."
SIZE_TOLERANCE = 0.01  # sizes in the registry may be off by this share
MAX_FAULTS = 2000  # characters: paths and checksums are there to be copied
READABLE = "opens"  # the state of a file that came with kadr: the hub has no checksum for it
Name = Annotated[
    str,
    typer.Argument(
        metavar="NAME",
        help="A name that `kadr models` lists.",
        show_default=False,
        autocompletion=release_completer(),
    ),
]


class Result(NamedTuple):
    """A file, and the entry it belongs to."""

    entry: Release
    file: FileVerification


def verify(name: Name, as_json: options.Json = False) -> None:
    """Compare the files of a model with the hub's checksums.

    Includes those of its text encoder and upscaler. Exits with 1 if a file is damaged, or the model is not on disk.
    """
    results = [result for entry in required_releases(find_release(name)) for result in verify_entry(entry)]
    if as_json:
        print_stdout(json.dumps({"name": name, "files": [_to_json(result) for result in results]}))
    else:
        rows = [("file", "of", "state"), *((file.name, entry.name, file.state) for entry, file in results)]
        print_lines(format_columns(rows))
    require_intact(results, required_name=name)


def verify_entry(entry: Release) -> Iterator[Result]:
    """Compares each file of an entry with the hub's checksum; opens files that came with kadr instead.

    Raises:
        CheckpointError: a file that came with kadr does not open.
    """
    if entry.repo is not None:
        return (Result(entry, file) for file in verify_files(entry.repo, entry.file_patterns))
    return (Result(entry, file) for file in _verify_bundled(entry))


def require_intact(results: Sequence[Result], *, required_name: str = "") -> None:
    """Refuses damaged files.

    Args:
        required_name: the name of an entry, of which no file may be absent.

    Raises:
        CheckpointError: a file is damaged, absent though it may not be, or could not be compared.
    """
    if faults := [_describe_fault(result) for result in results if result.file.state in (DAMAGED, UNVERIFIED)]:
        raise CheckpointError(" ".join(faults), limit=MAX_FAULTS)
    if any(entry.name == required_name and file.state == ABSENT for entry, file in results):
        raise CheckpointError(
            f"{required_name} is not on disk, or not all of it. `kadr models pull {required_name}` fetches it."
        )


def bytes_on_disk(entry: Release, path: Path) -> int:
    """Returns the bytes of an entry that is on disk."""
    if path.is_file() or entry.repo is None:
        return path.stat().st_size
    return sum(
        path.stat().st_size for path in hub.list_cached(entry.repo, entry.file_patterns).values() if path.is_file()
    )


def has_wrong_size(entry: Release, size: int) -> bool:
    """Returns whether a size is more than a percent off the registry's."""
    stated = entry.size_bytes
    return stated is not None and abs(size - stated) > SIZE_TOLERANCE * stated


def _verify_bundled(entry: Release) -> Iterator[FileVerification]:
    from kadr.checkpoints.header import read_header

    file = PACKAGE_ROOT / entry.file
    text_encoder = file.parent.glob("text_encoder/*.safetensors") if entry.kind == "model" else ()
    for path in (file, *sorted(text_encoder)):
        read_header(path)
        yield FileVerification(path.relative_to(file.parent).as_posix(), path, READABLE)


def _describe_fault(result: Result) -> str:
    entry, file = result
    size = _describe_size(entry, file)
    remedy = f"Delete {file.path and file.path.resolve()} and run `kadr models pull {entry.name}`."
    if file.state == DAMAGED:
        fault = f"its checksum is {file.actual_digest}, and the hub's is {file.expected_digest}"
        return f"{file.path} is damaged{size and ', ' + size}: {fault}. {remedy}"
    if size:
        return f"{file.path} is not what it should be: {size}. {remedy}"
    return (
        f"{file.path} has the right size, but its checksum could not be compared: this cache is made without "
        "links, so only the hub knows the checksum, and it did not answer. Try again with a network."
    )


def _describe_size(entry: Release, file: FileVerification) -> str:
    """Describes a wrong size of a file; "" if it is right or the registry does not state it."""
    if file.path is None or len(entry.file_patterns) > 1 or not has_wrong_size(entry, size := file.path.stat().st_size):
        return ""
    change = "cut short to" if size < (entry.size_bytes or 0) else "grown to"
    return f"{change} {format_si(size)} of {format_si(entry.size_bytes or 0)} bytes"


def _to_json(result: Result) -> dict[str, str | None]:
    entry, file = result
    return {
        "of": entry.name,
        "file": file.name,
        "path": str(file.path) if file.path else None,
        "state": file.state,
        "expected_digest": file.expected_digest,
        "actual_digest": file.actual_digest,
    }
