"""malloc options, tested by the resident memory of a process."""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from kadr.kernels.cpu import malloc

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc is on Linux only")

# Prints by how many MB resident memory has grown after each step, which allocates and frees 6 blocks of 8 MB. 8 blocks
# would be exactly the trim threshold: a little more free memory beside them, and they would be returned.
PROGRAM = """
from pathlib import Path
import resource
import torch
from kadr.kernels.cpu.malloc import mmap_large_allocations, retain_freed_memory, tune_malloc

def resident_mb():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6

def blocks():
    return [torch.ones(1 << 21) for _ in range(6)]

assert tune_malloc()
blocks()
before = resident_mb()
blocks()
outside = resident_mb() - before
with retain_freed_memory():
    with mmap_large_allocations():
        blocks()
    after_mmap = resident_mb() - before
    blocks()
    inside = resident_mb() - before
    with retain_freed_memory():
        pass
    nested = resident_mb() - before
print(outside, after_mmap, inside, nested, resident_mb() - before)
"""


def test_thresholds_follow_the_blocks_of_all_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[int, int] = {}
    monkeypatch.setattr(malloc, "_mallopt", lambda: lambda option, value: options.update({option: value}) or 1)
    monkeypatch.setattr(malloc._Process, "is_tuned", True)
    first, second = threading.Event(), threading.Event()

    def allocate_while_others_come_and_go() -> None:
        with malloc.retain_freed_memory(), malloc.mmap_large_allocations():
            first.set()
            assert second.wait(10)

    with ThreadPoolExecutor(1) as threads:
        other = threads.submit(allocate_while_others_come_and_go)
        assert first.wait(10)
        with malloc.retain_freed_memory():
            assert options[-3] == malloc.MMAP_THRESHOLD  # the other thread still allocates what stays
            with malloc.mmap_large_allocations():
                pass
            assert options[-3] == malloc.MMAP_THRESHOLD
            second.set()
            other.result()
            assert options[-3] == malloc.RUNNING_MMAP_THRESHOLD
    assert options[-3] == malloc.MMAP_THRESHOLD


@linux
def test_freed_blocks_are_kept_only_while_a_model_runs() -> None:
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    outside, after_mmap, inside, nested, after = map(float, result.stdout.split())
    assert max(outside, after_mmap, after) < 8
    assert min(inside, nested) > 40


def test_without_tune_malloc_no_option_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    options: list[tuple[int, int]] = []
    monkeypatch.setattr(malloc, "_mallopt", lambda: lambda *option: options.append(option) or 1)
    monkeypatch.setattr(malloc._Process, "is_tuned", False)
    with malloc.retain_freed_memory(), malloc.mmap_large_allocations():
        pass
    assert not options
    monkeypatch.setattr(malloc._Process, "is_tuned", True)
    with malloc.retain_freed_memory():
        assert options[-2:] == [(-3, malloc.RUNNING_MMAP_THRESHOLD), (-1, malloc.RUNNING_TRIM_THRESHOLD)]
    assert options[-2:] == [(-3, malloc.MMAP_THRESHOLD), (-1, malloc.MMAP_THRESHOLD)]
