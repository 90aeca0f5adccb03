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

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt, in malloc.h
# Bytes. Smaller blocks stay in the heap, or each would cost the system's time for fresh pages: measured on two cores,
# 1 MB costs 13 % of a transformer's time on 640 tokens, 4 MB 4 % and 25 MB of memory.
MMAP_THRESHOLD = 4 << 20
# While a model runs, the same few sizes come and go: with 4 MB a decoder takes a quarter longer and, as its blocks do
# not fit each other's holes, hardly less memory; with 32 MB, as much as glibc takes, it is no faster.
RUNNING_MMAP_THRESHOLD, RUNNING_TRIM_THRESHOLD = 16 << 20, 64 << 20


def tune_malloc() -> bool:
    """Have the whole process give large blocks back when they are freed. False where there is no such setting.

    For programs that own their process, before anything is computed: a library's guest has no business here. Fresh
    pages come in pieces of 2 MB, where the system leaves that to programs: in pieces of 4 KB, as is usual, a
    convolution would take a third longer.
    """
    _Process.is_tuned = _mallopt() is not None
    if _Process.is_tuned:
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch asks once, at its first large tensor
    return _set_thresholds(MMAP_THRESHOLD, MMAP_THRESHOLD)


@contextmanager
def retain_freed_memory() -> Iterator[None]:
    """Keep freed blocks for the next ones while a model runs, and give them all back after it.

    Does nothing in a process that `tune_malloc` was not called for.
    """
    _Process.running_models += 1
    _set_thresholds(RUNNING_MMAP_THRESHOLD, RUNNING_TRIM_THRESHOLD)
    try:
        yield
    finally:
        _Process.running_models -= 1
        if not _Process.running_models and _set_thresholds(MMAP_THRESHOLD, MMAP_THRESHOLD):
            ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def mmap_large_allocations() -> Iterator[None]:
    """Give large blocks pages of their own also `retain_freed_memory`: they stay, and would cut up the room of those that go."""
    if not _Process.running_models:
        yield
        return
    _set_thresholds(MMAP_THRESHOLD, RUNNING_TRIM_THRESHOLD)
    try:
        yield
    finally:
        _set_thresholds(RUNNING_MMAP_THRESHOLD, RUNNING_TRIM_THRESHOLD)


class _Process:
    is_tuned = False  # by a program that had its heap set
    running_models = 0  # models that run now


def _set_thresholds(mmap_threshold: int, trim_threshold: int) -> bool:
    set_option = _mallopt() if _Process.is_tuned else None
    return set_option is not None and bool(
        set_option(_M_MMAP_THRESHOLD, mmap_threshold) and set_option(_M_TRIM_THRESHOLD, trim_threshold)
    )


@cache
def _mallopt() -> Callable[[int, int], int] | None:
    return getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
