"""Mapped files are shared by all threads of the process, and their pages are in memory only while they are needed."""

from __future__ import annotations

import mmap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from kadr.checkpoints.source import Source
from kadr.memory import mapped_files


def test_threads_that_map_a_file_at_once_share_one_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of a second map would never be released: only one of them is known."""
    file, create, barrier = tmp_path / "weights", mapped_files._create_map, threading.Barrier(4)
    file.write_bytes(bytes(4096))

    def create_slowly(descriptor: int) -> mmap.mmap:
        time.sleep(0.02)
        return create(descriptor)

    monkeypatch.setattr(mapped_files, "_create_map", create_slowly)

    def map_at_once(_: int) -> mmap.mmap:
        barrier.wait()
        return mapped_files.map_file(file)

    with ThreadPoolExecutor(4) as threads:
        maps = list(threads.map(map_at_once, range(4)))
    assert all(each is maps[0] for each in maps)


def mapped_stack(folder: Path, count: int, width: int) -> tuple[nn.Sequential, int]:
    """Returns blocks whose weights are mapped from a file, and the bytes of one block."""
    stack = nn.Sequential()
    save_file({f"{i}": torch.randn(width, width) / width**0.5 for i in range(count)}, folder / "w.safetensors")
    source = Source.open(folder / "w.safetensors")
    for i in range(count):
        block = nn.Linear(width, width, bias=False, device="meta").requires_grad_(False)
        block.load_state_dict({"weight": source.read(f"{i}")}, assign=True)
        stack.append(block)
    return stack, 4 * width * width


def resident_file_bytes() -> int:
    """Bytes of mapped files that are in this process's memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssFile"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of resident pages")
def test_streamed_pages_are_in_memory_one_block_at_a_time(tmp_path: Path) -> None:
    stack, block_bytes = mapped_stack(tmp_path, 8, 1024)
    x = torch.randn(2, 1024)
    start = resident_file_bytes()
    expected = stack(x)
    assert resident_file_bytes() - start >= 7 * block_bytes
    mapped_files.release_pages(mapped_files.module_tensors(stack))
    assert resident_file_bytes() - start < block_bytes
    mapped_files.stream_blocks(list(stack))
    samples = []
    for block in stack:
        block.register_forward_pre_hook(lambda *_: samples.append(resident_file_bytes() - start))
    assert torch.equal(stack(x), expected)
    assert max(samples) < 2 * block_bytes
    assert resident_file_bytes() - start < block_bytes


def test_release_pages_affects_only_mapped_files(tmp_path: Path) -> None:
    stack, _ = mapped_stack(tmp_path, 1, 64)
    private = torch.arange(100_000.0)
    private_before, mapped_before = private.clone(), stack[0].weight.clone()
    mapped_files.release_pages([private, stack[0].weight, torch.empty(0), torch.empty(2, device="meta")])
    assert torch.equal(private, private_before)
    assert torch.equal(stack[0].weight, mapped_before)
