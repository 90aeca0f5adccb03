"""The attention autotuner runs the fastest correct candidate, timed once per bucket."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kadr.kernels import attention
from kadr.kernels.attention import TORCH_SDPA, AttentionAutotuner, Bucket, Candidate, attend, torch_sdpa


class FakeTimer:
    """Returns invented seconds for each candidate by name, and counts its calls."""

    def __init__(self, **seconds: float) -> None:
        self.seconds_by_name, self.running, self.calls = seconds, "", 0

    def __call__(self, call: Callable[[], object]) -> float:
        self.calls += 1
        call()
        return self.seconds_by_name[self.running]

    def candidate(
        self, name: str, run: attention.AttentionFunction = torch_sdpa, supports_bias: bool = True
    ) -> Candidate:
        def recorded(*arguments: Tensor | None) -> Tensor:
            self.running = name
            return run(*arguments)

        return Candidate(name, recorded, supports_bias)


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None = None


def inputs(queries: int = 70, keys: int = 70, head_dim: int = 16, dtype: torch.dtype = torch.float32) -> Inputs:
    generator = torch.Generator().manual_seed(queries + keys)
    lengths = (queries, keys, keys)
    return Inputs(*(torch.randn(2, 6, length, head_dim, generator=generator).to(dtype) for length in lengths))


def wrong_last_query(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Returns correct attention but for the last query of one sample."""
    output = torch_sdpa(q, k, v, bias)
    output[-1, :, -1] += 1
    return output


def raises_error(*_: Tensor | None) -> Tensor:
    raise RuntimeError("no kernel image is available")


def all_nan(q: Tensor, *_: Tensor | None) -> Tensor:
    return torch.full_like(q, torch.nan)


def test_the_fastest_candidate_runs() -> None:
    timer = FakeTimer(a=3.0, b=1.0, c=2.0)
    autotuner = AttentionAutotuner([timer.candidate(name) for name in "abc"], timer)
    assert autotuner.pick(*inputs()).name == "b"
    assert list(autotuner.outcomes.values()) == [{"a": 3.0, "b": 1.0, "c": 2.0}]


def test_an_earlier_candidate_wins_near_ties() -> None:
    timer = FakeTimer(a=1.0, b=0.98, c=1.02)
    assert AttentionAutotuner([timer.candidate(name) for name in "abc"], timer).pick(*inputs()).name == "a"


def test_a_wrong_or_raising_candidate_is_rejected_however_fast() -> None:
    timer = FakeTimer(slow=9.0, wrong=1.0, raises_error=1.0, all_nan=1.0)
    runs = {"wrong": wrong_last_query, "raises_error": raises_error, "all_nan": all_nan, "slow": torch_sdpa}
    autotuner = AttentionAutotuner([timer.candidate(name, run) for name, run in runs.items()], timer)
    assert autotuner.pick(*inputs()).name == "slow"
    (outcomes,) = autotuner.outcomes.values()
    assert str(outcomes["wrong"]).startswith("wrong by ")
    assert outcomes["raises_error"] == "RuntimeError: no kernel image is available"
    assert outcomes["all_nan"] == "wrong by nan %"


def test_torch_chooses_when_every_candidate_is_rejected() -> None:
    timer = FakeTimer()
    assert AttentionAutotuner([timer.candidate("raises_error", raises_error)], timer).pick(*inputs()) is TORCH_SDPA
    assert AttentionAutotuner([], timer).pick(*inputs()) is TORCH_SDPA


def test_each_bucket_is_timed_once() -> None:
    timer = FakeTimer(a=1.0)
    autotuner = AttentionAutotuner([timer.candidate("a")], timer)
    for arguments in (inputs(70, 70), inputs(128, 128), inputs(65, 100), inputs(100, 100)):
        autotuner.pick(*arguments)
    assert timer.calls == 1
    others = (inputs(129, 70), inputs(70, 64), inputs(head_dim=32), inputs(dtype=torch.bfloat16))
    for arguments in (*others, inputs()._replace(bias=torch.zeros(2, 1, 1, 70))):
        autotuner.pick(*arguments)
    assert timer.calls == 1 + 5 == len(autotuner.outcomes)


def test_bucket_lengths_round_up_to_powers_of_two() -> None:
    assert [Bucket.from_tensors(inputs(count).q, inputs().k, None).query_length for count in (1, 2, 3, 64, 65)] == [
        1,
        2,
        4,
        64,
        128,
    ]


def test_a_candidate_without_bias_support_gets_no_bias() -> None:
    timer = FakeTimer(fast=1.0, biased=2.0)
    autotuner = AttentionAutotuner([timer.candidate("fast", supports_bias=False), timer.candidate("biased")], timer)
    bias = torch.zeros(2, 1, 1, 70)
    bias[..., 40:] = -10000.0
    assert autotuner.pick(*inputs()).name == "fast"
    assert autotuner.pick(*inputs()._replace(bias=bias)).name == "biased"


def test_a_candidate_that_ignores_the_bias_is_rejected() -> None:
    timer = FakeTimer(ignores_bias=1.0)
    bias = torch.zeros(2, 1, 1, 70)
    bias[..., 40:] = -10000.0
    ignores_bias = timer.candidate("ignores_bias", lambda q, k, v, _: torch_sdpa(q, k, v, None))
    assert AttentionAutotuner([ignores_bias], timer).pick(*inputs()._replace(bias=bias)) is TORCH_SDPA


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_sdpa_passes_the_check_in_every_dtype(dtype: torch.dtype) -> None:
    timer = FakeTimer(a=1.0)
    autotuner = AttentionAutotuner([timer.candidate("a")], timer)
    autotuner.pick(*inputs(300, 200, 64, dtype))
    assert list(autotuner.outcomes.values()) == [{"a": 1.0}]


def test_without_cuda_attend_equals_torch_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "autotuner_for", raises_error)
    q, k, v, _ = inputs(30, 70)
    bias = torch.randn(2, 1, 1, 70)
    assert torch.equal(attend(q, k, v), F.scaled_dot_product_attention(q, k, v))
    assert torch.equal(attend(q, k, v, bias), F.scaled_dot_product_attention(q, k, v, attn_mask=bias))
