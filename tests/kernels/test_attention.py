"""Which attention is run: the fastest that is right, found out once for each size."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kadr.kernels import attention
from kadr.kernels.attention import TORCH_SDPA, AttentionAutotuner, Bucket, Candidate, attend, torch_sdpa


class Clock:
    """Tells how long each candidate takes, by name, and how often it was asked."""

    def __init__(self, **seconds: float) -> None:
        self.told, self.running, self.asked = seconds, "", 0

    def __call__(self, call: Callable[[], object]) -> float:
        self.asked += 1
        call()
        return self.told[self.running]

    def candidate(self, name: str, run: attention.AttentionFunction = torch_sdpa, takes_bias: bool = True) -> Candidate:
        def noted(*given: Tensor | None) -> Tensor:
            self.running = name
            return run(*given)

        return Candidate(name, noted, takes_bias)


class Heads(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None = None


def heads(queries: int = 70, keys: int = 70, width: int = 16, dtype: torch.dtype = torch.float32) -> Heads:
    generator = torch.Generator().manual_seed(queries + keys)
    lengths = (queries, keys, keys)
    return Heads(*(torch.randn(2, 6, length, width, generator=generator).to(dtype) for length in lengths))


def wrong(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Right but for the last query of one sample."""
    made = torch_sdpa(q, k, v, bias)
    made[-1, :, -1] += 1
    return made


def refuses(*_: Tensor | None) -> Tensor:
    raise RuntimeError("no kernel image is available")


def nothing(q: Tensor, *_: Tensor | None) -> Tensor:
    return torch.full_like(q, torch.nan)


def test_the_fastest_is_run() -> None:
    clock = Clock(a=3.0, b=1.0, c=2.0)
    chooser = AttentionAutotuner([clock.candidate(name) for name in "abc"], clock)
    assert chooser.pick(*heads()).name == "b"
    assert list(chooser.outcomes.values()) == [{"a": 3.0, "b": 1.0, "c": 2.0}]


def test_noise_decides_nothing() -> None:
    clock = Clock(a=1.0, b=0.98, c=1.02)
    assert AttentionAutotuner([clock.candidate(name) for name in "abc"], clock).pick(*heads()).name == "a"


def test_what_is_wrong_or_raises_is_left_out_however_fast() -> None:
    clock = Clock(slow=9.0, wrong=1.0, refuses=1.0, nothing=1.0)
    runs = {"wrong": wrong, "refuses": refuses, "nothing": nothing, "slow": torch_sdpa}
    chooser = AttentionAutotuner([clock.candidate(name, run) for name, run in runs.items()], clock)
    assert chooser.pick(*heads()).name == "slow"
    (outcomes,) = chooser.outcomes.values()
    assert str(outcomes["wrong"]).startswith("wrong by ")
    assert outcomes["refuses"] == "RuntimeError: no kernel image is available"
    assert outcomes["nothing"] == "wrong by nan %"


def test_where_none_is_left_torch_chooses() -> None:
    clock = Clock()
    assert AttentionAutotuner([clock.candidate("refuses", refuses)], clock).pick(*heads()) is TORCH_SDPA
    assert AttentionAutotuner([], clock).pick(*heads()) is TORCH_SDPA


def test_a_choice_is_made_once_for_each_bucket() -> None:
    clock = Clock(a=1.0)
    chooser = AttentionAutotuner([clock.candidate("a")], clock)
    for given in (heads(70, 70), heads(128, 128), heads(65, 100), heads(100, 100)):
        chooser.pick(*given)
    assert clock.asked == 1
    others = (heads(129, 70), heads(70, 64), heads(width=32), heads(dtype=torch.bfloat16))
    for given in (*others, heads()._replace(bias=torch.zeros(2, 1, 1, 70))):
        chooser.pick(*given)
    assert clock.asked == 1 + 5 == len(chooser.outcomes)


def test_a_length_is_rounded_up_to_a_power_of_two() -> None:
    assert [Bucket.from_tensors(heads(count).q, heads().k, None).query_length for count in (1, 2, 3, 64, 65)] == [
        1,
        2,
        4,
        64,
        128,
    ]


def test_who_does_not_know_a_bias_is_not_asked_with_one() -> None:
    clock = Clock(fast=1.0, biased=2.0)
    chooser = AttentionAutotuner([clock.candidate("fast", takes_bias=False), clock.candidate("biased")], clock)
    bias = torch.zeros(2, 1, 1, 70)
    bias[..., 40:] = -10000.0
    assert chooser.pick(*heads()).name == "fast"
    assert chooser.pick(*heads()._replace(bias=bias)).name == "biased"


def test_a_bias_that_is_passed_over_is_noticed() -> None:
    clock = Clock(deaf=1.0)
    bias = torch.zeros(2, 1, 1, 70)
    bias[..., 40:] = -10000.0
    deaf = clock.candidate("deaf", lambda q, k, v, _: torch_sdpa(q, k, v, None))
    assert AttentionAutotuner([deaf], clock).pick(*heads()._replace(bias=bias)) is TORCH_SDPA


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_is_right_in_every_dtype(dtype: torch.dtype) -> None:
    clock = Clock(a=1.0)
    chooser = AttentionAutotuner([clock.candidate("a")], clock)
    chooser.pick(*heads(300, 200, 64, dtype))
    assert list(chooser.outcomes.values()) == [{"a": 1.0}]


def test_without_cuda_it_is_plain_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "autotuner_for", refuses)
    q, k, v, _ = heads(30, 70)
    bias = torch.randn(2, 1, 1, 70)
    assert torch.equal(attend(q, k, v), F.scaled_dot_product_attention(q, k, v))
    assert torch.equal(attend(q, k, v, bias), F.scaled_dot_product_attention(q, k, v, attn_mask=bias))
