"""`kadr models verify`: whether the files of a model are what they should be."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from kadr.checkpoints import hub
from kadr.checkpoints.verify import ABSENT, DAMAGED, UNVERIFIED, FileVerification, verify_files
from kadr.cli.flags import options
from kadr.cli.terminal.table import columns, in_words
from kadr.errors import CheckpointError
from kadr.models.registry import Release, find_release, required_releases
from kadr.spec.locate import PACKAGE_ROOT

EPILOG = "Needs no network where the cache is made of links, as it is everywhere but on most Windows machines."
CLOSE = 0.01  # the sizes that the registry states are right to within this share
OPENS = "opens"  # the state of a file that came with kadr: the hub has no checksum for it
Name = Annotated[str, typer.Argument(metavar="NAME", help="A name that `kadr models` lists.", show_default=False)]


class Result(NamedTuple):
    """A file, and the entry it belongs to."""

    entry: Release
    file: FileVerification


def verify(name: Name, as_json: options.Json = False) -> None:
    """Compare the files of a model with the hub's checksums.

    Those of its text encoder and upscaler too. Ends with 1 where one is damaged, or the model itself is not there.
    """
    results = [result for entry in required_releases(find_release(name)) for result in checked(entry)]
    if as_json:
        print(json.dumps({"name": name, "files": [_told(result) for result in results]}))
    else:
        rows = [("file", "of", "state"), *((file.name, entry.name, file.state) for entry, file in results)]
        print("\n".join(columns(rows)))
    require_whole(results, there=name)


def checked(entry: Release) -> Iterator[Result]:
    """Each file of an entry, compared with the hub's checksum; what came with kadr is opened instead.

    Raises:
        CheckpointError: a file that came with kadr does not open.
    """
    if entry.repo is not None:
        return (Result(entry, file) for file in verify_files(entry.repo, entry.file_patterns))
    return (Result(entry, file) for file in _opened(entry))


def require_whole(results: Sequence[Result], *, there: str = "") -> None:
    """Refuse what comparing has found to be damaged.

    Args:
        there: the name of an entry, of which no file may be absent.

    Raises:
        CheckpointError: a file is damaged, absent though it may not be, or could not be compared.
    """
    if faults := [_fault(result) for result in results if result.file.state in (DAMAGED, UNVERIFIED)]:
        raise CheckpointError(" ".join(faults))
    if any(entry.name == there and file.state == ABSENT for entry, file in results):
        raise CheckpointError(f"{there} is not on disk, or not all of it. `kadr models pull {there}` fetches it.")


def size_of(entry: Release, place: Path) -> int:
    """Bytes of an entry that is on disk."""
    if place.is_file() or entry.repo is None:
        return place.stat().st_size
    return sum(
        path.stat().st_size for path in hub.list_cached(entry.repo, entry.file_patterns).values() if path.is_file()
    )


def wrong_size(entry: Release, size: int) -> bool:
    """Whether so many bytes are not about those that the registry states."""
    stated = entry.size_bytes
    return stated is not None and abs(size - stated) > CLOSE * stated


def _opened(entry: Release) -> Iterator[FileVerification]:
    from kadr.checkpoints.header import read_header

    file = PACKAGE_ROOT / entry.file
    beside = file.parent.glob("text_encoder/*.safetensors") if entry.kind == "model" else ()
    for path in (file, *sorted(beside)):
        read_header(path)
        yield FileVerification(path.relative_to(file.parent).as_posix(), path, OPENS)


def _fault(result: Result) -> str:
    entry, file = result
    size = _size_in_words(entry, file)
    again = f"Delete {file.path and file.path.resolve()} and run `kadr models pull {entry.name}`."
    if file.state == DAMAGED:
        what = f"its checksum is {file.actual_digest}, and the hub's is {file.expected_digest}"
        return f"{file.path} is damaged{size and ', ' + size}: {what}. {again}"
    if size:
        return f"{file.path} is not what it should be: {size}. {again}"
    return (
        f"{file.path} has the right size, and more could not be seen: this cache is made without links, so its "
        "checksum is only known to the hub, which did not answer. Try again with a network."
    )


def _size_in_words(entry: Release, file: FileVerification) -> str:
    """What is odd about the size of a file; nothing, where nothing is or where the registry does not know it."""
    if file.path is None or len(entry.file_patterns) > 1 or not wrong_size(entry, size := file.path.stat().st_size):
        return ""
    short = "cut short to" if size < (entry.size_bytes or 0) else "grown to"
    return f"{short} {in_words(size)} of {in_words(entry.size_bytes or 0)} bytes"


def _told(result: Result) -> dict[str, str | None]:
    entry, file = result
    return {
        "of": entry.name,
        "file": file.name,
        "path": str(file.path) if file.path else None,
        "state": file.state,
        "expected": file.expected_digest,
        "found": file.actual_digest,
    }
