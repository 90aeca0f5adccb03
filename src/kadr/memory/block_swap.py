"""Block swapping: modules whose blocks are on the device only while they run.

Blocks wait on the host and are copied into one of two slots on the device, the next one while the present one runs. In
pinned memory they wait ready to be copied; from other memory the host first copies each into a pinned staging buffer.
(On a CPU, pages of mapped files are released and read again instead: `mapped_files.stream_blocks`.)
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor, nn

from kadr.cancellation import check_cancelled
from kadr.errors import KadrWarning
from kadr.kernels.error_kinds import is_out_of_memory
from kadr.memory.mapped_files import release_pages

_SLOT_ALIGNMENT = 256  # bytes; alignment of tensors within a slot, the best for CUDA kernels
PINNED_PIECE_BYTES = 1 << 30
NUM_SLOTS = 2  # on the device: one for the block that runs, one that is being filled


class BlockSwapper:
    """Streams the blocks of a module through two slots on a device.

    While a block runs, the weights of the next one are copied into the other slot, on a separate CUDA stream. Events
    order the two streams: a slot is filled only after the block that used it, and a block runs only when its slot is
    full.

    Args:
        blocks: in the order they run, on the CPU. The order is cyclic: the first follows the last.
        device: where blocks run. On "cpu" copies are synchronous, which is how tests check the order.
        pin_memory: move all blocks to pinned memory. What the system refuses to pin stays where it is, with a warning.
    """

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device, *, pin_memory: bool = False) -> None:
        self.device = device
        self.copy_stream = _CudaCopyStream(device) if device.type == "cuda" else _SyncCopyStream()
        self.host_weights = [_block_tensors(block) for block in blocks]
        if pin_memory and device.type == "cuda":
            self._pin(blocks)
        slot_bytes = max((_aligned_bytes(weights) for weights in self.host_weights), default=0)
        count = min(NUM_SLOTS, len(blocks))
        self.slots = [torch.empty(slot_bytes, dtype=torch.uint8, device=device) for _ in range(count)]
        for slot, buffer in enumerate(self.slots):
            self.copy_stream.add_slot(slot, buffer)
        self._block_in_slot: list[int | None] = [None] * count  # index of the block in each slot
        # The hooks get the block: one that the swapper kept would be in a reference cycle with it.
        for index, block in enumerate(blocks):
            block.register_forward_pre_hook(lambda block, *_, index=index: self._before_block(block, index))
            block.register_forward_hook(lambda block, *_, index=index: self._after_block(block, index))

    def _pin(self, blocks: Sequence[nn.Module]) -> None:
        """Moves the blocks to pinned memory, one after the other, as many as the system lets."""
        pool = PinnedPool(sum(map(_aligned_bytes, self.host_weights)))
        for index, block in enumerate(blocks):
            check_cancelled()
            try:
                pinned = [pool.add(tensor) for tensor in self.host_weights[index]]
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                message = (
                    f"only {index} of {len(blocks)} transformer blocks fit into pinned memory; the others are copied"
                )
                warnings.warn(f"{message} twice in each step, which is slower.", KadrWarning, stacklevel=4)
                return
            source, self.host_weights[index] = self.host_weights[index], pinned
            _set_block_tensors(block, pinned)
            release_pages(source)

    def _before_block(self, block: nn.Module, index: int) -> None:
        slot = self._copy_to_slot(index)
        self.copy_stream.wait_filled(slot)
        _set_block_tensors(block, list(self._slot_views(index, slot)))

    def _after_block(self, block: nn.Module, index: int) -> None:
        # The block's kernels are queued by now: the host is free to start the next copy.
        slot = self._block_in_slot.index(index)
        self.copy_stream.mark_used(slot)
        _set_block_tensors(block, self.host_weights[index])
        if len(self.slots) > 1:
            self._copy_to_slot((index + 1) % len(self.host_weights), busy_slot=slot)

    def _copy_to_slot(self, index: int, busy_slot: int | None = None) -> int:
        """Copies a block into a slot unless it is in one already, and returns the slot."""
        if index in self._block_in_slot:
            return self._block_in_slot.index(index)
        slot = next(number for number in range(len(self.slots)) if number != busy_slot)
        self._block_in_slot[slot] = index
        self.copy_stream.copy(self.host_weights[index], list(self._slot_views(index, slot)), slot)
        return slot

    def _slot_views(self, index: int, slot: int) -> Iterator[Tensor]:
        """Yields the tensors of a block as views into a slot."""
        return _views_into(self.slots[slot], self.host_weights[index])


def _block_tensors(block: nn.Module) -> list[Tensor]:
    return [tensor.data for tensor in chain(block.parameters(), block.buffers())]


def _set_block_tensors(block: nn.Module, tensors: Sequence[Tensor]) -> None:
    for parameter, tensor in zip(chain(block.parameters(), block.buffers()), tensors, strict=True):
        parameter.data = tensor


def _views_into(buffer: Tensor, tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yields views into a buffer of bytes, each with the shape and dtype of its tensor."""
    start = 0
    for tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        yield buffer[start : start + size].view(tensor.dtype).view(tensor.shape)
        start += _align(size)


