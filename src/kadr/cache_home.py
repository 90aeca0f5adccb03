"""The folder of kadr's caches on disk."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_home() -> Path:
    """Returns the folder of kadr's caches: $KADR_CACHE, else a folder in the system's place for caches.

    Raises:
        RuntimeError: this user has no home directory.
    """
    if kadr_cache := os.environ.get("KADR_CACHE"):
        return Path(kadr_cache).expanduser()
    xdg_cache = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(xdg_cache):  # the standard says to ignore relative ones
        return Path(xdg_cache) / "kadr"
    if sys.platform == "win32" and (local := os.environ.get("LOCALAPPDATA")):
        return Path(local) / "kadr" / "cache"
    return Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "kadr"
