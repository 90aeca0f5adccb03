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
    return _system_folder("XDG_CACHE_HOME", ".cache", "Library/Caches", "LOCALAPPDATA", "kadr/cache")


def data_home() -> Path:
    """Returns the folder of what kadr keeps for its user, such as a server's videos, in the system's place for that.

    Raises:
        RuntimeError: this user has no home directory.
    """
    return _system_folder("XDG_DATA_HOME", ".local/share", "Library/Application Support", "LOCALAPPDATA", "kadr")


def config_home() -> Path:
    """Returns the folder of kadr's config file, in the system's place for settings.

    Raises:
        RuntimeError: this user has no home directory.
    """
    return _system_folder("XDG_CONFIG_HOME", ".config", "Library/Application Support", "APPDATA", "kadr")


def _system_folder(xdg_variable: str, linux: str, mac: str, windows_variable: str, windows: str) -> Path:
    """Returns kadr's folder in one of the system's places: that of the XDG standard, of Windows, or in the home."""
    if (xdg_home := _absolute_from_environment(xdg_variable)) is not None:
        return xdg_home / "kadr"
    if sys.platform == "win32" and (place := os.environ.get(windows_variable)):
        return Path(place) / windows
    return Path.home() / (mac if sys.platform == "darwin" else linux) / "kadr"


def _absolute_from_environment(variable: str) -> Path | None:
    """Returns an absolute path of the environment; the XDG standard says to ignore relative ones."""
    text = os.environ.get(variable, "")
    return Path(text) if os.path.isabs(text) else None
