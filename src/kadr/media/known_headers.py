"""Headers that were read elsewhere: in a block of `use_known_headers` they answer for the files, which nobody opens.

A server that takes files from anyone reads their headers in a process of its own, and resolves requests in another that
must never open such a file. The headers are in a context variable: functions deep inside need no argument for them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from fractions import Fraction

from kadr.errors import MediaError


@dataclass(frozen=True)
class KnownHeader:
    """The header of an image or clip.

    Args:
        width, height: in pixels; of an image upright, of a clip as stored.
        upright_width, upright_height: as it is shown.
        frames, fps, is_cut_off: of a clip, see `ClipHeader`.
    """

    width: int
    height: int
    upright_width: int
    upright_height: int
    frames: int | None = None
    fps: Fraction | None = None
    is_cut_off: bool = False


_known_headers: ContextVar[Mapping[str, KnownHeader] | None] = ContextVar("kadr known headers", default=None)


@contextmanager
def use_known_headers(headers: Mapping[str, KnownHeader]) -> Iterator[None]:
    """Makes these the only headers that are known in the block, by path."""
    previous = _known_headers.set(headers)
    try:
        yield
    finally:
        _known_headers.reset(previous)


def find_known_header(path: str | os.PathLike[str]) -> KnownHeader | None:
    """Returns the header of a file; None outside of a block of `use_known_headers`.

    Raises:
        MediaError: the block does not know the file, and does not open it.
    """
    headers = _known_headers.get()
    if headers is None:
        return None
    if (header := headers.get(os.fspath(path))) is None:
        raise MediaError(f"{os.fspath(path)} was not looked at.")
    return header
