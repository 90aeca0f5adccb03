"""How freed memory goes back to the system, on Linux with glibc.

Left alone, glibc raises the size from which a block gets pages of its own, up to 32 MB, as such blocks are freed. Below
it, blocks lie in one heap that shrinks from its end only, and what is freed inside stays with the process: measured, a
third of a decoder's working memory, and up to as much again as a transformer's.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt, in malloc.h
# Bytes. Smaller blocks stay in the heap, or each would cost the system's time for fresh pages: measured on two cores,
# 1 MB costs 13 % of a transformer's time on 640 tokens, 4 MB 4 % and 25 MB of memory.
LARGE = 4 << 20
# While a model runs, the same few sizes come and go: with 4 MB a decoder takes a quarter longer and, as its blocks do
# not fit each other's holes, hardly less memory; with 32 MB, as much as glibc takes, it is no faster.
LARGE_AT_WORK, KEPT_AT_WORK = 16 << 20, 64 << 20


def give_back_at_once() -> bool:
    """Have the whole process give large blocks back when they are freed. False where there is no such setting.

    For programs that own their process, before anything is computed: a library's guest has no business here. Fresh
    pages come in pieces of 2 MB, where the system leaves that to programs: in pieces of 4 KB, as is usual, a
    convolution would take a third longer.
    """
    _Process.owned = _mallopt() is not None
    if _Process.owned:
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch asks once, at its first large tensor
    return _set(LARGE, LARGE)


@contextmanager
def at_work() -> Iterator[None]:
    """Keep freed blocks for the next ones while a model runs, and give them all back after it.

    Does nothing in a process that `give_back_at_once` was not called for.
    """
    _Process.at_work += 1
    _set(LARGE_AT_WORK, KEPT_AT_WORK)
    try:
        yield
    finally:
        _Process.at_work -= 1
        if not _Process.at_work and _set(LARGE, LARGE):
            ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def to_stay() -> Iterator[None]:
    """Give large blocks pages of their own also `at_work`: they stay, and would cut up the room of those that go."""
    if not _Process.at_work:
        yield
        return
    _set(LARGE, KEPT_AT_WORK)
    try:
        yield
    finally:
        _set(LARGE_AT_WORK, KEPT_AT_WORK)


class _Process:
    owned = False  # by a program that had its heap set
    at_work = 0  # models that run now


def _set(large: int, kept: int) -> bool:
    set_option = _mallopt() if _Process.owned else None
    return set_option is not None and bool(set_option(_MMAP_THRESHOLD, large) and set_option(_TRIM_THRESHOLD, kept))


@cache
def _mallopt() -> Callable[[int, int], int] | None:
    return getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
