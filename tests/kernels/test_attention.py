"""The attention autotuner runs the fastest correct candidate, timed once per bucket."""

from __future__ import annotations

import importlib.util
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kadr.errors import Cancelled, KadrWarning, RequestError
from kadr.kernels import attention
from kadr.kernels.attention import attend
from kadr.kernels.autotuner import (
    NOT_SUPPORTED,
    TORCH_SDPA,
    AttentionAutotuner,
    AttentionFunction,
    Bucket,
    Candidate,
    is_key_for,
    torch_sdpa,
)
from kadr.kernels.cpu import attention as cpu_attention
from kadr.kernels.cuda import attention as cuda_attention
from tests.oracles import relative_error


class FakeTimer:
    """Returns invented seconds for each candidate by name, and counts its calls."""

    def __init__(self, **seconds: float) -> None:
        self.seconds_by_name, self.running, self.calls = seconds, "", 0

    def __call__(self, call: Callable[[], object]) -> float:
        self.calls += 1
        call()
        return self.seconds_by_name[self.running]

    def candidate(self, name: str, run: AttentionFunction = torch_sdpa, supports: Any = lambda *_: True) -> Candidate:
        def recorded(*arguments: Tensor | None) -> Tensor:
            self.running = name
            return run(*arguments)

        return Candidate(name, recorded, supports)


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


