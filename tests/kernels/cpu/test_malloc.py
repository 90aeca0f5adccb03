"""What glibc is told about large blocks, seen in what a process holds."""

from __future__ import annotations

import subprocess
import sys

import pytest

from kadr.kernels.cpu import malloc

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="there is glibc's heap only on Linux")

# Prints how many MB more the process holds after each step than before it; 6 blocks of 8 MB come and go: 8 would be
# exactly what is kept, and a little else that is free beside them would have them given back.
PROGRAM = """
from pathlib import Path
import resource
import torch
from kadr.kernels.cpu.malloc import mmap_large_allocations, retain_freed_memory, tune_malloc

def held():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6

def blocks():
    return [torch.ones(1 << 21) for _ in range(6)]

assert tune_malloc()
blocks()
before = held()
blocks()
outside = held() - before
with retain_freed_memory():
    with mmap_large_allocations():
        blocks()
    stayed = held() - before
    blocks()
    inside = held() - before
    with retain_freed_memory():
        pass
    nested = held() - before
print(outside, stayed, inside, nested, held() - before)
"""


@linux
def test_blocks_wait_for_the_next_ones_only_while_a_model_runs() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    outside, stayed, inside, nested, after = map(float, done.stdout.split())
    assert max(outside, stayed, after) < 8
    assert min(inside, nested) > 40


def test_who_does_not_own_the_process_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(malloc, "_mallopt", lambda: lambda *option: told.append(option) or 1)
    monkeypatch.setattr(malloc._Process, "is_tuned", False)
    with malloc.retain_freed_memory(), malloc.mmap_large_allocations():
        pass
    assert not told
    monkeypatch.setattr(malloc._Process, "is_tuned", True)
    with malloc.retain_freed_memory():
        assert told[-2:] == [(-3, malloc.RUNNING_MMAP_THRESHOLD), (-1, malloc.RUNNING_TRIM_THRESHOLD)]
    assert told[-2:] == [(-3, malloc.MMAP_THRESHOLD), (-1, malloc.MMAP_THRESHOLD)]
