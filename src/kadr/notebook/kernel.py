"""The notebook kernel that this process is, if it is one."""

from __future__ import annotations

import sys
from typing import Any


def notebook_display() -> Any:
    """Returns `IPython.display.display` in the kernel of a notebook; None elsewhere, as in IPython on a terminal.

    IPython is never loaded: in a kernel it is there already.
    """
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    if getattr(shell, "kernel", None) is None:
        return None
    from IPython.display import display

    return display
