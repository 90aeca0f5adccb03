"""Chooses an implementation of attention: checks and times each once for a kind of inputs, and keeps the fastest."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kadr.errors import KadrWarning
from kadr.kernels.error_kinds import is_unsupported

AttentionFunction = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
SupportCheck = Callable[[Tensor, Tensor, Tensor, Tensor | None], bool]
# A later candidate must take less than this share of the best time so far, so that noise decides nothing.
MAX_TIME_RATIO = 0.97
CHECKED_QUERIES, CHECKED_HEADS = 64, 4  # compared with exact attention, spread evenly over one sample
ATTENTION_MAX_RELATIVE_ERROR = {torch.float32: 1e-3}
MAX_RELATIVE_ERROR_16BIT = 0.02  # for 16-bit dtypes, where a correct result is about 0.004 off
CPU_TRIAL_FLOPS = 2e10  # of the heads that candidates are timed with on a CPU


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


def _trial_part(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Returns what candidates are tried with: on a CPU some heads of the last sample, else everything."""
    if q.device.type != "cpu":
        return q, k, v, bias
    heads = max(1, int(CPU_TRIAL_FLOPS / (4 * q.shape[2] * k.shape[2] * q.shape[3])))
    return q[-1:, :heads], k[-1:, :heads], v[-1:, :heads], None if bias is None else bias[-1:]


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
