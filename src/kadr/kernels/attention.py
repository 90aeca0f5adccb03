"""Attention by the fastest implementation that a device has for the shape at hand, found by autotuning.

Which implementation is fastest differs between GPUs and head dimensions by more than a factor of two, and torch's own
order of preference is often wrong: on Hopper cuDNN is up to 1.9 times as fast as what torch picks, on Ampere slower. On
a CPU with units for bfloat16 torch's own takes two to four times as long as the products that it consists of.
"""

from __future__ import annotations

import importlib.util
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import (
    SDPAParams,
    can_use_cudnn_attention,
    can_use_efficient_attention,
    can_use_flash_attention,
)

from kadr.errors import KadrWarning
from kadr.kernels import mode
from kadr.kernels.cpu import attention as cpu_attention
from kadr.kernels.cpu import zen
from kadr.kernels.error_kinds import is_unsupported

AttentionFunction = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
SupportCheck = Callable[[Tensor, Tensor, Tensor, Tensor | None], bool]
TIMING_SECONDS = 0.02  # spent on timing one candidate, besides its first run
MAX_TIMING_RUNS = 200  # within that time
# A later candidate must take less than this share of the best time so far, so that noise decides nothing.
MAX_TIME_RATIO = 0.97
CHECKED_QUERIES, CHECKED_HEADS = 64, 4  # compared with exact attention, spread evenly over one sample
ATTENTION_MAX_RELATIVE_ERROR = {torch.float32: 1e-3}
MAX_RELATIVE_ERROR_16BIT = 0.02  # for 16-bit dtypes, where a correct result is about 0.004 off
EFFICIENT_BIAS_ALIGNMENT = 16  # elements between the rows of a bias of memory-efficient attention
# On CPUs: with fewer logits, whatever computes them takes a few milliseconds, and torch's choice does.
MIN_CPU_LOGITS = 1 << 20
CPU_TRIAL_FLOPS = 2e10  # of the heads that candidates are timed with
CPU_TIMING_RUNS = 3  # the fastest counts


