"""PyAV, which reads and writes video files: looked for before anything else is done for one."""

from __future__ import annotations

import importlib
import os

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


def quiet_encoders() -> None:
    """Keeps the encoder of AV1 from describing itself on stderr; it reads this once, for the whole process."""
    os.environ.setdefault("SVT_LOG", "1")  # errors alone
