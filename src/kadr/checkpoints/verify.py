"""Whether the files in the hub's cache are what the hub has."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from kadr.checkpoints import hub
from kadr.checkpoints.digest import is_digest

OK, DAMAGED, ABSENT, UNVERIFIED = "ok", "damaged", "not on disk", "not verified"


@dataclass(frozen=True)
class FileVerification:
    """What comparing a file with the hub's checksum has shown.

    Args:
        name: within the repository; a pattern where nothing of it is there.
        path: where it lies; None where nothing is known of it.
        state: OK, DAMAGED, ABSENT, or UNKNOWN where the checksum could not be had.
        expected_digest, actual_digest: checksums, where they are known.
    """

    name: str
    path: Path | None
    state: str
    expected_digest: str | None = None
    actual_digest: str | None = None


def verify_files(repo: str, patterns: Sequence[str]) -> Iterator[FileVerification]:
    """Compare what the cache has of a repository with the hub's checksums, file by file.

    The cache names the bytes of a file by their checksum, so the network is not asked; except where the cache is made
    without links, as on most Windows machines.
    """
    files = hub.list_cached(repo, patterns)
    yield from (FileVerification(pattern, None, ABSENT) for pattern in patterns if not fnmatch.filter(files, pattern))
    for name, path in files.items():
        yield _verify_file(repo, name, path)


def _verify_file(repo: str, name: str, path: Path) -> FileVerification:
    if not path.is_file():
        return FileVerification(name, path, ABSENT)
    expected = _digest_from_symlink(path) or hub.fetch_digest(repo, name, path)
    if expected is None:
        return FileVerification(name, path, UNVERIFIED)
    found = hub.compute_digest_with_progress(path, name, expected)
    return FileVerification(name, path, OK if found == expected else DAMAGED, expected, found)


def _digest_from_symlink(path: Path) -> str | None:
    """What the bytes behind a link should have as their checksum: their name.

    Only the first link counts: where repositories share bytes it leads to another, which is named otherwise.
    """
    name = Path(os.readlink(path)).name if path.is_symlink() else ""
    return name if is_digest(name) else None
