"""How freed memory goes back to the system, on Linux with glibc.

Left alone, glibc raises the size from which a block gets pages of its own, up to 32 MB, as such blocks are freed. Below
it, blocks lie in one heap that shrinks from its end only, and what is freed inside stays with the process: measured, a
third of a decoder's working memory, and up to as much again as a transformer's.
"""

from __future__ import annotations

import ctypes
import os
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt, in malloc.h
# Bytes. Smaller blocks stay in the heap, or each would cost the system's time for fresh pages: measured on two cores,
# 1 MB costs 13 % of a transformer's time on 640 tokens, 4 MB 4 % and 25 MB of memory.
LARGE = 4 << 20


def give_back_at_once() -> bool:
    """Have the whole process give large blocks back when they are freed. False where there is no such setting.

    For programs that own their process, before anything is computed: a library's guest has no business here. Fresh
    pages come in pieces of 2 MB, where the system leaves that to programs: in pieces of 4 KB, as is usual, a
    convolution would take a third longer.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch asks once, at its first large tensor
    return bool(mallopt(_MMAP_THRESHOLD, LARGE) and mallopt(_TRIM_THRESHOLD, LARGE))
