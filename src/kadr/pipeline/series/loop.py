"""The loop over videos that are made one after another: the failure of one does not stop the next."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable
from typing import TypeVar

from kadr.cancellation import check_cancelled
from kadr.errors import EnhanceError, MediaError, NonFiniteError, PlanError, RequestError
from kadr.kernels.error_kinds import is_out_of_memory

T = TypeVar("T")
ERRORS_OF_ONE_VIDEO = (RequestError, MediaError, PlanError, EnhanceError, NonFiniteError)
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)


def run_series(items: Iterable[T], make: Callable[[T], object], on_failure: Callable[[T, Exception], object]) -> None:
    """Makes the video of each item, and goes on after a failure that concerns one video.

    Args:
        items: taken one by one, each when the video before is done; so they may come from a queue.
        make: makes the video of an item.
        on_failure: called with an item and the reason why its video was not made.

    Raises:
        Exception: one that the videos after it would meet too; see `concerns_one_video`.
    """
    for item in items:
        check_cancelled()
        try:
            make(item)
        except Exception as error:
            if not concerns_one_video(error):
                raise
            on_failure(item, error)


def concerns_one_video(error: Exception) -> bool:
    """Returns whether the next video may succeed: the request was refused, memory ran out, an endpoint failed.

    A damaged or missing model, a full disk, a cancellation and a bug concern all.
    """
    if isinstance(error, ERRORS_OF_ONE_VIDEO):
        cause = error.__cause__
        return not (isinstance(cause, OSError) and cause.errno in FULL_DISK)
    return is_out_of_memory(error)
