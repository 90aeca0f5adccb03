"""Numbers that stopped being numbers: found at the step where it happened, and the stage is done again in float32.

bfloat16 runs out of digits, not of range, but what it rounds away can still end in a division by nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

PendingFlag = Callable[[], bool]


class NonFiniteFound(Exception):
    """Found by `FiniteCheck`, and for this module alone: it becomes a `NonFiniteError` or a warning.

    Args:
        location: such as "step 3 of 8".
    """

    def __init__(self, location: str) -> None:
        super().__init__(location)
        self.location = location


class FiniteCheck:
    """Looks whether numbers are finite, and lets nobody wait for the answer.

    On a GPU the answer comes while the next step is computed, and is asked for at the next look: work stays queued all
    the time. On other devices there is nothing to wait for.

    Args:
        copy_to_host: starts an answer, a bool on the device, on its way to the host; what it returns waits for it.
    """

    def __init__(self, copy_to_host: Callable[[Tensor], PendingFlag] | None = None) -> None:
        self._copy_to_host = copy_to_host
        self._pending: tuple[str, PendingFlag] | None = None

    @classmethod
    def for_device(cls, device: torch.device) -> FiniteCheck:
        return cls(_copy_flag_to_host if device.type == "cuda" else None)

    def check(self, x: Tensor, location: str) -> None:
        """Look at x, of any shape, which `location` names.

        Raises:
            NotFinite: it, or what was looked at before, holds NaN or infinity.
        """
        answer = is_finite(x)
        if self._copy_to_host is not None:
            answered = self._copy_to_host(answer)
            self.synchronize()
            self._pending = location, answered
        elif not answer:
            raise NonFiniteFound(location)

    def synchronize(self) -> None:
        """Wait for the last answer. To be called at the end of a stage, and before anything is handed on.

        Raises:
            NotFinite: as `look`.
        """
        if self._pending is not None:
            (place, answered), self._pending = self._pending, None
            if not answered():
                raise NonFiniteFound(place)


def is_finite(x: Tensor) -> Tensor:
    """Whether all numbers are finite: one bool, on the device."""
    if x.device.type == "mps":  # whose extremes pass over NaN
        return torch.isfinite(x).all()
    # One pass and no copies, where isfinite makes three: both extremes are NaN if anything is.
    return torch.isfinite(torch.stack(torch.aminmax(x))).all()


def _copy_flag_to_host(flag: Tensor) -> PendingFlag:
    """An answer on its way from a GPU."""
    host = torch.empty((), dtype=torch.bool, pin_memory=True)
    host.copy_(flag, non_blocking=True)
    there = torch.cuda.Event()
    there.record(torch.cuda.current_stream(flag.device))

    def answered() -> bool:
        there.synchronize()
        return bool(host)

    return answered
