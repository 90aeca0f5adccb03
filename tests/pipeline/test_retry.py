"""A stage that runs out of memory is retried once, with a smaller placement."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from kadr.errors import KadrWarning, PlanError
from kadr.pipeline.notices import Notices
from kadr.pipeline.retry import retry_frames_on_oom, retry_on_oom
from kadr.planning.placement import Placement
from kadr.planning.plan import Plan, StagePlan

OOM_MESSAGE = (
    "[enforce fail at alloc_cpu.cpp] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
)


class FakeModules:
    """The attributes of `Components` that a retry uses; its plan has placements of 9 GB, 8 GB and so on."""

    def __init__(self, num_placements: int) -> None:
        best, *fallbacks = [
            Placement(dtype="float32", private_bytes=(9 - n) * 10**9, reason=f"placement {n}")
            for n in range(num_placements)
        ]
        stage = StagePlan(stage="denoise", component="transformer", placement=best, fallbacks=tuple(fallbacks))
        self.plan = Plan(device="cpu", base_bytes=0, free_bytes=10**10, stages=(stage,))
        self.module_cache, self.clear_count = self, 0
        self.notices = Notices()

    def clear(self) -> None:
        self.clear_count += 1

    def apply_plan(self, plan: Plan) -> None:
        self.plan = plan


class FailingStage:
    """A stage that runs out of memory a number of times, each time after some frames."""

    def __init__(self, times: int, after: int = 0, error: BaseException | None = None) -> None:
        self.failures_left, self.after, self.error = times, after, error or RuntimeError(OOM_MESSAGE)

    def __call__(self, dtype: torch.dtype | None) -> str:
        list(self.frames(dtype))
        return f"done in {dtype}"

    def frames(self, dtype: torch.dtype | None) -> Iterator[torch.Tensor]:
        is_failing, self.failures_left = self.failures_left > 0, self.failures_left - 1
        for number in range(6):
            if is_failing and number == self.after:
                raise self.error
            yield torch.tensor([2 * number, 2 * number + 1])


def test_next_placement_is_used_with_a_notice() -> None:
    modules: Any = FakeModules(3)
    with pytest.warns(KadrWarning, match=r"denoise ran out of memory .* 9\.0 GB; retrying with 8\.0 GB: placement 1"):
        assert retry_on_oom(modules, "denoise", FailingStage(1))(torch.float32) == "done in torch.float32"
    assert modules.plan.stage("denoise").placement.reason == "placement 1"
    assert modules.clear_count == 1
    (notice,) = modules.notices.messages
    assert notice.startswith("denoise ran out of memory")


def test_each_out_of_memory_takes_the_next_placement() -> None:
    modules: Any = FakeModules(3)
    with pytest.warns(KadrWarning):
        assert retry_on_oom(modules, "denoise", FailingStage(2))(None) == "done in None"
    assert modules.plan.stage("denoise").placement.reason == "placement 2"
    assert len(modules.notices.messages) == 2


def run_stage(modules: Any) -> object:
    return retry_on_oom(modules, "denoise", FailingStage(9))(None)


def run_frames_stage(modules: Any) -> object:
    return list(retry_frames_on_oom(modules, "denoise", FailingStage(9, 1).frames)(None))


@pytest.mark.parametrize("run", [run_stage, run_frames_stage])
def test_last_placement_out_of_memory_is_a_plan_error(run: Callable[[Any], object]) -> None:
    """Torch's own error does not escape, however often a stage runs out of memory."""
    with pytest.warns(KadrWarning), pytest.raises(PlanError, match="has no placement that takes less"):
        run(FakeModules(2))


def test_without_smaller_placement_a_plan_error_says_so() -> None:
    modules: Any = FakeModules(1)
    with pytest.raises(PlanError, match=r"denoise ran out of memory in spite of the plan .*smaller size") as raised:
        retry_on_oom(modules, "denoise", FailingStage(1))(None)
    assert isinstance(raised.value.__cause__, RuntimeError)


def test_other_errors_are_not_retried() -> None:
    modules: Any = FakeModules(3)
    with pytest.raises(RuntimeError, match="shapes"):
        retry_on_oom(modules, "denoise", FailingStage(1, error=RuntimeError("shapes do not match")))(None)
    assert modules.clear_count == 0


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("after", [0, 1, 5])
def test_no_frame_is_yielded_twice(after: int, times: int) -> None:
    modules: Any = FakeModules(3)
    with pytest.warns(KadrWarning):
        frames = torch.cat(list(retry_frames_on_oom(modules, "denoise", FailingStage(times, after).frames)(None)))
    assert frames.tolist() == list(range(12))
