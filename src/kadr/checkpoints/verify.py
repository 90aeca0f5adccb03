"""Verifies files in the hub's cache against the hub's checksums."""

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
    """The result of verifying one file.

    Args:
        name: its path within the repository; a pattern that matched no file in the cache.
        path: its path in the cache; None for a pattern.
        state: OK, DAMAGED, ABSENT, or UNVERIFIED where the hub's checksum is not known.
        expected_digest, actual_digest: the hub's checksum and the file's; None where they are not known.
    """

    name: str
    path: Path | None
    state: str
    expected_digest: str | None = None
    actual_digest: str | None = None


def verify_files(repo: str, patterns: Sequence[str]) -> Iterator[FileVerification]:
    """Verifies the cached files of a repository against the hub's checksums, file by file.

    The cache names the bytes of a file by their checksum, so no network is needed; except in a cache without symbolic
    links, as on most Windows machines.
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
    actual = hub.compute_digest_with_progress(path, name, expected)
    return FileVerification(name, path, OK if actual == expected else DAMAGED, expected, actual)


def _digest_from_symlink(path: Path) -> str | None:
    """Returns the checksum that a link's target should have, which is the target's name.

    Only the first link counts: where repositories share bytes, it leads to a second link with another kind of target.
    """
    name = Path(os.readlink(path)).name if path.is_symlink() else ""
    return name if is_digest(name) else None
