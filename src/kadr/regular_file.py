"""Opens regular files only: reading a pipe waits for ever, and reading a device may never end."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

_SPECIAL_FILES = (
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


class NotRegularFileError(OSError):
    """A path leads to a pipe, a socket or a device; an `OSError`, so whoever reads files explains it already."""

    def __str__(self) -> str:
        return str(self.strerror)


def require_regular(path: str | os.PathLike[str]) -> None:
    """Refuses a path that is neither a regular file nor a folder, without opening it; links are followed.

    Raises:
        NotRegularFileError: with what it is.
        OSError: there is nothing, or it cannot be looked at.
    """
    mode = os.stat(path).st_mode
    for is_kind, kind in _SPECIAL_FILES:
        if is_kind(mode):
            raise NotRegularFileError(errno.EINVAL, f"it is {kind}, and only regular files are read", os.fspath(path))


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Opens a regular file for reading bytes.

    Raises:
        NotRegularFileError, OSError: as `require_regular`.
    """
    require_regular(path)
    return open(path, "rb")


def read_text(path: str | os.PathLike[str], encoding: str = "utf-8") -> str:
    """Returns the text of a regular file.

    Raises:
        NotRegularFileError, OSError: as `require_regular`.
        UnicodeDecodeError: it is not text in this encoding.
    """
    require_regular(path)
    return Path(path).read_text(encoding)
