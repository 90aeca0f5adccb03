"""Modules whose blocks are not all in memory at once.

On a CPU, weights lie in mapped files: a block is touched when it runs, and let go of after it. On a GPU, blocks wait on
the host and are copied into one of two places on the device, the next one while the present one runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor, nn

Pages = Callable[[Iterable[Tensor]], None]
_ALIGNMENT = 256  # bytes, of a tensor within a place on the device: what CUDA's kernels like best
PLACES = 2  # on the device: one that is computed with, one that is filled


def weights(module: nn.Module) -> list[Tensor]:
    """The tensors of a module, each once."""
    return [tensor.detach() for tensor in chain(module.parameters(), module.buffers())]


def stream_pages(blocks: Sequence[nn.Module], *, release: Pages, prefetch: Pages) -> None:
    """Let the blocks of a module on the CPU take memory only while they run.

    The same numbers come out: only when pages are in memory changes.

    Args:
        blocks: in the order they run; their weights lie in mapped files.
        release: lets go of the pages under tensors.
        prefetch: has the system read the pages under tensors.
    """
    following = [*blocks[1:], *blocks[:1]]  # after the last block of a step comes the first of the next
    for block, after in zip(blocks, following, strict=True):
        own, coming = weights(block), weights(after)

        def begun(*_: object, coming: list[Tensor] = coming) -> None:
            prefetch(coming)

        def done(*_: object, own: list[Tensor] = own) -> None:
            release(own)

        block.register_forward_pre_hook(begun)
        block.register_forward_hook(done)


class Carousel:
    """Two places on a device that the blocks of a module pass through.

    While a block runs, the weights of the next one are copied into the other place, on a stream of their own. Events
    order the two streams: a place is filled only when the block that used it is done, and a block runs only when its
    place is full.

    Args:
        blocks: in the order they run, on the CPU. They come round: after the last, the first.
        device: on "cpu" copies are done when they return; that is how the order is tested.
        pinned: keep all of them in pinned memory, from which they are sent without the host's help; else each goes
            through a pinned buffer.
    """

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device, *, pinned: bool = False) -> None:
        self.blocks, self.device = list(blocks), device
        self.lane = _CudaLane(device, pinned=pinned) if device.type == "cuda" else _PlainLane()
        self.homes = [self.lane.home(_own(block)) for block in self.blocks]
        size = max((_packed_bytes(home) for home in self.homes), default=0)
        count = min(PLACES, len(self.blocks))
        self.places = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(count)]
        self._holds: list[int | None] = [None] * count  # which block lies in a place
        for index, block in enumerate(self.blocks):
            block.register_forward_pre_hook(lambda *_, index=index: self._begin(index))
            block.register_forward_hook(lambda *_, index=index: self._end(index))

    def _begin(self, index: int) -> None:
        place = self._fill(index)
        self.lane.wait_filled(place)
        _point(self.blocks[index], list(self._views(index, place)))

    def _end(self, index: int) -> None:
        # The block's work is queued by now: the host is free to send the next one.
        place = self._holds.index(index)
        self.lane.mark_used(place)
        _point(self.blocks[index], self.homes[index])
        if len(self.places) > 1:
            self._fill((index + 1) % len(self.blocks), busy=place)

    def _fill(self, index: int, busy: int | None = None) -> int:
        """The place that a block lies in; it is copied there unless it is there already."""
        if index in self._holds:
            return self._holds.index(index)
        place = next(number for number in range(len(self.places)) if number != busy)
        self._holds[place] = index
        self.lane.copy(self.homes[index], list(self._views(index, place)), place)
        return place

    def _views(self, index: int, place: int) -> Iterator[Tensor]:
        """The tensors of a block as they lie in a place."""
        return _cut(self.places[place], self.homes[index])


def _own(block: nn.Module) -> list[Tensor]:
    return [tensor.data for tensor in chain(block.parameters(), block.buffers())]


def _point(block: nn.Module, tensors: Sequence[Tensor]) -> None:
    for own, tensor in zip(chain(block.parameters(), block.buffers()), tensors, strict=True):
        own.data = tensor


def _cut(buffer: Tensor, tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """Pieces of a buffer of bytes, each as large, shaped and typed as the tensor it is for."""
    start = 0
    for tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        yield buffer[start : start + size].view(tensor.dtype).view(tensor.shape)
        start += _aligned(size)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _packed_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(_aligned(tensor.numel() * tensor.element_size()) for tensor in tensors)


class _PlainLane:
    """Copies that are done when they return."""

    def home(self, tensors: list[Tensor]) -> list[Tensor]:
        return tensors

    def copy(self, sources: Sequence[Tensor], targets: Sequence[Tensor], place: int) -> None:
        for source, target in zip(sources, targets, strict=True):
            target.copy_(source)

    def wait_filled(self, place: int) -> None:
        """Nothing to wait for."""

    def mark_used(self, place: int) -> None:
        """Nothing to mark."""


class _CudaLane:
    """Copies on a stream of their own, from pinned memory."""

    def __init__(self, device: torch.device, *, pinned: bool) -> None:
        self.device, self.pinned = device, pinned
        self.stream = torch.cuda.Stream(device)
        self.filled = [torch.cuda.Event() for _ in range(PLACES)]
        self.used = [torch.cuda.Event() for _ in range(PLACES)]
        self._buffers: list[Tensor | None] = [None] * PLACES

    def home(self, tensors: list[Tensor]) -> list[Tensor]:
        if not self.pinned:
            return tensors
        return _sent_from(torch.empty(_packed_bytes(tensors), dtype=torch.uint8, pin_memory=True), tensors)

    def copy(self, sources: Sequence[Tensor], targets: Sequence[Tensor], place: int) -> None:
        staged = sources if self.pinned else self._staged(sources, place)
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(self.used[place])
            for source, target in zip(staged, targets, strict=True):
                target.copy_(source, non_blocking=True)
            self.filled[place].record(self.stream)

    def wait_filled(self, place: int) -> None:
        torch.cuda.current_stream(self.device).wait_event(self.filled[place])

    def mark_used(self, place: int) -> None:
        self.used[place].record(torch.cuda.current_stream(self.device))

    def _staged(self, sources: Sequence[Tensor], place: int) -> list[Tensor]:
        """The tensors in the pinned buffer of a place."""
        self.filled[place].synchronize()  # what was in the buffer is sent
        buffer, size = self._buffers[place], _packed_bytes(sources)
        if buffer is None or len(buffer) < size:
            buffer = self._buffers[place] = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        return _sent_from(buffer, sources)


def _sent_from(buffer: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies of tensors in a buffer of bytes."""
    made = list(_cut(buffer, tensors))
    for copy, tensor in zip(made, tensors, strict=True):
        copy.copy_(tensor)
    return made
