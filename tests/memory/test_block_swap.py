"""Blocks that come and go compute what they would compute if they stayed."""

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
    """Blocks that run one after the other."""

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


class Counted(BlockSwapper):
    """Tells which blocks were copied."""

    def _fill(self, index: int, busy: int | None = None) -> int:
        if index not in self._block_in_slot:
            self.copied = [*getattr(self, "copied", []), index]
        return super()._copy_to_slot(index, busy)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_a_carousel_computes_the_same_and_copies_each_block_once_a_turn(count: int) -> None:
    torch.manual_seed(0)
    stack, x = Stack(count), torch.randn(5, WIDTH)
    before = [tensor.clone() for tensor in module_tensors(stack)]
    right = stack(x)
    carousel = Counted(list(stack.blocks), CPU)
    for _ in range(3):
        assert torch.equal(stack(x), right)
    ahead = count if count <= 2 else 3 * count + 1  # the last turn has sent for the next one's first block
    assert carousel.copied == [index % count for index in range(ahead)]
    assert all(torch.equal(a, b) for a, b in zip(module_tensors(stack), before, strict=True))


def test_a_block_that_runs_twice_in_a_row_is_copied_once() -> None:
    stack, x = Stack(4), torch.randn(2, WIDTH)
    carousel = Counted(list(stack.blocks), CPU)
    for block in stack.blocks:
        block(block(x))
    assert carousel.copied == [0, 1, 2, 3, 0]


def test_blocks_that_stay_and_blocks_that_come_mix() -> None:
    torch.manual_seed(1)
    stack, x = Stack(6), torch.randn(2, WIDTH)
    right = stack(x)
    carousel = Counted([stack.blocks[1], stack.blocks[3], stack.blocks[5]], CPU)
    assert torch.equal(stack(x), right)
    assert torch.equal(stack(x), right)
    assert (
        max(len(place) for place in carousel.slots) < sum(w.nbytes for w in module_tensors(stack.blocks[0])) + 3 * 256
    )


def mapped_stack(folder: Path, count: int, width: int) -> tuple[Stack, int]:
    """Blocks whose weights lie in a file, and the bytes of one."""
    stack = Stack(0)
    save_file({f"{i}": torch.randn(width, width) / width**0.5 for i in range(count)}, folder / "w.safetensors")
    source = Source.open(folder / "w.safetensors")
    for i in range(count):
        block = nn.Linear(width, width, bias=False, device="meta").requires_grad_(False)
        block.load_state_dict({"weight": source.read(f"{i}")}, assign=True)
        stack.blocks.append(block)
    stack.forward = lambda x: [x := block(x) for block in stack.blocks][-1]  # type: ignore[method-assign]
    return stack, 4 * width * width


def resident() -> int:
    """Bytes of files that are in this process's memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssFile"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux what is in memory")
def test_streamed_pages_are_in_memory_one_block_at_a_time(tmp_path: Path) -> None:
    stack, size = mapped_stack(tmp_path, 8, 1024)
    x = torch.randn(2, 1024)
    begun = resident()
    right = stack(x)
    assert resident() - begun >= 7 * size
    memory_map.release_pages(module_tensors(stack))
    assert resident() - begun < size
    stream_mapped_blocks(list(stack.blocks), release=memory_map.release_pages, prefetch=memory_map.prefetch_pages)
    seen = []
    for block in stack.blocks:
        block.register_forward_pre_hook(lambda *_: seen.append(resident() - begun))
    assert torch.equal(stack(x), right)
    assert max(seen) < 2 * size
    assert resident() - begun < size


def test_only_pages_of_files_are_let_go_of(tmp_path: Path) -> None:
    stack, _ = mapped_stack(tmp_path, 1, 64)
    own = torch.arange(100_000.0)
    kept = own.clone()
    before = stack.blocks[0].weight.clone()
    memory_map.release_pages([own, stack.blocks[0].weight, torch.empty(0), torch.empty(2, device="meta")])
    assert torch.equal(own, kept)
    assert torch.equal(stack.blocks[0].weight, before)
