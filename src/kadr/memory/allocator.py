"""Sets torch's allocator of GPU memory, for programs that own their process."""

from __future__ import annotations

import os
import platform
import sys

SETTING = "expandable_segments:True"
VARIABLE = "PYTORCH_ALLOC_CONF"  # read by torch from 2.9 on; older ones go without
# Older names of the variable. torch reads them first, so that whoever sets one has decided.
OLDER_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


def use_expandable_segments() -> bool:
    """Makes torch grow its segments of GPU memory instead of adding others, before it allocates the first.

    Sizes differ from stage to stage: freed segments of fixed size that no later tensor fits are lost to it, and memory
    runs out while some is free. For programs that own their process; a library must not call it.

    Returns:
        False where it is not done: a user has set the allocator, or the system has no such segments.
    """
    if any(name in os.environ for name in (VARIABLE, *OLDER_VARIABLES)):
        return False
    if sys.platform != "linux" or "microsoft" in platform.release().lower():  # WSL's driver refuses some of the calls
        return False
    os.environ[VARIABLE] = SETTING
    return True
