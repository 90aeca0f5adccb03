"""Limits how far the host runs ahead of a GPU, so that cancelled work leaves no long queue of kernels behind.

Kernels are queued: without a limit, the host is up to a thousand of them ahead, fifty transformer blocks, and a process
that stops looks at its token but then waits for all of them. Small layers need the queue and are not limited.
"""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from kadr.cancellation import check_cancelled, current_token

MAX_LAYERS_AHEAD = 2
# Input of a layer; one of this size takes a GPU several milliseconds, many times what it takes to queue it.
MIN_LIMITED_NUMEL = 16384 * 2048


def limit_run_ahead(x: Tensor) -> None:
    """Waits until the GPU is at most two layers behind, if work that can be cancelled runs a large layer on it.

    Args:
        x: input of the next layer. Nothing is waited for on another device, or during a CUDA graph capture.

    Raises:
        Cancelled: the work was cancelled meanwhile.
    """
    token = current_token()
    if token is None or not x.is_cuda or x.numel() < MIN_LIMITED_NUMEL or torch.cuda.is_current_stream_capturing():
        return
    queued: deque[torch.cuda.Event] = token.queued_layers
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(x.device))
    queued.append(event)
    while len(queued) > MAX_LAYERS_AHEAD:
        queued.popleft().synchronize()
    check_cancelled()
