"""Standard streams that were closed before the process began, as by `>&-`, services and windows without a console."""

from __future__ import annotations

import os
import sys


def open_closed_streams() -> None:
    """Opens the null device for each standard stream that is closed, where Python has None for the stream."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode, encoding="utf-8"))
