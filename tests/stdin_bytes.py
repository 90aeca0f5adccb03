"""Bytes on the stdin of a command that runs in this process."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def stdin_bytes(data: bytes) -> Iterator[None]:
    """Replaces `sys.stdin` by a stream of these bytes while the block runs."""
    before, sys.stdin = sys.stdin, io.TextIOWrapper(io.BytesIO(data))
    try:
        yield
    finally:
        sys.stdin = before
