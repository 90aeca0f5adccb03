"""Files in memory: mapped, shared by all who read them, and let go of page by page.

A mapped page takes memory from when it is first touched. It can be let go of at any time, because the file still has
it: the next touch brings it back, from the system's cache as a rule.
"""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from kadr.errors import CheckpointError

# Without it Linux would set memory aside for pages that nobody will write, and refuse files larger than its memory.
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)  # Python names it from 3.13 on

# Shared by all sources of a file, and gone with its last tensor. The key tells a file from one that replaced it.
_maps: WeakValueDictionary[tuple[Path, int, int], mmap.mmap] = WeakValueDictionary()


def map_file(path: Path) -> mmap.mmap:
    """The file in memory: private, so it may be written to; kept for as long as a tensor uses it.

    Raises:
        CheckpointError: it cannot be read any more.
    """
    try:
        with path.open("rb") as file:
            stat = os.fstat(file.fileno())
            key = (path, stat.st_ino, stat.st_mtime_ns)
            mapped = _maps.get(key)
            if mapped is None:
                mapped = _maps[key] = _create_map(file.fileno())
            return mapped
    except (OSError, ValueError) as error:  # ValueError: the file is empty by now
        raise CheckpointError(f"{path} cannot be read any more: {error}. Open it again.") from error


def release_pages(tensors: Iterable[Tensor]) -> None:
    """Let go of the pages under tensors that share memory with a file; others stay as they are.

    What was written into such a tensor is lost: it then reads as the file does.
    """
    _advise(tensors, "MADV_DONTNEED")


def prefetch_pages(tensors: Iterable[Tensor]) -> None:
    """Ask the system to read what is under tensors that share memory with a file, without waiting for it."""
    _advise(tensors, "MADV_WILLNEED")


def _advise(tensors: Iterable[Tensor], advice: str) -> None:
    number = getattr(mmap, advice, None)
    if number is None:  # a system that takes no advice, such as Windows
        return
    maps = [(_address(mapped), mapped) for mapped in list(_maps.values())]
    for start, length, mapped in _page_ranges(tensors, maps):
        mapped.madvise(number, start, length)


def _page_ranges(tensors: Iterable[Tensor], maps: list[tuple[int, mmap.mmap]]) -> Iterator[tuple[int, int, mmap.mmap]]:
    """Start and length in whole pages, and the file, of each tensor that lies in one."""
    for tensor in tensors:
        if tensor.device.type != "cpu" or not tensor.numel():
            continue
        begin = tensor.data_ptr()
        for base, mapped in maps:
            if base <= begin < base + len(mapped):
                first = (begin - base) // mmap.PAGESIZE * mmap.PAGESIZE
                yield first, begin - base + tensor.numel() * tensor.element_size() - first, mapped


def _address(mapped: mmap.mmap) -> int:
    return torch.frombuffer(mapped, dtype=torch.uint8, count=1).data_ptr()


def _create_map(descriptor: int) -> mmap.mmap:
    if os.name != "posix":
        return mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)
    rights = mmap.PROT_READ | mmap.PROT_WRITE
    return mmap.mmap(descriptor, 0, flags=mmap.MAP_PRIVATE | _NO_RESERVE, prot=rights)
