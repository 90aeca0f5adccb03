"""Mapped files are shared by all threads of the process."""

from __future__ import annotations

import mmap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kadr.checkpoints import memory_map


def test_threads_that_map_a_file_at_once_share_one_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of a second map would never be released: only one of them is known."""
    file, create, barrier = tmp_path / "weights", memory_map._create_map, threading.Barrier(4)
    file.write_bytes(bytes(4096))

    def create_slowly(descriptor: int) -> mmap.mmap:
        time.sleep(0.02)
        return create(descriptor)

    monkeypatch.setattr(memory_map, "_create_map", create_slowly)

    def map_at_once(_: int) -> mmap.mmap:
        barrier.wait()
        return memory_map.map_file(file)

    with ThreadPoolExecutor(4) as threads:
        maps = list(threads.map(map_at_once, range(4)))
    assert all(each is maps[0] for each in maps)