def _align(size: int) -> int:
    return -(-size // _SLOT_ALIGNMENT) * _SLOT_ALIGNMENT


def _aligned_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(_align(tensor.numel() * tensor.element_size()) for tensor in tensors)


class PinnedPool:
    """Pinned memory for many tensors, in few pieces: torch rounds each piece up to a power of two.

    Args:
        size: bytes of all tensors, aligned.
    """

    def __init__(self, size: int) -> None:
        self._remaining, self._start = size, 0
        self._piece: Tensor | None = None

    def add(self, tensor: Tensor) -> Tensor:
        """Returns a copy of a tensor in pinned memory."""
        size = _align(tensor.numel() * tensor.element_size())
        if self._piece is None or self._start + size > len(self._piece):
            piece_size = max(size, min(PINNED_PIECE_BYTES, self._remaining))
            self._piece, self._start = torch.empty(piece_size, dtype=torch.uint8, pin_memory=True), 0
        (copy,) = _copy_into(self._piece[self._start : self._start + size], [tensor])
        self._start, self._remaining = self._start + size, self._remaining - size
        return copy


class _SyncCopyStream:
    """Synchronous copies."""

    def add_slot(self, slot: int, buffer: Tensor) -> None:
        """Does nothing: there is one order."""

    def copy(self, sources: Sequence[Tensor], targets: Sequence[Tensor], slot: int) -> None:
        for source, target in zip(sources, targets, strict=True):
            target.copy_(source)

    def wait_filled(self, slot: int) -> None:
        """Does nothing: copies are done."""

    def mark_used(self, slot: int) -> None:
        """Does nothing: copies are in order."""


class _CudaCopyStream:
    """Copies on a separate CUDA stream, from pinned memory."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.filled_events = [torch.cuda.Event() for _ in range(NUM_SLOTS)]
        self.used_events = [torch.cuda.Event() for _ in range(NUM_SLOTS)]
        self._staging_buffers: list[Tensor | None] = [None] * NUM_SLOTS

    def add_slot(self, slot: int, buffer: Tensor) -> None:
        """Orders copies into a new slot: after work that may still use its memory, and before it is given to others."""
        self.mark_used(slot)
        buffer.record_stream(self.stream)

    def copy(self, sources: Sequence[Tensor], targets: Sequence[Tensor], slot: int) -> None:
        staged = sources if all(source.is_pinned() for source in sources) else self._copy_to_staging(sources, slot)
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
        """Copies tensors into the pinned staging buffer of a slot."""
        self.filled_events[slot].synchronize()  # the copy out of the buffer is done
        buffer, size = self._staging_buffers[slot], _aligned_bytes(sources)
        if buffer is None or len(buffer) < size:
            buffer = self._staging_buffers[slot] = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        return _copy_into(buffer, sources)


def _copy_into(buffer: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies tensors into a buffer of bytes and returns the copies."""
    copies = list(_views_into(buffer, tensors))
    for copy, tensor in zip(copies, tensors, strict=True):
        copy.copy_(tensor)
    return copies
