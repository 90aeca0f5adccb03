"""Retries a stage that ran out of memory in spite of its plan, or whose result has NaN or infinity.

Out of memory: the plan falls back to the stage's next smaller placement (`Plan.with_fallback`: streamed blocks, fewer
frames per chunk), all cached modules are freed, and the stage runs again, with a notice; and so on until no placement
is smaller, which is a `PlanError`. NaN or infinity: the stage runs once more in float32, with a notice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from kadr.errors import NonFiniteError, PlanError
from kadr.kernels.error_kinds import is_out_of_memory
from kadr.pipeline.finite_check import NonFiniteFound
from kadr.pipeline.modules import Modules
from kadr.planning.plan import format_bytes

T = TypeVar("T")
StageFunction = Callable[["torch.dtype | None"], T]  # a stage; None runs it in the dtype of its plan
FramesStageFunction = StageFunction[Iterator[Tensor]]  # a stage that yields frames (n, ...)


def retry_on_oom(modules: Modules, stage: str, stage_function: StageFunction[T]) -> StageFunction[T]:
    """Returns a stage function that retries with ever smaller placements if memory runs out."""

    def attempt(dtype: torch.dtype | None) -> T:
        while True:
            try:
                return stage_function(dtype)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                apply_fallback = _prepare_fallback(modules, stage, error)
            # Outside of the handler: the error keeps the attempt's tensors alive.
            apply_fallback()

    return attempt


def retry_frames_on_oom(modules: Modules, stage: str, stage_function: FramesStageFunction) -> FramesStageFunction:
    """Returns a stage function like `retry_on_oom`'s for a stage that yields frames (n, ...), none of them twice."""

    def attempt(dtype: torch.dtype | None) -> Iterator[Tensor]:
        num_yielded = 0
        while True:
            try:
                for frames in _skip_frames(num_yielded, stage_function(dtype)):
                    num_yielded += len(frames)
                    yield frames
                return
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                apply_fallback = _prepare_fallback(modules, stage, error)
            apply_fallback()

    return attempt


def _prepare_fallback(modules: Modules, stage: str, error: BaseException) -> Callable[[], None]:
    """Returns a function that notes it, frees cached modules and applies the plan with the stage's next placement.

    Raises:
        PlanError: there is no smaller placement.
    """
    fallback_plan = modules.plan.with_fallback(stage)
    if fallback_plan is None:
        raise PlanError(
            f"{stage} ran out of memory in spite of the plan ({_first_line(error)}), and has no placement that takes "
            "less. Close other programs, or request less: a smaller --size or fewer --frames.",
            shortfall=0,
        ) from error
    planned_bytes = modules.plan.stage(stage).placement.device_bytes
    fallback = fallback_plan.stage(stage).placement
    message = (
        f"{stage} ran out of memory in spite of the plan, which expected {format_bytes(planned_bytes)}; retrying with "
        f"{format_bytes(fallback.device_bytes)}{f': {fallback.reason}' if fallback.reason else ''}."
    )

    def apply_fallback() -> None:
        modules.notices.add(message)
        modules.module_cache.clear()
        modules.apply_plan(fallback_plan)

    return apply_fallback


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


def retry_in_fp32(modules: Modules, stage: str, stage_function: StageFunction[T]) -> T:
    """Returns a stage's result; runs it again in float32 if it has NaN or infinity in a narrower dtype.

    Args:
        stage_function: the stage. Raises `NonFiniteFound`, and then keeps no module.

    Raises:
        NonFiniteError: the stage was planned in float32, or fails in float32 too.
    """
    try:
        return stage_function(None)
    except NonFiniteFound as found:
        _note_retry(modules, stage, found.location)
    # Outside of the handler: the exception keeps the first attempt's tensors alive.
    try:
        return stage_function(torch.float32)
    except NonFiniteFound as found:
        raise _non_finite_error(stage, found.location) from None


def retry_frames_in_fp32(modules: Modules, stage: str, stage_function: FramesStageFunction) -> Iterator[Tensor]:
    """Yields frames (n, ...) of a stage, like `retry_in_fp32`; none is yielded twice."""
    num_yielded = 0
    try:
        for frames in stage_function(None):
            num_yielded += len(frames)
            yield frames
        return
    except NonFiniteFound as found:
        _note_retry(modules, stage, found.location)
    try:
        yield from _skip_frames(num_yielded, stage_function(torch.float32))
    except NonFiniteFound as found:
        raise _non_finite_error(stage, found.location) from None


def _skip_frames(count: int, chunks: Iterator[Tensor]) -> Iterator[Tensor]:
    """Yields chunks of frames (n, ...) without the first `count` frames."""
    for frames in chunks:
        num_skipped = min(count, len(frames))
        count -= num_skipped
        if num_skipped < len(frames):
            yield frames[num_skipped:]


def _note_retry(modules: Modules, stage: str, location: str) -> None:
    dtype = modules.stage_dtype(stage)
    if dtype == torch.float32:
        raise _non_finite_error(stage, location) from None
    modules.notices.add(
        f"{stage} produced NaN or infinity at {location} in {str(dtype).removeprefix('torch.')}; retrying in float32, "
        "which is slower and takes more memory."
    )


def _non_finite_error(stage: str, location: str) -> NonFiniteError:
    return NonFiniteError(
        f"{stage} produced NaN or infinity at {location}, in float32. The weights or the input are damaged: "
        "`kadr models verify` compares released files with their checksums; download others again. With LoRAs, lower "
        "their strength.",
        stage=stage,
    )
