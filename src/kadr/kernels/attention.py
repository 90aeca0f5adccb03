"""Attention by the fastest implementation that a GPU has for the size at hand, found out by trying.

Which one that is differs between chips and head widths by more than a factor of two, and torch's own order of
preference is often not the right one: on Hopper cuDNN is up to 1.9 times as fast as what torch takes, on Ampere slower.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kadr.kernels import mode

AttentionFunction = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
TIMING_SECONDS = 0.02  # that trying one candidate takes, besides its first run
MAX_TIMING_RUNS = 200  # in that time
MAX_TIME_RATIO = (
    0.97  # of the time of the best before it, that a later candidate must stay under: noise is to decide nothing
)
CHECKED_QUERIES, CHECKED_HEADS = 64, 4  # that are compared with exact attention, spread over all of one sample
ATTENTION_MAX_RELATIVE_ERROR = {torch.float32: 1e-3}  # relative error
MAX_RELATIVE_ERROR_16BIT = 0.02  # in 16 bits, where it is about 0.004


class Candidate(NamedTuple):
    """One implementation.

    Args:
        run: q, k, v (B, H, N or M, d) and a bias (B, 1, 1, M) or None -> (B, H, N, d). Raises where it cannot.
        supports_bias: whether it knows what a bias is.
    """

    name: str
    run: AttentionFunction
    supports_bias: bool = True


class Bucket(NamedTuple):
    """Inputs that one choice is made for. Lengths are rounded up to powers of two."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    query_length: int
    key_length: int
    has_bias: bool

    @classmethod
    def from_tensors(cls, q: Tensor, k: Tensor, bias: Tensor | None) -> Bucket:
        queries, keys = (1 << (length - 1).bit_length() for length in (q.shape[2], k.shape[2]))
        return cls(q.device, q.dtype, q.shape[3], queries, keys, bias is not None)


def torch_sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Whatever torch takes by itself."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


TORCH_SDPA = Candidate("torch's choice", torch_sdpa)


class AttentionAutotuner:
    """Tries every candidate once for each bucket, and from then on runs the fastest.

    Args:
        candidates: the earlier ones win where there is little between them.
        measure_seconds: how long a call takes.

    Attributes:
        outcomes: for each bucket, what became of each candidate: its seconds, or why it was left out.
    """

    def __init__(
        self, candidates: Sequence[Candidate], measure_seconds: Callable[[Callable[[], object]], float]
    ) -> None:
        self.candidates, self.measure_seconds = candidates, measure_seconds
        self.outcomes: dict[Bucket, dict[str, float | str]] = {}
        self._fastest_by_bucket: dict[Bucket, Candidate] = {}

    def pick(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Candidate:
        """The fastest that is right; torch's choice where none is. Arguments as of a candidate's `run`."""
        bucket = Bucket.from_tensors(q, k, bias)
        if bucket not in self._fastest_by_bucket:
            if q.is_cuda and torch.cuda.is_current_stream_capturing():
                return TORCH_SDPA  # a capture can time nothing
            self._fastest_by_bucket[bucket] = self._find_fastest(bucket, q, k, v, bias)
        return self._fastest_by_bucket[bucket]

    def _find_fastest(self, bucket: Bucket, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Candidate:
        best, least = TORCH_SDPA, float("inf")
        outcomes = self.outcomes[bucket] = {}
        for candidate in self.candidates:
            if bias is not None and not candidate.supports_bias:
                continue
            spent = outcomes[candidate.name] = self.try_candidate(candidate, q, k, v, bias)
            if isinstance(spent, float) and spent < MAX_TIME_RATIO * least:
                best, least = candidate, spent
        return best

    def try_candidate(self, candidate: Candidate, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> float | str:
        """The seconds that a candidate takes, or why it is left out."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch tells at length why a backend cannot
            try:
                apart = relative_error(candidate.run(q, k, v, bias), q, k, v, bias)
                if not apart <= ATTENTION_MAX_RELATIVE_ERROR.get(q.dtype, MAX_RELATIVE_ERROR_16BIT):
                    return f"wrong by {100 * apart:.2g} %"
                return self.measure_seconds(lambda: candidate.run(q, k, v, bias))
            except Exception as reason:  # each library refuses in its own way
                return f"{type(reason).__name__}: {reason}"


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ / √d + bias) v.

    On CUDA by the candidate that was fastest when this size was first seen, elsewhere by torch's choice. Numbers may
    differ in their last bits between the two.

    Args:
        q: (B, H, N, d).
        k, v: (B, H, M, d).
        bias: (B, 1, 1, M), added to the logits.

    Returns:
        (B, H, N, d) in q's dtype.
    """
    learning = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (q, k, v))
    if not q.is_cuda or learning or torch.compiler.is_compiling() or mode.current() == mode.REFERENCE:
        return torch_sdpa(q, k, v, bias)
    return autotuner_for(q.device).pick(q, k, v, bias).run(q, k, v, bias)


@cache
def autotuner_for(device: torch.device) -> AttentionAutotuner:
    """What `attend` asks on a CUDA device."""
    backends = {
        "cuDNN": SDPBackend.CUDNN_ATTENTION,
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
    }
    candidates = [Candidate(name, _sdpa_with_backend(backend), name != "flash") for name, backend in backends.items()]
    hopper = torch.cuda.get_device_capability(device)[0] == 9
    if hopper and importlib.util.find_spec("flash_attn_interface"):
        candidates.append(Candidate("flash 3", _flash_attention_3, supports_bias=False))
    return AttentionAutotuner(candidates, measure_cuda_seconds)


def measure_cuda_seconds(function: Callable[[], object]) -> float:
    """How long a call takes on the current CUDA device, on average over some milliseconds of calls."""
    function()  # plans are made and memory is taken
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


def _sdpa_with_backend(backend: SDPBackend) -> AttentionFunction:
    def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        with sdpa_kernel(backend):
            return torch_sdpa(q, k, v, bias)

    return run


def _flash_attention_3(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    from flash_attn_interface import flash_attn_func  # not on PyPI: who has a Hopper may have built it

    made = flash_attn_func(*(tensor.transpose(1, 2) for tensor in (q, k, v)))  # (B, N, H, d)
    return (made[0] if isinstance(made, tuple) else made).transpose(1, 2)


def relative_error(output: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> float:
    """How far an outcome of attention is off, relatively: some queries of some heads of the last sample, in fp32.

    The logits of all would fill the memory.
    """
    heads = torch.linspace(0, q.shape[1] - 1, CHECKED_HEADS, device=q.device).long()
    rows = torch.linspace(0, q.shape[2] - 1, CHECKED_QUERIES, device=q.device).long()
    queries, keys, values = q[-1][heads][:, rows].float(), k[-1][heads].float(), v[-1][heads].float()
    logits = queries @ keys.transpose(1, 2) / q.shape[3] ** 0.5
    if bias is not None:
        logits += bias[-1].float()
    right = logits.softmax(dim=-1) @ values
    return float((output[-1][heads][:, rows].float() - right).norm() / right.norm())
