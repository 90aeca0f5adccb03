"""Attention by the fastest implementation that a device has for the shape at hand, found by autotuning.

Which implementation is fastest differs between GPUs and head dimensions by more than a factor of two, and torch's own
order of preference is often wrong: on Hopper cuDNN is up to 1.9 times as fast as what torch picks, on Ampere slower. On
a CPU with units for bfloat16 torch's own takes two to four times as long as the products that it consists of.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import cache, partial

import torch
from torch import Tensor

from kadr.kernels import mode
from kadr.kernels.autotuner import TORCH_SDPA, AttentionAutotuner, Bucket, Candidate, torch_sdpa
from kadr.kernels.cpu import attention as cpu_attention
from kadr.kernels.cpu import zen
from kadr.kernels.cuda.attention import candidates_for, measure_cuda_seconds

# On CPUs: with fewer logits, whatever computes them takes a few milliseconds, and torch's choice does.
MIN_CPU_LOGITS = 1 << 20
CPU_TIMING_RUNS = 3  # the fastest counts


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, *, may_round: bool = False) -> Tensor:
    """Computes softmax(q kᵀ + bias) v.

    By the candidate that was fastest when this bucket first came. Results of candidates may differ in their last bits.

    Args:
        q: (B, H, N, d), divided by √d already.
        k, v: (B, H, M, d).
        bias: (B, 1, 1, M), added to the logits.
        may_round: q and k come from 8-bit products, which are about 1 % off: another rounding adds little to that.

    Returns:
        (B, H, N, d) in q's dtype.
    """
    needs_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (q, k, v))
    if needs_gradient or torch.compiler.is_compiling() or mode.current() == mode.REFERENCE or not _has_choice(q, k):
        return torch_sdpa(q, k, v, bias)
    return autotuner_for(q.device, may_round and q.device.type == "cpu").run(q, k, v, bias)


def _has_choice(q: Tensor, k: Tensor) -> bool:
    """Returns whether these inputs have candidates besides torch's choice."""
    return has_cpu_choice(q.shape[:3].numel() * k.shape[2], q.dtype) if q.device.type == "cpu" else q.is_cuda


def has_cpu_choice(num_logits: int, dtype: torch.dtype) -> bool:
    """Returns whether so many logits have candidates besides torch's choice on a CPU."""
    return num_logits >= MIN_CPU_LOGITS and dtype in (torch.bfloat16, torch.float32)


def find_choice(
    choices: Mapping[str, str], q_shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, may_round: bool
) -> str | None:
    """Returns the name of the candidate that computes self-attention, by choices as `record_choices` returns them.

    Args:
        q_shape: heads, tokens and width of a head.

    Returns:
        None where the choice was not made yet.
    """
    heads, tokens, head_dim = q_shape
    has_choice = has_cpu_choice(heads * tokens**2, dtype) if device.type == "cpu" else device.type == "cuda"
    if not has_choice or mode.current() == mode.REFERENCE:
        return TORCH_SDPA.name
    may_round = may_round and device.type == "cpu"
    return choices.get(Bucket.of_lengths(tokens, tokens, device, dtype, head_dim, False, may_round).key)


def autotuners_for(device: torch.device) -> list[AttentionAutotuner]:
    """Returns the autotuners that `attend` uses on a CPU or a CUDA device."""
    return [autotuner_for(device, may_round) for may_round in (False, True)[: 1 + (device.type == "cpu")]]


@cache
def autotuner_for(device: torch.device, may_round: bool = False) -> AttentionAutotuner:
    """Returns an autotuner that `attend` uses on a CPU or a CUDA device."""
    if device.type == "cpu":
        return AttentionAutotuner(_cpu_candidates(may_round), measure_cpu_seconds, may_round=may_round)
    return AttentionAutotuner(candidates_for(device), partial(measure_cuda_seconds, device=device))


def _cpu_candidates(may_round: bool) -> list[Candidate]:
    own = cpu_attention.attend_rounded if may_round else cpu_attention.attend
    return [
        Candidate("oneDNN", own, cpu_attention.is_supported),
        TORCH_SDPA,
        Candidate("zentorch", zen.attend, zen.is_attention_supported),
    ]


def measure_cpu_seconds(function: Callable[[], object]) -> float:
    """Returns the seconds of the fastest of a few calls."""
    times = []
    for _ in range(CPU_TIMING_RUNS):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)
