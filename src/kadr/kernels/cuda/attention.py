"""The implementations of attention that torch has for CUDA devices, and how long a call takes there."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import (
    SDPAParams,
    can_use_cudnn_attention,
    can_use_efficient_attention,
    can_use_flash_attention,
)

from kadr.kernels.autotuner import Candidate, SupportCheck

TIMING_SECONDS = 0.02  # spent on timing one candidate, besides its first run
MAX_TIMING_RUNS = 200  # within that time
EFFICIENT_BIAS_ALIGNMENT = 16  # elements between the rows of a bias of memory-efficient attention


def candidates_for(device: torch.device) -> list[Candidate]:
    """Returns the implementations that may run on a device: flash attention 3 where the user has built it."""
    candidates = [
        Candidate("cuDNN", _cudnn_attention, _support_check(can_use_cudnn_attention)),
        Candidate("flash", _flash_attention, _support_check(can_use_flash_attention)),
        Candidate("efficient", _efficient_attention, _support_check(can_use_efficient_attention)),
    ]
    is_hopper = torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == 9
    if is_hopper and importlib.util.find_spec("flash_attn_interface"):
        candidates.append(Candidate("flash 3", _flash_attention_3, lambda q, k, v, bias: bias is None))
    return candidates


def measure_cuda_seconds(function: Callable[[], object], device: torch.device) -> float:
    """Returns the mean seconds of a call that runs on a CUDA device, over some milliseconds of calls."""
    with torch.cuda.device(device):  # events are those of the current device
        function()  # libraries build their plans and allocate
        runs = min(MAX_TIMING_RUNS, max(1, int(TIMING_SECONDS / max(_average_cuda_seconds(function, 1), 1e-9))))
        return _average_cuda_seconds(function, runs)


def _average_cuda_seconds(function: Callable[[], object], runs: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(runs):
        function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000 / runs


def _support_check(can_use: Callable[..., bool]) -> SupportCheck:
    """Returns a check by torch's own, without the warnings that torch gives where one of its backends is forced."""

    def supports(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> bool:
        return can_use(SDPAParams(q, k, v, bias, 0.0, False, False), debug=False)

    return supports


# The operators below scaled_dot_product_attention. Its context manager for a backend sets flags of the whole process,
# which other threads would see, and which two threads at once can leave set.
def _cudnn_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    output: Tensor = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, bias, False, scale=1.0)[0]
    return output


def _flash_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    output: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=1.0)[0]
    return output


def _efficient_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    aligned = None if bias is None else _align_bias(bias).expand(q.shape[0], q.shape[1], q.shape[2], -1)
    output: Tensor = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, aligned, False, scale=1.0)[0]
    return output


def _align_bias(bias: Tensor) -> Tensor:
    """Returns the bias (B, 1, 1, M) in memory whose rows begin at multiples of `EFFICIENT_BIAS_ALIGNMENT`."""
    length = bias.shape[-1]
    if bias.is_contiguous() and length % EFFICIENT_BIAS_ALIGNMENT == 0:
        return bias
    return F.pad(bias, (0, -length % EFFICIENT_BIAS_ALIGNMENT))[..., :length]


def _flash_attention_3(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    from flash_attn_interface import flash_attn_func  # not on PyPI; users with a Hopper GPU may have built it

    output = flash_attn_func(*(tensor.transpose(1, 2) for tensor in (q, k, v)), softmax_scale=1.0)  # (B, N, H, d)
    return (output[0] if isinstance(output, tuple) else output).transpose(1, 2)
