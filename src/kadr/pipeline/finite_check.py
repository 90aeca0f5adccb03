"""Numbers that stopped being numbers: found at the step where it happened, and the stage is done again in float32.

bfloat16 runs out of digits, not of range, but what it rounds away can still end in a division by nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Answer = Callable[[], bool]


class NotFinite(Exception):
    """Found by `Watchman`, and for this module alone: it becomes a `NonFiniteError` or a warning.

    Args:
        place: such as "step 3 of 8".
    """

    def __init__(self, place: str) -> None:
        super().__init__(place)
        self.place = place


class Watchman:
    """Looks whether numbers are finite, and lets nobody wait for the answer.

    On a GPU the answer comes while the next step is computed, and is asked for at the next look: work stays queued all
    the time. On other devices there is nothing to wait for.

    Args:
        send: starts an answer, a bool on the device, on its way to the host; what it returns waits for it.
    """

    def __init__(self, send: Callable[[Tensor], Answer] | None = None) -> None:
        self._send = send
        self._open: tuple[str, Answer] | None = None

    @classmethod
    def on(cls, device: torch.device) -> Watchman:
        return cls(_sent if device.type == "cuda" else None)

    def look(self, x: Tensor, place: str) -> None:
        """Look at x, of any shape, which `place` names.

        Raises:
            NotFinite: it, or what was looked at before, holds NaN or infinity.
        """
        answer = is_finite(x)
        if self._send is not None:
            answered = self._send(answer)
            self.settle()
            self._open = place, answered
        elif not answer:
            raise NotFinite(place)

    def settle(self) -> None:
        """Wait for the last answer. To be called at the end of a stage, and before anything is handed on.

        Raises:
            NotFinite: as `look`.
        """
        if self._open is not None:
            (place, answered), self._open = self._open, None
            if not answered():
                raise NotFinite(place)


def is_finite(x: Tensor) -> Tensor:
    """Whether all numbers are finite: one bool, on the device."""
    if x.device.type == "mps":  # whose extremes pass over NaN
        return torch.isfinite(x).all()
    # One pass and no copies, where isfinite makes three: both extremes are NaN if anything is.
    return torch.isfinite(torch.stack(torch.aminmax(x))).all()


def _sent(answer: Tensor) -> Answer:
    """An answer on its way from a GPU."""
    host = torch.empty((), dtype=torch.bool, pin_memory=True)
    host.copy_(answer, non_blocking=True)
    there = torch.cuda.Event()
    there.record(torch.cuda.current_stream(answer.device))

    def answered() -> bool:
        there.synchronize()
        return bool(host)

    return answered
