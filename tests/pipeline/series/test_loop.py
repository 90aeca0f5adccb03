"""The loop of a series: an error of one video does not stop the next, and any other stops all."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest
import torch

from kadr.cancellation import CancelToken, use_token
from kadr.errors import (
    Busy,
    Cancelled,
    CheckpointError,
    EnhanceError,
    KadrError,
    MediaError,
    NonFiniteError,
    PlanError,
    RequestError,
)
from kadr.pipeline.series.loop import concerns_one_video, run_series

ONE = (
    RequestError("x"),
    MediaError("x"),
    PlanError("x", shortfall=1),
    EnhanceError("x"),
    NonFiniteError("x", stage="decode"),
    MemoryError(),
    torch.OutOfMemoryError("x"),
)
ALL = (
    CheckpointError("x"),
    Cancelled("x"),
    Busy("x"),
    KadrError("x"),
    OSError(errno.EPIPE, "x"),
    ZeroDivisionError(),
    RuntimeError("CUDA error: an illegal memory access was encountered"),
)


@pytest.mark.parametrize("error", ONE, ids=lambda error: type(error).__name__)
def test_errors_of_one_video_do_not_stop_the_next(error: Exception) -> None:
    made, failures = [], []

    def make(number: int) -> None:
        if number == 2:
            raise error
        made.append(number)

    run_series([1, 2, 3], make, lambda number, reason: failures.append((number, reason)))
    assert (made, failures) == ([1, 3], [(2, error)])


@pytest.mark.parametrize("error", ALL, ids=lambda error: type(error).__name__)
def test_other_errors_stop_all(error: Exception) -> None:
    made = []

    def make(number: int) -> None:
        made.append(number)
        raise error

    with pytest.raises(type(error)):
        run_series([1, 2], make, lambda number, reason: pytest.fail("it concerns all"))
    assert made == [1]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_concerns_all(number: int) -> None:
    error = MediaError("x could not be written")
    error.__cause__ = OSError(number, "full")
    assert not concerns_one_video(error)
    error.__cause__ = OSError(errno.EACCES, "denied")
    assert concerns_one_video(error)


def test_items_are_taken_one_by_one() -> None:
    log = []

    def queue() -> Iterator[int]:
        for number in (1, 2):
            log.append(f"taken {number}")
            yield number

    run_series(queue(), lambda number: log.append(f"made {number}"), lambda number, reason: None)
    assert log == ["taken 1", "made 1", "taken 2", "made 2"]


def test_cancelled_token_starts_no_further_video() -> None:
    token, made = CancelToken(), []

    def make(number: int) -> None:
        made.append(number)
        token.cancel()

    with use_token(token), pytest.raises(Cancelled):
        run_series([1, 2], make, lambda number, reason: None)
    assert made == [1]
