"""PyAV, which reads and writes video files: looked for before anything else is done for one."""

from __future__ import annotations

import importlib

from kadr.errors import MediaError


def check_pyav() -> None:
    """Raises a `MediaError` if PyAV is not installed, or cannot be loaded."""
    try:
        importlib.import_module("av")
    except ImportError as error:
        raise MediaError(
            f"videos are read and written by PyAV, which cannot be imported ({error}): pip install av. "
            "`Engine.generate` returns frames without it."
        ) from error
