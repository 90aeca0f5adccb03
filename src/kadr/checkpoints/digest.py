"""Checksums as the hub keeps them, told apart by their length: sha256 of a large file, git's sha1 of a small one."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path

SHA256_HEX_DIGITS, GIT_SHA1_HEX_DIGITS = 64, 40  # hex digits
READ_BYTES = 1 << 22  # bytes read at once
_DIGEST = re.compile(f"[0-9a-f]{{{GIT_SHA1_HEX_DIGITS}}}|[0-9a-f]{{{SHA256_HEX_DIGITS}}}")


def is_digest(text: str) -> bool:
    """Whether a text is a checksum of one of the two kinds."""
    return _DIGEST.fullmatch(text) is not None


def compute_digest(path: Path, *, like: str, watch: Callable[[int], object] = lambda size: None) -> str:
    """The checksum of a file.

    Args:
        like: a checksum of the kind that is wanted.
        watch: called with the number of bytes after every so many.
    """
    # Git hashes a file behind a short head, https://git-scm.com/book/en/v2/Git-Internals-Git-Objects. It is no
    # secret that needs keeping: sha1 serves.
    made = hashlib.sha256() if len(like) == SHA256_HEX_DIGITS else hashlib.sha1(usedforsecurity=False)
    if len(like) == GIT_SHA1_HEX_DIGITS:
        made.update(f"blob {path.stat().st_size}\0".encode())
    with path.open("rb") as file:
        while chunk := file.read(READ_BYTES):
            made.update(chunk)
            watch(len(chunk))
    return made.hexdigest()