def _supports_all(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> bool:
    return True


class Candidate(NamedTuple):
    """One attention implementation.

    Args:
        run: q, k, v (B, H, N or M, d) and a bias (B, 1, 1, M) or None -> (B, H, N, d); see `attend`. Raises for inputs
            that it does not support.
        supports: whether it may be run for such inputs.
    """

    name: str
    run: AttentionFunction
    supports: SupportCheck = _supports_all


class Bucket(NamedTuple):
    """Inputs that share one choice of implementation. Lengths are rounded up to powers of two.

    Args:
        may_round: see `attend`.
    """

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    query_length: int
    key_length: int
    has_bias: bool
    may_round: bool = False

    @classmethod
    def from_tensors(cls, q: Tensor, k: Tensor, bias: Tensor | None, *, may_round: bool = False) -> Bucket:
        lengths = q.shape[2], k.shape[2]
        return cls.of_lengths(*lengths, q.device, q.dtype, q.shape[3], bias is not None, may_round)

    @classmethod
    def of_lengths(
        cls,
        queries: int,
        keys: int,
        device: torch.device,
        dtype: torch.dtype,
        head_dim: int,
        has_bias: bool,
        may_round: bool,
    ) -> Bucket:
        """Returns the bucket of so many queries and keys."""
        query_length, key_length = (1 << (length - 1).bit_length() for length in (queries, keys))
        return cls(device, dtype, head_dim, query_length, key_length, has_bias, may_round)

    @property
    def key(self) -> str:
        """Names the bucket in stored choices. Devices of one kind share it."""
        dtype, bias = str(self.dtype).removeprefix("torch."), " with bias" if self.has_bias else ""
        sizes = f"{self.query_length}x{self.key_length}, head dim {self.head_dim}"
        return f"{_KEY_PREFIX} {self.device.type} {dtype} {sizes}{bias}{_ROUNDED_SUFFIX * self.may_round}"


def is_key_for(key: str, device: torch.device, *, may_round: bool = False) -> bool:
    """Returns whether a key names a bucket of a kind of device."""
    return key.startswith(f"{_KEY_PREFIX} {device.type} ") and key.endswith(_ROUNDED_SUFFIX) == may_round


def torch_sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Calls scaled_dot_product_attention with the backend that torch picks."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)


TORCH_SDPA = Candidate("torch's choice", torch_sdpa)
_KEY_PREFIX, _ROUNDED_SUFFIX = "attention", ", may round"  # of a bucket's key
NOT_SUPPORTED = "not supported"  # outcome of a candidate that was not run


class AttentionAutotuner:
    """Times every candidate once for each bucket, and runs the fastest from then on.

    Args:
        candidates: on near ties, earlier ones win.
        measure_seconds: times one call.
        may_round: see `attend`.

    Attributes:
        outcomes: for each bucket and candidate, its seconds, or the reason why it was rejected.

    Threads share an autotuner: while one times candidates, the others wait for the outcome.
    """

    def __init__(
        self,
        candidates: Sequence[Candidate],
        measure_seconds: Callable[[Callable[[], object]], float],
        *,
        may_round: bool = False,
    ) -> None:
        self.candidates, self.measure_seconds, self.may_round = candidates, measure_seconds, may_round
        self.outcomes: dict[Bucket, dict[str, float | str]] = {}
        self._fastest_by_bucket: dict[Bucket, Candidate] = {}
        self._restored: dict[str, str] = {}  # key of a bucket -> name of the candidate to use there
        self._refused: set[tuple[str, Bucket, int, int]] = set()  # candidates, and lengths that they do not support
        self._lock = threading.Lock()

    def choices(self) -> dict[str, str]:
        """Returns the name of the candidate that each bucket uses, by the bucket's key."""
        return {bucket.key: candidate.name for bucket, candidate in dict(self._fastest_by_bucket).items()}

    def restore(self, choices: Mapping[str, str], *, override: bool = False) -> dict[str, str]:
        """Uses these candidates for their buckets, as soon as each has been checked with the bucket's first inputs.

        Args:
            choices: as `choices` returned them.
            override: also where another candidate was chosen or restored before.

        Returns:
            The choices that are not among the candidates.
        """
        names = {candidate.name for candidate in (*self.candidates, TORCH_SDPA)}
        known = {key: name for key, name in choices.items() if name in names}
        with self._lock:
            self._restored = {**self._restored, **known} if override else {**known, **self._restored}
            if override:
                for bucket in [b for b, c in self._fastest_by_bucket.items() if known.get(b.key, c.name) != c.name]:
                    del self._fastest_by_bucket[bucket]
        return {key: name for key, name in choices.items() if name not in names}

    def forget(self) -> None:
        """Drops all choices: each is made anew."""
        with self._lock:
            self.outcomes.clear()
            self._fastest_by_bucket.clear()
            self._restored.clear()
            self._refused.clear()

    def run(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        """Runs the bucket's candidate, or torch's choice for lengths that it refuses. Arguments as for `Candidate.run`.

        A bucket is chosen by the first lengths that come; its other lengths keep the choice, whatever came before them.
        """
        candidate = self.pick(q, k, v, bias)
        bucket = Bucket.from_tensors(q, k, bias, may_round=self.may_round)
        refused = candidate.name, bucket, q.shape[2], k.shape[2]
        if candidate is TORCH_SDPA or refused in self._refused:
            return torch_sdpa(q, k, v, bias)
        try:
            return candidate.run(q, k, v, bias)
        except Exception as refusal:  # each library raises its own type
            if not is_unsupported(refusal):
                raise
            reason = f"{type(refusal).__name__}: {refusal}"
        self._refused.add(refused)
        warnings.warn(
            f"{candidate.name}, the fastest attention for {bucket.key}, does not compute {q.shape[2]} queries and "
            f"{k.shape[2]} keys: {reason}. torch's choice does, which may be slower.",
            KadrWarning,
            stacklevel=3,
        )
        return torch_sdpa(q, k, v, bias)

    def pick(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Candidate:
        """Returns the fastest correct candidate, or torch's choice if none is. Arguments as for `Candidate.run`.

        An error that says nothing about a candidate, such as memory that ran out, is raised, and nothing is recorded.
        """
        bucket = Bucket.from_tensors(q, k, bias, may_round=self.may_round)
        if bucket in self._fastest_by_bucket:
            return self._fastest_by_bucket[bucket]
        if q.is_cuda and torch.cuda.is_current_stream_capturing():
            return TORCH_SDPA  # nothing can be timed during a capture
        with self._lock:
            if bucket not in self._fastest_by_bucket:
                if not bool(_sample_exact(q, k, v, bias).isfinite().all()):
                    return TORCH_SDPA  # no candidate could be checked with these inputs
                self._find_fastest(bucket, *_trial_part(q, k, v, bias))
            return self._fastest_by_bucket[bucket]

    def _find_fastest(self, bucket: Bucket, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> None:
        """Tries the restored candidate, else all, and records their outcomes and the fastest."""
        if (restored := self._restored_candidate(bucket)) is not None:
            outcome = self.try_candidate(restored, q, k, v, bias)
            self.outcomes[bucket] = {restored.name: outcome}
            if isinstance(outcome, float):
                self._fastest_by_bucket[bucket] = restored
                return
            warnings.warn(
                f"{restored.name}, which computed {bucket.key} before, cannot do so here: {outcome}. The fastest "
                "of the others is used, which may round differently.",
                KadrWarning,
                stacklevel=4,
            )
        fastest, least_seconds = TORCH_SDPA, float("inf")
        outcomes: dict[str, float | str] = {}
        for candidate in self.candidates:
            outcome = outcomes[candidate.name] = self.try_candidate(candidate, q, k, v, bias)
            if isinstance(outcome, float) and outcome < MAX_TIME_RATIO * least_seconds:
                fastest, least_seconds = candidate, outcome
        self.outcomes[bucket], self._fastest_by_bucket[bucket] = outcomes, fastest

    def _restored_candidate(self, bucket: Bucket) -> Candidate | None:
        name = self._restored.get(bucket.key)
        return next((candidate for candidate in (*self.candidates, TORCH_SDPA) if candidate.name == name), None)

    def try_candidate(self, candidate: Candidate, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> float | str:
        """Returns the seconds that a candidate takes, or the reason why it is rejected."""
        if not candidate.supports(q, k, v, bias):
            return NOT_SUPPORTED
        try:
            error = relative_error(candidate.run(q, k, v, bias), q, k, v, bias)
            if not error <= ATTENTION_MAX_RELATIVE_ERROR.get(q.dtype, MAX_RELATIVE_ERROR_16BIT):
                return f"wrong by {100 * error:.2g} %"
            return self.measure_seconds(lambda: candidate.run(q, k, v, bias))
        except Exception as refusal:  # each library raises its own type
            if not is_unsupported(refusal):
                raise
            return f"{type(refusal).__name__}: {refusal}"


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
    candidates = [
        Candidate("cuDNN", _cudnn_attention, _support_check(can_use_cudnn_attention)),
        Candidate("flash", _flash_attention, _support_check(can_use_flash_attention)),
        Candidate("efficient", _efficient_attention, _support_check(can_use_efficient_attention)),
    ]
    is_hopper = torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == 9
    if is_hopper and importlib.util.find_spec("flash_attn_interface"):
        candidates.append(Candidate("flash 3", _flash_attention_3, lambda q, k, v, bias: bias is None))
    return AttentionAutotuner(candidates, partial(measure_cuda_seconds, device=device))


def _cpu_candidates(may_round: bool) -> list[Candidate]:
    own = cpu_attention.attend_rounded if may_round else cpu_attention.attend
    return [
        Candidate("oneDNN", own, cpu_attention.is_supported),
        TORCH_SDPA,
        Candidate("zentorch", zen.attend, zen.is_attention_supported),
    ]


def _trial_part(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Returns what candidates are tried with: on a CPU some heads of the last sample, else everything."""
    if q.device.type != "cpu":
        return q, k, v, bias
    heads = max(1, int(CPU_TRIAL_FLOPS / (4 * q.shape[2] * k.shape[2] * q.shape[3])))
    return q[-1:, :heads], k[-1:, :heads], v[-1:, :heads], None if bias is None else bias[-1:]


def measure_cpu_seconds(function: Callable[[], object]) -> float:
    """Returns the seconds of the fastest of a few calls."""
    times = []
    for _ in range(CPU_TIMING_RUNS):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


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


def relative_error(output: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> float:
    """Returns the relative error of an attention output, for some queries and heads of the last sample, in fp32.

    The logits of all queries and heads would not fit in memory.
    """
    expected, (heads, rows) = _sample_exact(q, k, v, bias), _sampled_indices(q)
    return float((output[-1][heads][:, rows].float() - expected).norm() / expected.norm().clamp_min(1e-30))


def _sample_exact(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Computes attention in fp32 for some queries and heads of the last sample."""
    heads, rows = _sampled_indices(q)
    queries, keys, values = q[-1][heads][:, rows].float(), k[-1][heads].float(), v[-1][heads].float()
    logits = queries @ keys.transpose(1, 2)
    if bias is not None:
        logits += bias[-1].float()
    return logits.softmax(dim=-1) @ values


def _sampled_indices(q: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the heads and the queries of q (B, H, N, d) that are checked."""
    counts_and_ends = ((CHECKED_HEADS, q.shape[1] - 1), (CHECKED_QUERIES, q.shape[2] - 1))
    heads, rows = (torch.linspace(0, end, count, device=q.device).long() for count, end in counts_and_ends)
    return heads, rows
