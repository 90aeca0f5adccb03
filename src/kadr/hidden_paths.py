"""`PathHider`: shows messages to clients with the names of files alone; where they lie is the operator's business."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

# An address on the web, which stays; or all but the last part of a path without spaces, as far as one can tell it.
_FOLDERS = re.compile(r"https?://\S+|(?:[A-Za-z]:)?(?:[\\/][^\\/\s:,;'\"()]+)+[\\/](?=[^\\/\s])")
_BEFORE = r"(?<![\w.-])"  # else it is in an address on the web, or in another path
# Behind a known folder: those in it that lead to a file, which are the server's own and have no spaces; or its end.
_BEHIND = r"(?:(?P<folders>(?:[\\/][^\\/\s'\"]+)*[\\/])(?=[^\\/\s])|(?![\w.-]))"


class PathHider:
    """Takes the folders out of messages.

    Args:
        folders: that the server reads and writes, whose names may have anything in them.
    """

    def __init__(self, folders: Iterable[str | Path] = ()) -> None:
        forms = {form for folder in folders for form in _forms(folder)}
        known = {form for form in forms if len(Path(form).parts) > 1}  # "/" alone would be any slash
        # A folder in another one goes first: its own name may have spaces, which end what is taken for a path.
        self._known = [
            (form, re.compile(_BEFORE + re.escape(form) + _BEHIND)) for form in sorted(known, key=len, reverse=True)
        ]

    def __call__(self, message: str) -> str:
        """Returns a message with no folder in it."""
        for form, pattern in self._known:
            if form in message:
                message = pattern.sub(lambda match: "" if match["folders"] else "the server's folder", message)
        return _FOLDERS.sub(lambda match: match[0] if match[0].startswith("http") else "", message)


def _forms(folder: str | Path) -> set[str]:
    """Returns a folder as messages may write it: as it was named, without links, and as Python quotes text."""
    paths = {os.path.abspath(folder), os.path.realpath(folder)}
    return {form for path in paths for form in (path, repr(path)[1:-1])}
