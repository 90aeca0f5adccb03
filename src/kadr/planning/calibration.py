"""How fast this machine multiplies matrices: measured, once per process."""

from __future__ import annotations

import time
from functools import cache

import torch

ROWS, INNER, OUT_FEATURES = 512, 2048, 2048  # a layer of a middling request
MAX_SECONDS = 0.15  # seconds that measuring may take


@cache
def measure_matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    """FLOPs per second of a linear layer of usual size, the best of a few runs."""
    x = torch.ones(ROWS, INNER, dtype=dtype, device=device)
    weight = torch.ones(OUT_FEATURES, INNER, dtype=dtype, device=device)
    ended, best = time.perf_counter() + MAX_SECONDS, float("inf")
    while best == float("inf") or time.perf_counter() < ended:
        began = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * ROWS * INNER * OUT_FEATURES / best
