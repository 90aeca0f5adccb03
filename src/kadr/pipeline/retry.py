"""A stage that ran out of memory in spite of the plan: the next way down is taken, once, and said."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from kadr.errors import KadrWarning, NonFiniteError, PlanError
from kadr.pipeline.components import Components
from kadr.pipeline.finite_check import NotFinite
from kadr.planning.plan import in_words

T = TypeVar("T")
Run = Callable[["torch.dtype | None"], T]  # a stage: None as it is planned, or in another dtype than that
_SAID = ("can't allocate memory", "not enough memory", "out of memory")  # by torch, on a CPU or on Apple's GPUs


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _SAID)


def rescued(components: Components, stage: str, run: Run[T]) -> Run[T]:
    """A stage that is done again in the next way of the plan if it runs out of memory."""

    def attempt(dtype: torch.dtype | None) -> T:
        try:
            return run(dtype)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            down = _step_down(components, stage, error)
        # Outside of the handler: the error holds on to what the first run had in memory.
        down()
        return run(dtype)

    return attempt


def rescued_frames(components: Components, stage: str, run: Run[Iterator[Tensor]]) -> Run[Iterator[Tensor]]:
    """As `rescued`, for a stage that hands on frames (n, ...) as they come. None is handed on twice."""

    def attempt(dtype: torch.dtype | None) -> Iterator[Tensor]:
        handed = 0
        try:
            for frames in run(dtype):
                handed += len(frames)
                yield frames
            return
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            down = _step_down(components, stage, error)
        down()
        for frames in run(dtype):
            known = min(handed, len(frames))
            handed -= known
            if known < len(frames):
                yield frames[known:]

    return attempt


def _step_down(components: Components, stage: str, error: BaseException) -> Callable[[], None]:
    """What changes the plan to the next way.

    Raises:
        PlanError: there is none.
    """
    plan = components.plan
    lower = None if plan is None else plan.lower(stage)
    if plan is None or lower is None:
        raise PlanError(
            f"{stage} ran out of memory in spite of the plan ({_first_line(error)}), and no way of doing it takes "
            "less. Close other programs, or ask for less: a smaller --size or fewer --frames.",
            shortfall=0,
        ) from error
    choice = lower.of(stage).choice
    told = (
        f"{stage} ran out of memory in spite of the plan, which had {in_words(plan.of(stage).choice.bytes)} for it; "
        f"doing it again with {in_words(choice.bytes)}{f': {choice.why}' if choice.why else ''}."
    )

    def down() -> None:
        warnings.warn(told, KadrWarning, stacklevel=3)
        components.shelf.clear()
        components.follow(lower)

    return down


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


def guarded(stage: str, dtype: torch.dtype, run: Run[T]) -> T:
    """What a stage comes to; done again in float32 where it gave NaN or infinity in a narrower dtype.

    Args:
        dtype: that the stage is planned in.
        run: the stage. Raises `NotFinite`; keeps no module when it does.

    Raises:
        NonFiniteError: it was float32, or fails in float32 too.
    """
    try:
        return run(None)
    except NotFinite as found:
        _again(stage, found.place, dtype)
    # Outside of the handler: the exception holds on to what the first run had in memory.
    try:
        return run(torch.float32)
    except NotFinite as found:
        raise _failed(stage, found.place) from None


def guarded_frames(stage: str, dtype: torch.dtype, run: Run[Iterator[Tensor]]) -> Iterator[Tensor]:
    """As `guarded`, for a stage that hands on frames (n, ...) as they come. None is handed on twice."""
    handed = 0
    try:
        for frames in run(None):
            handed += len(frames)
            yield frames
        return
    except NotFinite as found:
        _again(stage, found.place, dtype)
    try:
        yield from after(handed, run(torch.float32))
    except NotFinite as found:
        raise _failed(stage, found.place) from None


def after(count: int, pieces: Iterator[Tensor]) -> Iterator[Tensor]:
    """Frames (n, ...) as they come, without the first `count`."""
    for frames in pieces:
        known = min(count, len(frames))
        count -= known
        if known < len(frames):
            yield frames[known:]


def _again(stage: str, place: str, dtype: torch.dtype) -> None:
    if dtype == torch.float32:
        raise _failed(stage, place) from None
    warnings.warn(
        f"{stage} gave numbers that are not finite at {place} in {str(dtype).removeprefix('torch.')}; doing it again "
        "in float32, which is slower and takes more memory.",
        KadrWarning,
        stacklevel=4,
    )


def _failed(stage: str, place: str) -> NonFiniteError:
    return NonFiniteError(
        f"{stage} gave numbers that are not finite at {place}, in float32. The weights are damaged, or what was given "
        "is: `kadr models verify` compares released files with what they should be; download others again. Where LoRAs "
        "are given, give less of them.",
        stage=stage,
    )
