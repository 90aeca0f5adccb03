"""Numbers that stopped being numbers: found at the step where it happened, and the stage is done again in float32.

bfloat16 runs out of digits, not of range, but what it rounds away can still end in a division by nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from kadr.errors import KadrWarning, NonFiniteError

T = TypeVar("T")
Run = Callable[["torch.dtype | None"], T]  # a stage: None as it is planned, or in another dtype than that
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
