"""Measures how fast this machine multiplies matrices, once per process: the estimate of a machine not calibrated."""

from __future__ import annotations

import time
from functools import cache

import torch

from kadr.planning.calibration.clock import Clock

_ROWS, _IN_FEATURES, _OUT_FEATURES = 512, 2048, 2048  # a linear layer of a request of medium size
_MAX_SECONDS = 0.15  # time limit of the measurement


@cache
def measure_matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Returns the FLOPs per second of a linear layer of usual size, from the fastest of a few runs."""
    x = torch.ones(_ROWS, _IN_FEATURES, dtype=dtype, device=device)
    weight = torch.ones(_OUT_FEATURES, _IN_FEATURES, dtype=dtype, device=device)
    clock, deadline, fastest = Clock(device), time.perf_counter() + _MAX_SECONDS, float("inf")
    while fastest == float("inf") or time.perf_counter() < deadline:
        fastest = min(fastest, clock.once(lambda: torch.nn.functional.linear(x, weight)))
    return 2 * _ROWS * _IN_FEATURES * _OUT_FEATURES / fastest
