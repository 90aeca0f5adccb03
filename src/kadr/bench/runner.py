"""Contenders run in turns, and what is noted of them.

The speed of a machine drifts: other programs, heat, memory in pieces. So nothing here compares runs of different
times. In each round every contender runs once, each round begins with another one, and who is how much slower than
whom is the median of what the rounds say.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

LEAST = 0.2  # seconds: what takes less is run several times in a row, and its time is a share of theirs
MOST = 100  # times
Run = Callable[[], Any]
Clock = Callable[[Run], float]  # seconds that a run takes
Peak = Callable[[Run], "int | None"]  # bytes that it takes at most besides what was there before; None: unknown


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One way to do a piece of work.

    Args:
        run: does it all, and gives the result, which is compared with the reference; None where there is nothing to
            compare.
        dtype: that it computes in.
        weight_bytes: bytes of them.
        note: what a reader of its figures has to know.
        own: kadr's; what goes wrong in it is an error, and in others a figure that is missing.
        yardstick: not one of those compared: what it does is known, and so the machine's rate.
        peak: how its memory is told, where it runs in a process of its own.
    """

    name: str
    run: Run
    dtype: str
    weights: int | None = None
    note: str = ""
    own: bool = False
    yardstick: bool = False
    peak: Peak | None = None


@dataclass(frozen=True)
class Absent:
    """A contender that does not run, and why."""

    name: str
    reason: str


@dataclass
class Measured:
    """What was noted of a contender.

    Args:
        times: how often it runs in each round.
        seconds: of one run, for each round.
        peak_bytes: bytes, at most, besides what was there before.
        error: against the reference.
    """

    contender: Contender
    times: int = 1
    seconds: list[float] = field(default_factory=list)
    peak: int | None = None
    error: float | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Seconds between the quartiles."""
        return spread(self.seconds)

    def ratio(self, other: Measured) -> float:
        """How many times as long this one takes: the median of the rounds, each compared with itself."""
        return statistics.median(mine / theirs for mine, theirs in zip(self.seconds, other.seconds, strict=True))


def spread(values: Sequence[float]) -> float:
    """The distance between the quartiles; 0 of one value."""
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return high - low


def measure(
    contenders: Sequence[Contender],
    *,
    rounds: int,
    warm_ups: int,
    clock: Clock,
    peak: Peak,
    reference: Tensor | None = None,
) -> tuple[list[Measured], list[Absent]]:
    """Run them in turns.

    Args:
        warm_ups: runs of each before the first round, which do not count; the result of the last is compared.

    Returns:
        What was noted, in the order given, and those that failed.
    """
    ready, failed = [], []
    for contender in contenders:
        try:
            ready.append(_warmed(contender, max(1, warm_ups), clock, reference))
        except Exception as error:
            if contender.own:
                raise
            failed.append(Absent(contender.name, f"failed: {told(error)}"))
    for number in range(rounds):
        for measured in rotated(ready, number):
            measured.seconds.append(clock(partial(_times, measured)) / measured.times)
    for measured in ready:  # in a run of its own: what tells the memory takes time
        if not measured.contender.yardstick:
            measured.peak = (measured.contender.peak or peak)(measured.contender.run)
    return ready, failed


def _warmed(contender: Contender, warm_ups: int, clock: Clock, reference: Tensor | None) -> Measured:
    for _ in range(warm_ups - 1):
        contender.run()
    kept: list[Any] = []
    spent = clock(lambda: kept.append(contender.run()))
    result = kept.pop()
    measured = Measured(contender, times=min(MOST, math.ceil(LEAST / spent)) if 0 < spent < LEAST else 1)
    if reference is not None and isinstance(result, Tensor) and not contender.yardstick:
        measured.error = relative(result, reference)
    return measured


def _times(measured: Measured) -> None:
    for _ in range(measured.times):
        measured.contender.run()


def rotated(ready: Sequence[Measured], number: int) -> list[Measured]:
    """The order of a round: each begins with the one after the first of the round before."""
    start = number % len(ready) if ready else 0
    return [*ready[start:], *ready[:start]]


def relative(result: Tensor, reference: Tensor) -> float:
    """||result - reference|| / ||reference||, in float64, on the CPU.

    Raises:
        ValueError: the shapes differ.
    """
    if result.shape != reference.shape:
        raise ValueError(f"the result has the shape {tuple(result.shape)}, the reference {tuple(reference.shape)}")
    off = whole = 0.0
    for mine, right in zip(result.flatten(0, -2).split(1024), reference.flatten(0, -2).split(1024), strict=True):
        right = right.double().cpu()
        off += float((mine.double().cpu() - right).square().sum())
        whole += float(right.square().sum())
    return (off / whole) ** 0.5 if whole else float(off > 0)


def told(error: BaseException) -> str:
    """In one line."""
    return f"{type(error).__name__}: {error}".strip().partition("\n")[0][:300]


def host_clock(run: Run) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def cuda_clock(run: Run) -> float:
    """By events on the device: what the host does before the first kernel and after the last is not in it."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 1000
