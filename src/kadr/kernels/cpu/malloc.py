"""Tunes glibc's malloc on Linux so that freed memory goes back to the system.

By default, glibc raises its mmap threshold (the size from which a block gets its own pages) up to 32 MB as such blocks
are freed. Smaller blocks lie in one heap that shrinks only from its end, so memory freed inside it stays with the
process: measured, a third of a decoder's working memory, and up to as much again as a transformer's.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # options of mallopt, from malloc.h
# Bytes. Smaller blocks stay in the heap, since fresh pages for each cost time: measured on two cores with 640 tokens,
# 1 MB costs 13 % of a transformer's time, 4 MB costs 4 % and 25 MB of memory.
MMAP_THRESHOLD = 4 << 20
# While a model runs, it allocates and frees the same few sizes: with 4 MB a decoder takes a quarter longer and, since
# blocks do not fit the holes that others leave, hardly less memory; with 32 MB, glibc's own maximum, it is no faster.
RUNNING_MMAP_THRESHOLD, RUNNING_TRIM_THRESHOLD = 16 << 20, 64 << 20


def tune_malloc() -> bool:
    """Makes the whole process return large blocks to the system when they are freed.

    For programs that own their process, before anything is computed; a library must not call it. Also asks for huge
    pages of 2 MB, where the system leaves that to programs: with the usual 4 KB a convolution takes a third longer.

    Returns:
        False where malloc has no such options.
    """
    _Process.is_tuned = _mallopt() is not None
    if _Process.is_tuned:
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch reads it once, at its first large tensor
    return _set_thresholds(MMAP_THRESHOLD, MMAP_THRESHOLD)


def is_malloc_tuned() -> bool:
    """Returns whether this process called `tune_malloc`."""
    return _Process.is_tuned


@contextmanager
def retain_freed_memory() -> Iterator[None]:
    """Keeps freed blocks for reuse while a model runs, and returns them all to the system after the last one.

    Models of several threads may run at once. Does nothing in a process that did not call `tune_malloc`.
    """
    _count(models=1)
    try:
        yield
    finally:
        if _count(models=-1) and not _Process.running_models:
            ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def mmap_large_allocations() -> Iterator[None]:
    """Gives large blocks their own pages also inside `retain_freed_memory`.

    For allocations that stay: among those that come and go, they would fragment the heap. Applies to all threads while
    one of them is in such a block.
    """
    _count(mmapping=1)
    try:
        yield
    finally:
        _count(mmapping=-1)


class _Process:
    is_tuned = False  # `tune_malloc` was called
    running_models = 0  # `retain_freed_memory` blocks that are active, in all threads
    mmapping_blocks = 0  # `mmap_large_allocations` blocks that are active, in all threads
    lock = threading.Lock()  # held while these counts and the thresholds change


def _count(*, models: int = 0, mmapping: int = 0) -> bool:
    """Adds to the counts of active blocks and sets the thresholds that they call for; False where that is not done."""
    with _Process.lock:
        _Process.running_models += models
        _Process.mmapping_blocks += mmapping
        if not _Process.running_models:
            return _set_thresholds(MMAP_THRESHOLD, MMAP_THRESHOLD)
        threshold = MMAP_THRESHOLD if _Process.mmapping_blocks else RUNNING_MMAP_THRESHOLD
        return _set_thresholds(threshold, RUNNING_TRIM_THRESHOLD)


def _set_thresholds(mmap_threshold: int, trim_threshold: int) -> bool:
    set_option = _mallopt() if _Process.is_tuned else None
    return set_option is not None and bool(
        set_option(_M_MMAP_THRESHOLD, mmap_threshold) and set_option(_M_TRIM_THRESHOLD, trim_threshold)
    )


@cache
def _mallopt() -> Callable[[int, int], int] | None:
    return getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
