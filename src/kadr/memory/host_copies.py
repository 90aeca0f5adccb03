"""Copies from a GPU to the host that run beside its work: the host waits for a copy, not for the work behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor


def start_copy(tensor: Tensor) -> Callable[[], Tensor]:
    """Starts the copy of a tensor from a GPU; the function returned waits for it and returns it."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(tensor.device))

    def finish_copy() -> Tensor:
        copied.synchronize()
        return host

    return finish_copy


def copy_to_host(chunks: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yields chunks of frames on the CPU.

    From a GPU, a chunk is yielded when the next one is queued there: it is copied while that one is computed.
    """
    finish_copy: Callable[[], Tensor] | None = None
    for chunk in chunks:
        if not chunk.is_cuda:
            yield chunk.cpu()
            continue
        finish_previous, finish_copy = finish_copy, start_copy(chunk)
        if finish_previous is not None:
            yield finish_previous()
    if finish_copy is not None:
        yield finish_copy()
