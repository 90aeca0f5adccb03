"""Memory-mapped files, shared by all their readers, whose pages can be released and prefetched.

A mapped page takes memory from its first access on. It can be released at any time, because the file still has it: the
next access reads it again, usually from the page cache.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from kadr.errors import CheckpointError

# Without it Linux would reserve memory for pages that are never written, and refuse files larger than the memory.
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)  # Python names it from 3.13 on

SAMPLED_RANGES, SAMPLED_PAGES = 64, 16  # of a file, and of a range; see `cached_fraction`

# Shared by all sources of a file; an entry dies with the file's last tensor. Inode and mtime in the key distinguish a
# file from one that replaced it.
_maps: WeakValueDictionary[tuple[Path, int, int], mmap.mmap] = WeakValueDictionary()
_maps_lock = threading.Lock()


def map_file(path: Path) -> mmap.mmap:
    """Maps a file into memory: private, so writing to it is safe; the map lives as long as a tensor uses it.

    Raises:
        CheckpointError: the file can no longer be read.
    """
    try:
        with path.open("rb") as file:
            stat = os.fstat(file.fileno())
            key = (path, stat.st_ino, stat.st_mtime_ns)
            with _maps_lock:
                mapped = _maps.get(key)
                if mapped is None:
                    mapped = _maps[key] = _create_map(file.fileno())
                return mapped
    except (OSError, ValueError) as error:  # ValueError: the file is empty by now
        raise CheckpointError(f"{path} can no longer be read: {error}. Open it again.") from error


def release_pages(tensors: Iterable[Tensor]) -> None:
    """Releases the pages of tensors that share memory with a file; other tensors stay as they are.

    Values written into such a tensor are lost: it reads as the file again.
    """
    _advise(tensors, "MADV_DONTNEED")


def prefetch_pages(tensors: Iterable[Tensor]) -> None:
    """Asks the system to read the pages of tensors that share memory with a file, without waiting for them."""
    _advise(tensors, "MADV_WILLNEED")


def module_tensors(module: nn.Module) -> list[Tensor]:
    """Returns the parameters and buffers of a module, each once."""
    return [tensor.detach() for tensor in chain(module.parameters(), module.buffers())]


def stream_blocks(blocks: Sequence[nn.Module]) -> None:
    """Streams the blocks of a module on the CPU: their pages are in memory only while they run.

    Results are bit-identical: only when pages are in memory changes.

    Args:
        blocks: in the order they run; their weights lie in mapped files.
    """
    next_blocks = [*blocks[1:], *blocks[:1]]  # the last block of a step is followed by the first of the next step
    for block, next_block in zip(blocks, next_blocks, strict=True):
        block.register_forward_pre_hook(partial(_ignore_call, prefetch_pages, module_tensors(next_block)))
        block.register_forward_hook(partial(_ignore_call, release_pages, module_tensors(block)))


def _ignore_call(advise: Callable[[Iterable[Tensor]], None], tensors: list[Tensor], *_: object) -> None:
    """Advises about the pages of tensors, as a hook of a module: ignores the arguments of the module's call."""
    advise(tensors)


def _advise(tensors: Iterable[Tensor], advice: str) -> None:
    option = getattr(mmap, advice, None)
    if option is None:  # a system without madvise, such as Windows
        return
    with _maps_lock:
        present = list(_maps.values())
    maps = [(_address(mapped), mapped) for mapped in present]
    for start, length, mapped in _page_ranges(tensors, maps):
        mapped.madvise(option, start, length)


def _page_ranges(tensors: Iterable[Tensor], maps: list[tuple[int, mmap.mmap]]) -> Iterator[tuple[int, int, mmap.mmap]]:
    """Yields page-aligned start, length and map of each tensor that lies in one."""
    for tensor in tensors:
        if tensor.device.type != "cpu" or not tensor.numel():
            continue
        address = tensor.data_ptr()
        for base, mapped in maps:
            if base <= address < base + len(mapped):
                start = (address - base) // mmap.PAGESIZE * mmap.PAGESIZE
                yield start, address - base + tensor.numel() * tensor.element_size() - start, mapped


def _address(mapped: mmap.mmap) -> int:
    return torch.frombuffer(mapped, dtype=torch.uint8, count=1).data_ptr()


def _create_map(descriptor: int) -> mmap.mmap:
    if sys.platform == "win32":
        return mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)
    protection = mmap.PROT_READ | mmap.PROT_WRITE
    return mmap.mmap(descriptor, 0, flags=mmap.MAP_PRIVATE | _NO_RESERVE, prot=protection)


def cached_fraction(path: Path) -> float:
    """Returns about how much of a file the system has in its page cache, from 0 to 1; 1 where it does not tell.

    Looks at `SAMPLED_RANGES` ranges of the file, spread evenly, and reads nothing.
    """
    mincore = getattr(ctypes.CDLL(None), "mincore", None) if sys.platform == "linux" else None
    try:
        mapped = map_file(path)
    except CheckpointError:
        return 1.0
    pages = len(mapped) // mmap.PAGESIZE
    if mincore is None or not pages:
        return 1.0
    count, address, present, looked_at = min(SAMPLED_PAGES, pages), _address(mapped), 0, 0
    states = (ctypes.c_ubyte * count)()
    for index in range(SAMPLED_RANGES):
        first = (pages - count) * index // max(1, SAMPLED_RANGES - 1)
        start = ctypes.c_void_p(address + first * mmap.PAGESIZE)
        if mincore(start, ctypes.c_size_t(count * mmap.PAGESIZE), states):
            return 1.0
        present, looked_at = present + sum(state & 1 for state in states), looked_at + count
    return present / looked_at
