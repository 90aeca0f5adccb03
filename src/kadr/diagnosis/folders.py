"""Folders that kadr keeps files in: their sizes, and the free space of their disks."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kadr.cache_home import cache_home
from kadr.checkpoints import hub

KADR_CACHE, HUB_CACHE = "kadr cache", "hub cache"
MAX_COUNTED_FILES = 200_000  # of a folder that are counted


@dataclass(frozen=True)
class CacheFolder:
    """A folder of caches.

    Args:
        name: "kadr cache" or "hub cache", the latter huggingface_hub's.
        path: it need not exist.
        size_bytes: of its files.
        free_bytes: of its disk.
    """

    name: str
    path: str
    size_bytes: int
    free_bytes: int


def read_folders() -> tuple[CacheFolder, ...]:
    """Returns kadr's cache folder and that of the hub, as far as this user has them."""
    try:
        kadr_cache = [(KADR_CACHE, cache_home())]
    except RuntimeError:  # no home directory
        kadr_cache = []
    folders = (*kadr_cache, (HUB_CACHE, hub.cache_folder()))
    return tuple(CacheFolder(name, str(path), sum(_file_sizes(path)), free_disk_bytes(path)) for name, path in folders)


def free_disk_bytes(path: Path) -> int:
    """Returns the free bytes of the disk that a path is on, or would be on; 0 where the system does not tell."""
    try:
        return shutil.disk_usage(next(folder for folder in (path, *path.absolute().parents) if folder.exists())).free
    except (OSError, StopIteration):
        return 0


def _file_sizes(folder: Path) -> Iterator[int]:
    """Yields the bytes of each file; a link counts nothing, and neither does what cannot be read."""
    count = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                status = os.lstat(os.path.join(root, name))
            except OSError:
                continue
            count += 1
            if count > MAX_COUNTED_FILES:
                return
            yield status.st_size
