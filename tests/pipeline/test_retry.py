"""Memory that ran out in spite of the plan."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from kadr.errors import KadrWarning, PlanError
from kadr.pipeline.retry import is_out_of_memory, retry_frames_on_oom, retry_on_oom
from kadr.planning.plan import Placement, Plan, StagePlan

SAID = "[enforce fail at alloc_cpu.cpp] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."


class Parts:
    """What a rescue asks of components."""

    def __init__(self, ways: int) -> None:
        best, *rest = [
            Placement(dtype="float32", private_bytes=(9 - n) * 10**9, reason=f"way {n}") for n in range(ways)
        ]
        stage = StagePlan(stage="denoise", component="transformer", placement=best, fallbacks=tuple(rest))
        self.plan = Plan(device="cpu", base_bytes=0, free_bytes=10**10, stages=(stage,))
        self.shelf, self.cleared = self, 0

    def clear(self) -> None:
        self.cleared += 1

    def follow(self, plan: Plan) -> None:
        self.plan = plan


class Failing:
    """Runs out of memory so many times, each time after some frames."""

    def __init__(self, times: int, after: int = 0, error: BaseException | None = None) -> None:
        self.left, self.after, self.error = times, after, error or RuntimeError(SAID)

    def __call__(self, dtype: torch.dtype | None) -> str:
        list(self.frames(dtype))
        return f"done in {dtype}"

    def frames(self, dtype: torch.dtype | None) -> Iterator[torch.Tensor]:
        failing, self.left = self.left > 0, self.left - 1
        for number in range(6):
            if failing and number == self.after:
                raise self.error
            yield torch.tensor([2 * number, 2 * number + 1])


@pytest.mark.parametrize(
    "error, is_one",
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError(SAID), True),
        (RuntimeError("MPS backend out of memory"), True),
        (RuntimeError("shapes do not match"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_errors_that_say_memory_ran_out_are_known(error: BaseException, is_one: bool) -> None:
    assert is_out_of_memory(error) is is_one


def test_the_next_way_is_taken_once_and_said() -> None:
    parts: Any = Parts(3)
    with pytest.warns(KadrWarning, match=r"denoise ran out of memory .* 9\.0 GB .* again with 8\.0 GB: way 1"):
        assert retry_on_oom(parts, "denoise", Failing(1))(torch.float32) == "done in torch.float32"
    assert parts.plan.of("denoise").choice.why == "way 1"
    assert parts.cleared == 1


def test_a_second_time_it_is_an_error() -> None:
    parts: Any = Parts(3)
    with pytest.warns(KadrWarning), pytest.raises(RuntimeError, match="can't allocate memory"):
        retry_on_oom(parts, "denoise", Failing(2))(None)


def test_without_another_way_it_says_so() -> None:
    parts: Any = Parts(1)
    with pytest.raises(PlanError, match=r"denoise ran out of memory in spite of the plan .*smaller --size") as said:
        retry_on_oom(parts, "denoise", Failing(1))(None)
    assert isinstance(said.value.__cause__, RuntimeError)


def test_other_errors_pass() -> None:
    parts: Any = Parts(3)
    with pytest.raises(RuntimeError, match="shapes"):
        retry_on_oom(parts, "denoise", Failing(1, error=RuntimeError("shapes do not match")))(None)
    assert parts.cleared == 0


@pytest.mark.parametrize("after", [0, 1, 5])
def test_no_frame_is_handed_on_twice(after: int) -> None:
    parts: Any = Parts(2)
    with pytest.warns(KadrWarning):
        frames = torch.cat(list(retry_frames_on_oom(parts, "denoise", Failing(1, after).frames)(None)))
    assert frames.tolist() == list(range(12))
