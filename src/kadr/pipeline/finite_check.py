"""NaN/inf check of every step and chunk; a stage that fails it is retried in float32 by `pipeline.retry`.

bfloat16 runs out of digits, not of range, but a value that it rounds to 0 can still become a divisor.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kadr.memory.host_copies import start_copy

PendingFlag = Callable[[], bool]


class NonFiniteFound(Exception):
    """Raised by `FiniteCheck` and handled by `pipeline.retry`, which turns it into a warning or a `NonFiniteError`.

    Args:
        location: where NaN or infinity appeared, such as "step 3 of 8".
    """

    def __init__(self, location: str) -> None:
        super().__init__(location)
        self.location = location


class FiniteCheck:
    """Asynchronous NaN/inf check: each result is read at the next check.

    So on a GPU the next step is already queued while the result is on its way to the host. On other devices the result
    is read at once.

    Args:
        copy_to_host: starts the copy of a bool from the device to the host; returns a function that waits for it.
    """

    def __init__(self, copy_to_host: Callable[[Tensor], PendingFlag] | None = None) -> None:
        self._copy_to_host = copy_to_host
        self._pending: tuple[str, PendingFlag] | None = None

    @classmethod
    def for_device(cls, device: torch.device) -> FiniteCheck:
        """Creates the check for a device: asynchronous on CUDA, immediate elsewhere."""
        return cls(_copy_flag_to_host if device.type == "cuda" else None)

    def check(self, x: Tensor, location: str) -> None:
        """Checks x, of any shape; `location` names it in the error.

        Raises:
            NonFiniteFound: x, or the tensor checked before it, has NaN or infinity.
        """
        flag = is_finite(x)
        if self._copy_to_host is not None:
            read_flag = self._copy_to_host(flag)
            self.synchronize()
            self._pending = location, read_flag
        elif not flag:
            raise NonFiniteFound(location)

    def synchronize(self) -> None:
        """Waits for the last check. Call it at the end of a stage, and before passing frames on.

        Raises:
            NonFiniteFound: the last tensor checked has NaN or infinity.
        """
        if self._pending is not None:
            (location, read_flag), self._pending = self._pending, None
            if not read_flag():
                raise NonFiniteFound(location)


def is_finite(x: Tensor) -> Tensor:
    """Returns whether all numbers are finite: one bool, on the device."""
    if x.device.type == "mps":  # where aminmax ignores NaN
        return torch.isfinite(x).all()
    # One pass without copies, where isfinite makes three: minimum and maximum are NaN if any number is.
    return torch.isfinite(torch.stack(torch.aminmax(x))).all()


def _copy_flag_to_host(flag: Tensor) -> PendingFlag:
    """Starts the copy of a flag from a GPU; the function returned waits for it."""
    finish_copy = start_copy(flag)
    return lambda: bool(finish_copy())
