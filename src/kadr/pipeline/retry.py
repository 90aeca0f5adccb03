"""A stage that ran out of memory in spite of the plan: the next way down is taken, once, and said."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from kadr.errors import KadrWarning, NonFiniteError, PlanError
from kadr.pipeline.components import Components
from kadr.pipeline.finite_check import NonFiniteFound
from kadr.planning.plan import format_bytes

T = TypeVar("T")
StageFunction = Callable[["torch.dtype | None"], T]  # a stage: None as it is planned, or in another dtype than that
_OOM_MESSAGES = ("can't allocate memory", "not enough memory", "out of memory")  # by torch, on a CPU or on Apple's GPUs


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OOM_MESSAGES)


def retry_on_oom(components: Components, stage: str, stage_function: StageFunction[T]) -> StageFunction[T]:
    """A stage that is done again in the next way of the plan if it runs out of memory."""

    def attempt(dtype: torch.dtype | None) -> T:
        try:
            return stage_function(dtype)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            down = _prepare_fallback(components, stage, error)
        # Outside of the handler: the error holds on to what the first run had in memory.
        down()
        return stage_function(dtype)

    return attempt


def retry_frames_on_oom(
    components: Components, stage: str, stage_function: StageFunction[Iterator[Tensor]]
) -> StageFunction[Iterator[Tensor]]:
    """As `retry_on_oom`, for a stage that hands on frames (n, ...) as they come. None is handed on twice."""

    def attempt(dtype: torch.dtype | None) -> Iterator[Tensor]:
        handed = 0
        try:
            for frames in stage_function(dtype):
                handed += len(frames)
                yield frames
            return
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            down = _prepare_fallback(components, stage, error)
        down()
        for frames in stage_function(dtype):
            known = min(handed, len(frames))
            handed -= known
            if known < len(frames):
                yield frames[known:]

    return attempt


def _prepare_fallback(components: Components, stage: str, error: BaseException) -> Callable[[], None]:
    """What changes the plan to the next way.

    Raises:
        PlanError: there is none.
    """
    plan = components.plan
    lower = None if plan is None else plan.with_fallback(stage)
    if plan is None or lower is None:
        raise PlanError(
            f"{stage} ran out of memory in spite of the plan ({_first_line(error)}), and no way of doing it takes "
            "less. Close other programs, or ask for less: a smaller --size or fewer --frames.",
            shortfall=0,
        ) from error
    choice = lower.stage(stage).placement
    told = (
        f"{stage} ran out of memory in spite of the plan, which had {format_bytes(plan.stage(stage).placement.device_bytes)} for it; "
        f"doing it again with {format_bytes(choice.device_bytes)}{f': {choice.reason}' if choice.reason else ''}."
    )

    def down() -> None:
        warnings.warn(told, KadrWarning, stacklevel=3)
        components.module_cache.clear()
        components.apply_plan(lower)

    return down


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


def retry_in_fp32(stage: str, dtype: torch.dtype, stage_function: StageFunction[T]) -> T:
    """What a stage comes to; done again in float32 where it gave NaN or infinity in a narrower dtype.

    Args:
        dtype: that the stage is planned in.
        stage_function: the stage. Raises `NonFiniteFound`; keeps no module when it does.

    Raises:
        NonFiniteError: it was float32, or fails in float32 too.
    """
    try:
        return stage_function(None)
    except NonFiniteFound as found:
        _warn_retry(stage, found.location, dtype)
    # Outside of the handler: the exception holds on to what the first run had in memory.
    try:
        return stage_function(torch.float32)
    except NonFiniteFound as found:
        raise _non_finite_error(stage, found.location) from None


def retry_frames_in_fp32(
    stage: str, dtype: torch.dtype, stage_function: StageFunction[Iterator[Tensor]]
) -> Iterator[Tensor]:
    """As `retry_in_fp32`, for a stage that hands on frames (n, ...) as they come. None is handed on twice."""
    handed = 0
    try:
        for frames in stage_function(None):
            handed += len(frames)
            yield frames
        return
    except NonFiniteFound as found:
        _warn_retry(stage, found.location, dtype)
    try:
        yield from skip_frames(handed, stage_function(torch.float32))
    except NonFiniteFound as found:
        raise _non_finite_error(stage, found.location) from None


def skip_frames(count: int, chunks: Iterator[Tensor]) -> Iterator[Tensor]:
    """Frames (n, ...) as they come, without the first `count`."""
    for frames in chunks:
        known = min(count, len(frames))
        count -= known
        if known < len(frames):
            yield frames[known:]


def _warn_retry(stage: str, location: str, dtype: torch.dtype) -> None:
    if dtype == torch.float32:
        raise _non_finite_error(stage, location) from None
    warnings.warn(
        f"{stage} gave numbers that are not finite at {location} in {str(dtype).removeprefix('torch.')}; doing it again "
        "in float32, which is slower and takes more memory.",
        KadrWarning,
        stacklevel=4,
    )


def _non_finite_error(stage: str, location: str) -> NonFiniteError:
    return NonFiniteError(
        f"{stage} gave numbers that are not finite at {location}, in float32. The weights are damaged, or what was given "
        "is: `kadr models verify` compares released files with what they should be; download others again. Where LoRAs "
        "are given, give less of them.",
        stage=stage,
    )