@pytest.mark.parametrize(
    "kind", [RuntimeError, NotImplementedError, ImportError, TypeError, ValueError, AssertionError]
)
def test_errors_of_libraries_reject_a_candidate(kind: type[Exception]) -> None:
    def refuses(*_: Tensor | None) -> Tensor:
        raise kind("not for these inputs")

    timer = FakeTimer(refuses=1.0, works=2.0)
    autotuner = AttentionAutotuner([timer.candidate("refuses", refuses), timer.candidate("works")], timer)
    assert autotuner.pick(*inputs()).name == "works"
    assert list(autotuner.outcomes.values()) == [{"refuses": f"{kind.__name__}: not for these inputs", "works": 2.0}]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RequestError("too large"),
        Cancelled("stop"),
        KeyboardInterrupt(),
        KeyError("a bug"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_other_errors_pass_and_leave_no_verdict(error: BaseException) -> None:
    errors = [error]

    def fails_once(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        if errors:
            raise errors.pop()
        return torch_sdpa(q, k, v, bias)

    timer = FakeTimer(first=3.0, fails_once=1.0)
    autotuner = AttentionAutotuner([timer.candidate("first"), timer.candidate("fails_once", fails_once)], timer)
    with pytest.raises(type(error)):
        autotuner.pick(*inputs())
    assert not autotuner.outcomes
    assert autotuner.pick(*inputs()).name == "fails_once"


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_inputs_that_are_not_finite_give_no_verdict(value: float) -> None:
    timer = FakeTimer(a=1.0)
    autotuner = AttentionAutotuner([timer.candidate("a")], timer)
    broken = inputs()
    broken.v[-1, :, 3] = value
    assert autotuner.pick(*broken) is TORCH_SDPA
    assert not autotuner.outcomes
    assert autotuner.pick(*inputs()).name == "a"


def test_values_of_zero_reject_no_candidate() -> None:
    timer = FakeTimer(a=1.0)
    zeros = inputs()._replace(v=torch.zeros(2, 6, 70, 16))
    assert AttentionAutotuner([timer.candidate("a")], timer).pick(*zeros).name == "a"


def test_threads_time_a_bucket_once() -> None:
    def slow(*arguments: Any) -> Tensor:
        time.sleep(0.02)
        return torch_sdpa(*arguments)

    timer = FakeTimer(slow=1.0)
    autotuner = AttentionAutotuner([timer.candidate("slow", slow)], timer)
    barrier = threading.Barrier(4)

    def pick(_: int) -> str:
        barrier.wait()
        return autotuner.pick(*inputs()).name

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(pick, range(4))) == ["slow"] * 4
    assert timer.calls == 1


def test_a_trial_leaves_the_warning_filters_of_other_threads() -> None:
    seen = []
    timer = FakeTimer(a=1.0)
    candidate = timer.candidate(
        "a", lambda *arguments: (seen.append(list(warnings.filters)), torch_sdpa(*arguments))[1]
    )
    AttentionAutotuner([candidate], timer).pick(*inputs())
    assert seen == [list(warnings.filters)] * 2


class RecordFlags(TorchDispatchMode):
    """Records at each operation which backends of attention are enabled in this process."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[bool, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(enabled_backends())
        return func(*args, **(kwargs or {}))


def enabled_backends() -> tuple[bool, ...]:
    names = ("cudnn", "flash", "mem_efficient", "math")
    return tuple(getattr(torch.backends.cuda, f"{name}_sdp_enabled")() for name in names)


@pytest.mark.parametrize("has_bias", [False, True])
def test_gpu_candidates_set_no_flag_of_the_process(has_bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    before = enabled_backends()
    q, k, v = (tensor.to("meta", torch.bfloat16) for tensor in inputs(70, 50)[:3])
    bias = torch.zeros(2, 1, 1, 50, device="meta", dtype=torch.bfloat16) if has_bias else None
    candidates = attention.autotuner_for.__wrapped__(torch.device("cuda")).candidates
    with RecordFlags() as record:
        outputs = {each.name: each.run(q, k, v, bias) for each in candidates if not (has_bias and each.name == "flash")}
    assert outputs.keys() >= {"cuDNN", "efficient"}
    assert {output.shape for output in outputs.values()} == {q.shape}
    assert record.seen == {before}


@pytest.mark.parametrize("length", [64, 70])
def test_rows_of_an_aligned_bias_begin_at_multiples_of_16(length: int) -> None:
    bias = torch.randn(2, 1, 1, length)
    aligned = cuda_attention._align_bias(bias)
    assert torch.equal(aligned, bias)
    assert all(stride % 16 == 0 for stride in aligned.stride()[:-1])
    assert (aligned is bias) is (length == 64)


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


def test_a_candidate_is_not_run_for_inputs_it_does_not_support() -> None:
    def without_bias(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> bool:
        return bias is None

    timer = FakeTimer(fast=1.0, biased=2.0)
    autotuner = AttentionAutotuner([timer.candidate("fast", supports=without_bias), timer.candidate("biased")], timer)
    bias = torch.zeros(2, 1, 1, 70)
    bias[..., 40:] = -10000.0
    assert autotuner.pick(*inputs()).name == "fast"
    assert autotuner.pick(*inputs()._replace(bias=bias)).name == "biased"
    assert list(autotuner.outcomes.values())[1] == {"fast": NOT_SUPPORTED, "biased": 2.0}


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


def test_few_logits_on_a_cpu_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "autotuner_for", raises_error)
    q, k, v, _ = inputs(30, 70)
    bias = torch.randn(2, 1, 1, 70)
    assert torch.equal(attend(q, k, v), F.scaled_dot_product_attention(q, k, v, scale=1.0))
    assert torch.equal(attend(q, k, v, bias), F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0))


@pytest.fixture
def cpu_trials(monkeypatch: pytest.MonkeyPatch) -> list[AttentionAutotuner]:
    """Returns new autotuners of the CPU, exact and rounding, that `attend` uses however few logits there are."""
    monkeypatch.setattr(attention, "MIN_CPU_LOGITS", 0)
    autotuners = [attention.autotuner_for.__wrapped__(torch.device("cpu"), may_round) for may_round in (False, True)]
    monkeypatch.setattr(attention, "autotuner_for", lambda device, may_round: autotuners[may_round])
    return autotuners


@pytest.mark.parametrize("may_round", [False, True])
def test_a_cpu_chooses_by_trial_on_a_few_heads(
    cpu_trials: list[AttentionAutotuner], may_round: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []
    run = cpu_attention.attend_rounded if may_round else cpu_attention.attend

    def record(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        tried.append(q.shape[1])
        return run(q, k, v, bias)

    autotuner = cpu_trials[may_round]
    autotuner.candidates = [Candidate("oneDNN", record), *autotuner.candidates[1:]]
    monkeypatch.setattr("kadr.kernels.autotuner.CPU_TRIAL_FLOPS", 2 * 4 * 70 * 70 * 16)
    q, k, v, _ = inputs(dtype=torch.bfloat16)
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), scale=1.0)
    assert relative_error(attend(q, k, v, may_round=may_round), expected) <= 0.004
    assert set(tried[: 1 + attention.CPU_TIMING_RUNS]) == {2}
    assert not cpu_trials[not may_round].choices()
    (key,) = autotuner.choices()
    assert key == "attention cpu bfloat16 128x128, head dim 16" + ", may round" * may_round
    assert [is_key_for(key, q.device, may_round=flag) for flag in (may_round, not may_round)] == [True, False]


def test_float32_on_a_cpu_is_torchs_where_nothing_else_computes_it(cpu_trials: list[AttentionAutotuner]) -> None:
    q, k, v, _ = inputs()
    assert torch.equal(attend(q, k, v), F.scaled_dot_product_attention(q, k, v, scale=1.0))
    assert list(cpu_trials[False].choices().values()) == ["torch's choice"]


def refuses_long_queries(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    if q.shape[2] > 100:
        raise RuntimeError("no engine configuration")
    return torch_sdpa(q, k, v, bias)


def test_torch_computes_a_later_length_that_the_choice_refuses() -> None:
    timer = FakeTimer(picky=1.0)
    autotuner = AttentionAutotuner([timer.candidate("picky", refuses_long_queries)], timer)
    assert torch.equal(autotuner.run(*inputs(70)), torch_sdpa(*inputs(70)))
    with pytest.warns(KadrWarning, match="picky.*does not compute 120 queries and 70 keys: RuntimeError: no engine"):
        assert torch.equal(autotuner.run(*inputs(120)), torch_sdpa(*inputs(120)))
    timer.running = ""
    autotuner.run(*inputs(120))  # is not tried again, and said once
    assert timer.running == ""
    autotuner.run(*inputs(70))  # an earlier length keeps its kernel, so its video can be repeated
    assert timer.running == "picky"
    assert list(autotuner.choices().values()) == ["picky"]


def test_memory_that_runs_out_at_a_later_length_changes_no_choice() -> None:
    def runs_out(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        if q.shape[2] > 100:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch_sdpa(q, k, v, bias)

    timer = FakeTimer(large=1.0)
    autotuner = AttentionAutotuner([timer.candidate("large", runs_out)], timer)
    autotuner.run(*inputs(70))
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            autotuner.run(*inputs(120))


def test_candidates_are_timed_on_the_device_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Events that are recorded on another device than the work's measure the launch alone."""
    current = [0]

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.device = None

        def record(self) -> None:
            self.device = current[-1]

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end: Any) -> float:
            assert self.device == end.device == 1
            return 1.0

    @contextmanager
    def use_device(device: torch.device) -> Iterator[None]:
        current.append(device.index)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", use_device)
    autotuner = attention.autotuner_for.__wrapped__(torch.device("cuda", 1))
    assert autotuner.measure_seconds(lambda: None) == pytest.approx(1e-3 / 20)  # 20 runs in TIMING_SECONDS
    assert current == [0]


def test_amd_gpus_are_not_taken_for_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """gfx90a and gfx942 have the first number of Hopper, which flash attention 3 is for."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for hip, has_it in ((None, True), ("6.4", False)):
        monkeypatch.setattr(torch.version, "hip", hip)
        candidates = attention.autotuner_for.__wrapped__(torch.device("cuda", 0)).candidates
        assert ("flash 3" in [candidate.name for candidate in candidates]) is has_it
