"""Checksums as the hub states them, distinguished by length: sha256 of a large file, git's sha1 of a small one."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path

from kadr.cancellation import check_cancelled
from kadr.regular_file import open_regular

SHA256_HEX_DIGITS, GIT_SHA1_HEX_DIGITS = 64, 40
READ_BYTES = 1 << 22  # per read
_DIGEST = re.compile(f"[0-9a-f]{{{GIT_SHA1_HEX_DIGITS}}}|[0-9a-f]{{{SHA256_HEX_DIGITS}}}")


def is_digest(text: str) -> bool:
    """Returns whether a text is a checksum of one of the two kinds."""
    return _DIGEST.fullmatch(text) is not None


def compute_digest(path: Path, *, like: str, watch: Callable[[int], object] = lambda size: None) -> str:
    """Computes the checksum of a file.

    Args:
        like: a checksum of the wanted kind.
        watch: called after every read with its number of bytes.
    """
    # Git hashes a file behind a short head, https://git-scm.com/book/en/v2/Git-Internals-Git-Objects. The checksum
    # detects damage, not attacks: sha1 serves.
    digest = hashlib.sha256() if len(like) == SHA256_HEX_DIGITS else hashlib.sha1(usedforsecurity=False)
    if len(like) == GIT_SHA1_HEX_DIGITS:
        digest.update(f"blob {path.stat().st_size}\0".encode())
    with open_regular(path) as file:
        while data := file.read(READ_BYTES):
            check_cancelled()
            digest.update(data)
            watch(len(data))
    return digest.hexdigest()
