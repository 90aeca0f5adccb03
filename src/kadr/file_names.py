"""Names of files: giving a complete file its name, and names that a system does not allow."""

from __future__ import annotations

import os
import re
import sys
import time
from pathlib import Path

CAN_DELETE_OPEN_FILES = os.name != "nt"
REPLACE_PAUSES = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)  # seconds between attempts on Windows
_RESERVED_ON_WINDOWS = re.compile(r"(con|prn|aux|nul|com[1-9¹²³]|lpt[1-9¹²³]) *(\..*)?", re.IGNORECASE)
_FORBIDDEN_ON_WINDOWS = re.compile(r'[<>:"|?*\x00-\x1f]|[. ]$')


def replace_file(complete: Path, path: Path) -> None:
    """Renames a complete file to its name, and replaces the file of that name, at once.

    Windows refuses that while a program has either file open, as virus scanners and indexers do for moments: there it
    is tried again for three seconds.

    Raises:
        OSError: the system refuses.
    """
    for pause in REPLACE_PAUSES if sys.platform == "win32" else ():
        try:
            os.replace(complete, path)
            return
        except PermissionError:
            time.sleep(pause)
    os.replace(complete, path)


def is_allowed_name(name: str) -> bool:
    """Returns whether this system allows a file of that name: on Windows some are devices, such as nul.mp4."""
    if sys.platform != "win32":
        return True
    return not _RESERVED_ON_WINDOWS.fullmatch(name) and not _FORBIDDEN_ON_WINDOWS.search(name)
