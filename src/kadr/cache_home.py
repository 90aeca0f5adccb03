"""The folders of kadr's caches and of its config file on disk."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from kadr.validation import expand_home


def cache_home() -> Path:
    """Returns the folder of kadr's caches: $KADR_CACHE, else a folder in the system's place for caches.

    Raises:
        RuntimeError: this user has no home directory.
    """
    if kadr_cache := os.environ.get("KADR_CACHE"):
        return expand_home(kadr_cache)
    if (xdg_home := _absolute_from_environment("XDG_CACHE_HOME")) is not None:
        return xdg_home / "kadr"
    if sys.platform == "win32" and (local := os.environ.get("LOCALAPPDATA")):
        return Path(local) / "kadr" / "cache"
    return Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "kadr"


def data_home() -> Path:
    """Returns the folder of what kadr keeps for its user, such as a server's videos, in the system's place for that.

    Raises:
        RuntimeError: this user has no home directory.
    """
    if (xdg_home := _absolute_from_environment("XDG_DATA_HOME")) is not None:
        return xdg_home / "kadr"
    if sys.platform == "win32" and (local := os.environ.get("LOCALAPPDATA")):
        return Path(local) / "kadr"
    return Path.home() / ("Library/Application Support" if sys.platform == "darwin" else ".local/share") / "kadr"


def config_home() -> Path:
    """Returns the folder of kadr's config file, in the system's place for settings.

    Raises:
        RuntimeError: this user has no home directory.
    """
    if (xdg_home := _absolute_from_environment("XDG_CONFIG_HOME")) is not None:
        return xdg_home / "kadr"
    if sys.platform == "win32" and (roaming := os.environ.get("APPDATA")):
        return Path(roaming) / "kadr"
    return Path.home() / ("Library/Application Support" if sys.platform == "darwin" else ".config") / "kadr"


def _absolute_from_environment(variable: str) -> Path | None:
    """Returns an absolute path of the environment; the XDG standard says to ignore relative ones."""
    text = os.environ.get(variable, "")
    return Path(text) if os.path.isabs(text) else None
