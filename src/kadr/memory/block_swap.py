"""Modules whose blocks are not all in memory at once.

On a CPU, weights lie in mapped files: a block is touched when it runs, and let go of after it. On a GPU, blocks wait on
the host and are copied into one of two places on the device, the next one while the present one runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor, nn

PageAdvice = Callable[[Iterable[Tensor]], None]
_SLOT_ALIGNMENT = 256  # bytes, of a tensor within a place on the device: what CUDA's kernels like best
NUM_SLOTS = 2  # on the device: one that is computed with, one that is filled


def module_tensors(module: nn.Module) -> list[Tensor]:
    """The tensors of a module, each once."""
    return [tensor.detach() for tensor in chain(module.parameters(), module.buffers())]


def stream_mapped_blocks(blocks: Sequence[nn.Module], *, release: PageAdvice, prefetch: PageAdvice) -> None:
    """Let the blocks of a module on the CPU take memory only while they run.

    The same numbers come out: only when pages are in memory changes.

    Args:
        blocks: in the order they run; their weights lie in mapped files.
        release: lets go of the pages under tensors.
        prefetch: has the system read the pages under tensors.
    """
    following = [*blocks[1:], *blocks[:1]]  # after the last block of a step comes the first of the next
    for block, after in zip(blocks, following, strict=True):
        own, coming = module_tensors(block), module_tensors(after)

        def begun(*_: object, coming: list[Tensor] = coming) -> None:
            prefetch(coming)

        def done(*_: object, own: list[Tensor] = own) -> None:
            release(own)

        block.register_forward_pre_hook(begun)
        block.register_forward_hook(done)


class BlockSwapper:
    """Two places on a device that the blocks of a module pass through.

    While a block runs, the weights of the next one are copied into the other place, on a stream of their own. Events
    order the two streams: a place is filled only when the block that used it is done, and a block runs only when its
    place is full.

    Args:
        blocks: in the order they run, on the CPU. They come round: after the last, the first.
        device: on "cpu" copies are done when they return; that is how the order is tested.
        pin_memory: keep all of them in pinned memory, from which they are sent without the host's help; else each goes
            through a pinned buffer.
    """

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device, *, pin_memory: bool = False) -> None:
        self.blocks, self.device = list(blocks), device
        self.copy_stream = (
            _CudaCopyStream(device, pin_memory=pin_memory) if device.type == "cuda" else _SyncCopyStream()
        )
        self.host_weights = [self.copy_stream.to_host(_block_tensors(block)) for block in self.blocks]
        size = max((_aligned_bytes(home) for home in self.host_weights), default=0)
        count = min(NUM_SLOTS, len(self.blocks))
        self.slots = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(count)]
        self._block_in_slot: list[int | None] = [None] * count  # which block lies in a place
        for index, block in enumerate(self.blocks):
            block.register_forward_pre_hook(lambda *_, index=index: self._before_block(index))
            block.register_forward_hook(lambda *_, index=index: self._after_block(index))

    def _before_block(self, index: int) -> None:
        place = self._copy_to_slot(index)
        self.copy_stream.wait_filled(place)
        _set_block_tensors(self.blocks[index], list(self._slot_views(index, place)))

    def _after_block(self, index: int) -> None:
        # The block's work is queued by now: the host is free to send the next one.
        place = self._block_in_slot.index(index)
        self.copy_stream.mark_used(place)
        _set_block_tensors(self.blocks[index], self.host_weights[index])
        if len(self.slots) > 1:
            self._copy_to_slot((index + 1) % len(self.blocks), busy_slot=place)

    def _copy_to_slot(self, index: int, busy_slot: int | None = None) -> int:
        """The place that a block lies in; it is copied there unless it is there already."""
        if index in self._block_in_slot:
            return self._block_in_slot.index(index)
        place = next(number for number in range(len(self.slots)) if number != busy_slot)
        self._block_in_slot[place] = index
        self.copy_stream.copy(self.host_weights[index], list(self._slot_views(index, place)), place)
        return place

    def _slot_views(self, index: int, slot: int) -> Iterator[Tensor]:
        """The tensors of a block as they lie in a place."""
        return _views_into(self.slots[slot], self.host_weights[index])


def _block_tensors(block: nn.Module) -> list[Tensor]:
    return [tensor.data for tensor in chain(block.parameters(), block.buffers())]


def _set_block_tensors(block: nn.Module, tensors: Sequence[Tensor]) -> None:
    for own, tensor in zip(chain(block.parameters(), block.buffers()), tensors, strict=True):
        own.data = tensor


def _views_into(buffer: Tensor, tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """Pieces of a buffer of bytes, each as large, shaped and typed as the tensor it is for."""
    start = 0
    for tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        yield buffer[start : start + size].view(tensor.dtype).view(tensor.shape)
        start += _align(size)


def _align(size: int) -> int:
    return -(-size // _SLOT_ALIGNMENT) * _SLOT_ALIGNMENT


def _aligned_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(_align(tensor.numel() * tensor.element_size()) for tensor in tensors)


class _SyncCopyStream:
    """Copies that are done when they return."""

    def to_host(self, tensors: list[Tensor]) -> list[Tensor]:
        return tensors

    def copy(self, sources: Sequence[Tensor], targets: Sequence[Tensor], slot: int) -> None:
        for source, target in zip(sources, targets, strict=True):
            target.copy_(source)

    def wait_filled(self, slot: int) -> None:
        """Nothing to wait for."""

    def mark_used(self, slot: int) -> None:
        """Nothing to mark."""


class _CudaCopyStream:
    """Copies on a stream of their own, from pinned memory."""

    def __init__(self, device: torch.device, *, pin_memory: bool) -> None:
        self.device, self.pin_memory = device, pin_memory
        self.stream = torch.cuda.Stream(device)
        self.filled_events = [torch.cuda.Event() for _ in range(NUM_SLOTS)]
        self.used_events = [torch.cuda.Event() for _ in range(NUM_SLOTS)]
        self._staging_buffers: list[Tensor | None] = [None] * NUM_SLOTS

    def to_host(self, tensors: list[Tensor]) -> list[Tensor]:
        if not self.pin_memory:
            return tensors
        return _copy_into(torch.empty(_aligned_bytes(tensors), dtype=torch.uint8, pin_memory=True), tensors)

    def copy(self, sources: Sequence[Tensor], targets: Sequence[Tensor], slot: int) -> None:
        staged = sources if self.pin_memory else self._copy_to_staging(sources, slot)
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(self.used_events[slot])
            for source, target in zip(staged, targets, strict=True):
                target.copy_(source, non_blocking=True)
            self.filled_events[slot].record(self.stream)

    def wait_filled(self, slot: int) -> None:
        torch.cuda.current_stream(self.device).wait_event(self.filled_events[slot])

    def mark_used(self, slot: int) -> None:
        self.used_events[slot].record(torch.cuda.current_stream(self.device))

    def _copy_to_staging(self, sources: Sequence[Tensor], slot: int) -> list[Tensor]:
        """The tensors in the pinned buffer of a place."""
        self.filled_events[slot].synchronize()  # what was in the buffer is sent
        buffer, size = self._staging_buffers[slot], _aligned_bytes(sources)
        if buffer is None or len(buffer) < size:
            buffer = self._staging_buffers[slot] = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        return _copy_into(buffer, sources)


def _copy_into(buffer: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies of tensors in a buffer of bytes."""
    made = list(_views_into(buffer, tensors))
    for copy, tensor in zip(made, tensors, strict=True):
        copy.copy_(tensor)
    return made
