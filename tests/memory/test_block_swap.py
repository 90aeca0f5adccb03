"""Swapped blocks compute bit for bit what resident blocks compute."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn

from kadr.memory.block_swap import BlockSwapper
from kadr.memory.mapped_files import module_tensors

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


@pytest.mark.usefixtures("no_garbage_collection")
def test_module_with_swapped_blocks_is_freed_with_its_last_reference() -> None:
    stack = Stack(3)
    CountingSwapper(list(stack.blocks), CPU)
    stack(torch.randn(2, WIDTH))
    references = [weakref.ref(stack), *map(weakref.ref, stack.blocks)]
    del stack
    assert [reference() for reference in references] == [None] * 4
