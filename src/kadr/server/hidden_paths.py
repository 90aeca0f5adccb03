"""`PathHider`: shows messages to clients with the names of files alone; where they lie is the operator's business."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

# An address on the web, which stays; or all but the last part of a path without spaces, as far as one can tell it.
_FOLDERS = re.compile(r"https?://\S+|(?:[A-Za-z]:)?(?:[\\/][^\\/\s:,;'\"()]+)+[\\/](?=[^\\/\s])")


class PathHider:
    """Takes the folders out of messages.

    Args:
        folders: that the server reads and writes, whose names may have anything in them.
    """

    def __init__(self, folders: Iterable[str | Path] = ()) -> None:
        known = {form for folder in folders for form in _forms(folder)}
        known = {text for text in known if len(Path(text).parts) > 1}  # "/" alone would be any slash
        longest_first = "|".join(map(re.escape, sorted(known, key=len, reverse=True)))
        # What follows in the same path goes too: its folders are the server's own, and have no spaces.
        self._known = re.compile(rf"(?:{longest_first})(?:[\\/][^\\/\s'\"]+)*[\\/](?=[^\\/\s])") if known else None
        self._known_alone = re.compile(rf"(?:{longest_first})(?![\w.-])") if known else None

    def __call__(self, message: str) -> str:
        """Returns a message with no folder in it."""
        if self._known is not None and self._known_alone is not None:
            message = self._known_alone.sub("the server's folder", self._known.sub("", message))
        return _FOLDERS.sub(lambda match: match[0] if match[0].startswith("http") else "", message)


def _forms(folder: str | Path) -> set[str]:
    """Returns a folder as messages may write it: as it was named, without links, and as Python quotes text."""
    paths = {os.path.abspath(folder), os.path.realpath(folder)}
    return {form for path in paths for form in (path, repr(path)[1:-1])}
