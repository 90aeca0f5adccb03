"""Opens regular files only, and reads small ones: a pipe waits for ever, and a device or a huge file fills memory."""

from __future__ import annotations

import errno
import os
import stat
from typing import BinaryIO

_SPECIAL_FILES = (
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


MAX_TEXT_BYTES = 8_000_000  # of a config, an index or other text that comes with weights; real ones have a tenth


class _ExplainedError(OSError):
    """An `OSError`, which whoever reads files explains already, with the reason as its text."""

    def __str__(self) -> str:
        return str(self.strerror)


class NotRegularFileError(_ExplainedError):
    """A path leads to a pipe, a socket or a device."""


class FileTooLargeError(_ExplainedError):
    """A file is too large to be what it should be."""


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


def read_bytes(path: str | os.PathLike[str], max_bytes: int = MAX_TEXT_BYTES) -> bytes:
    """Returns the bytes of a regular file, and reads no more of a larger one than tells that it is larger.

    Raises:
        FileTooLargeError: it has more than `max_bytes` bytes.
        NotRegularFileError, OSError: as `require_regular`.
    """
    with open_regular(path) as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise FileTooLargeError(
            errno.EFBIG, f"it has more than {max_bytes:,} bytes, too many for such a file", os.fspath(path)
        )
    return data


def read_text(path: str | os.PathLike[str], encoding: str = "utf-8", *, max_bytes: int = MAX_TEXT_BYTES) -> str:
    """Returns the text of a regular file, with line ends as they are.

    Raises:
        FileTooLargeError, NotRegularFileError, OSError: as `read_bytes`.
        UnicodeDecodeError: it is not text in this encoding.
    """
    return read_bytes(path, max_bytes).decode(encoding)
