"""Streamed blocks compute bit for bit what resident blocks compute."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from kadr.checkpoints import memory_map
from kadr.checkpoints.source import Source
from kadr.memory.block_swap import BlockSwapper, module_tensors, stream_mapped_blocks

CPU = torch.device("cpu")
WIDTH = 24


class Stack(nn.Module):
    """A module of blocks that run one after the other."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(count))
        for block in self.blocks:
            block.register_buffer("offset", torch.rand(3, dtype=torch.float64).to(torch.float16))
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x)) + block.offset.float().sum()
        return x


class CountingSwapper(BlockSwapper):
    """A block swapper that lists which blocks were copied."""

    def _copy_to_slot(self, index: int, busy_slot: int | None = None) -> int:
        if index not in self._block_in_slot:
            self.copied = [*getattr(self, "copied", []), index]
        return super()._copy_to_slot(index, busy_slot)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_block_swapper_is_exact_and_copies_each_block_once_per_step(count: int) -> None:
    torch.manual_seed(0)
    stack, x = Stack(count), torch.randn(5, WIDTH)
    before = [tensor.clone() for tensor in module_tensors(stack)]
    expected = stack(x)
    swapper = CountingSwapper(list(stack.blocks), CPU)
    for _ in range(3):
        assert torch.equal(stack(x), expected)
    num_copies = count if count <= 2 else 3 * count + 1  # the last step has copied the first block of the next step
    assert swapper.copied == [index % count for index in range(num_copies)]
    assert all(torch.equal(a, b) for a, b in zip(module_tensors(stack), before, strict=True))


def test_block_that_runs_twice_in_a_row_is_copied_once() -> None:
    stack, x = Stack(4), torch.randn(2, WIDTH)
    swapper = CountingSwapper(list(stack.blocks), CPU)
    for block in stack.blocks:
        block(block(x))
    assert swapper.copied == [0, 1, 2, 3, 0]


def test_resident_and_streamed_blocks_mix() -> None:
    torch.manual_seed(1)
    stack, x = Stack(6), torch.randn(2, WIDTH)
    expected = stack(x)
    swapper = CountingSwapper([stack.blocks[1], stack.blocks[3], stack.blocks[5]], CPU)
    assert torch.equal(stack(x), expected)
    assert torch.equal(stack(x), expected)
    block_bytes = sum(tensor.nbytes for tensor in module_tensors(stack.blocks[0]))
    assert max(len(slot) for slot in swapper.slots) < block_bytes + 3 * 256


def mapped_stack(folder: Path, count: int, width: int) -> tuple[Stack, int]:
    """Returns blocks whose weights are mapped from a file, and the bytes of one block."""
    stack = Stack(0)
    save_file({f"{i}": torch.randn(width, width) / width**0.5 for i in range(count)}, folder / "w.safetensors")
    source = Source.open(folder / "w.safetensors")
    for i in range(count):
        block = nn.Linear(width, width, bias=False, device="meta").requires_grad_(False)
        block.load_state_dict({"weight": source.read(f"{i}")}, assign=True)
        stack.blocks.append(block)
    stack.forward = lambda x: [x := block(x) for block in stack.blocks][-1]  # type: ignore[method-assign]
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
    memory_map.release_pages(module_tensors(stack))
    assert resident_file_bytes() - start < block_bytes
    stream_mapped_blocks(list(stack.blocks), release=memory_map.release_pages, prefetch=memory_map.prefetch_pages)
    samples = []
    for block in stack.blocks:
        block.register_forward_pre_hook(lambda *_: samples.append(resident_file_bytes() - start))
    assert torch.equal(stack(x), expected)
    assert max(samples) < 2 * block_bytes
    assert resident_file_bytes() - start < block_bytes


def test_release_pages_affects_only_mapped_files(tmp_path: Path) -> None:
    stack, _ = mapped_stack(tmp_path, 1, 64)
    private = torch.arange(100_000.0)
    private_before, mapped_before = private.clone(), stack.blocks[0].weight.clone()
    memory_map.release_pages([private, stack.blocks[0].weight, torch.empty(0), torch.empty(2, device="meta")])
    assert torch.equal(private, private_before)
    assert torch.equal(stack.blocks[0].weight, mapped_before)
