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

MIN_TIMED_SECONDS = 0.2  # seconds: what takes less is run several times in a row, and its time is a share of theirs
MAX_REPEATS = 100  # times
Task = Callable[[], Any]
Clock = Callable[[Task], float]  # seconds that a run takes
PeakMemory = Callable[[Task], "int | None"]  # bytes that it takes at most besides what was there before; None: unknown


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One way to do a piece of work.

    Args:
        run: does it all, and gives the result, which is compared with the reference; None where there is nothing to
            compare.
        dtype: that it computes in.
        weight_bytes: bytes of them.
        note: what a reader of its figures has to know.
        is_kadr: kadr's; what goes wrong in it is an error, and in others a figure that is missing.
        is_yardstick: not one of those compared: what it does is known, and so the machine's rate.
        measure_peak: how its memory is told, where it runs in a process of its own.
    """

    name: str
    run: Task
    dtype: str
    weight_bytes: int | None = None
    note: str = ""
    is_kadr: bool = False
    is_yardstick: bool = False
    measure_peak: PeakMemory | None = None


@dataclass(frozen=True)
class SkippedContender:
    """A contender that does not run, and why."""

    name: str
    reason: str


@dataclass
class Measurement:
    """What was noted of a contender.

    Args:
        repeats: how often it runs in each round.
        seconds: of one run, for each round.
        peak_bytes: bytes, at most, besides what was there before.
        error: against the reference.
    """

    contender: Contender
    repeats: int = 1
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    error: float | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def interquartile_range(self) -> float:
        """Seconds between the quartiles."""
        return interquartile_range(self.seconds)

    def ratio(self, other: Measurement) -> float:
        """How many times as long this one takes: the median of the rounds, each compared with itself."""
        return statistics.median(mine / theirs for mine, theirs in zip(self.seconds, other.seconds, strict=True))


def interquartile_range(values: Sequence[float]) -> float:
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
    peak: PeakMemory,
    reference: Tensor | None = None,
) -> tuple[list[Measurement], list[SkippedContender]]:
    """Run them in turns.

    Args:
        warm_ups: runs of each before the first round, which do not count; the result of the last is compared.

    Returns:
        What was noted, in the order given, and those that failed.
    """
    ready, failed = [], []
    for contender in contenders:
        try:
            ready.append(_warm_up(contender, max(1, warm_ups), clock, reference))
        except Exception as error:
            if contender.is_kadr:
                raise
            failed.append(SkippedContender(contender.name, f"failed: {error_line(error)}"))
    for number in range(rounds):
        for measured in round_order(ready, number):
            measured.seconds.append(clock(partial(_run_repeats, measured)) / measured.repeats)
    for measured in ready:  # in a run of its own: what tells the memory takes time
        if not measured.contender.is_yardstick:
            measured.peak_bytes = (measured.contender.measure_peak or peak)(measured.contender.run)
    return ready, failed


def _warm_up(contender: Contender, warm_ups: int, clock: Clock, reference: Tensor | None) -> Measurement:
    for _ in range(warm_ups - 1):
        contender.run()
    kept: list[Any] = []
    spent = clock(lambda: kept.append(contender.run()))
    result = kept.pop()
    measured = Measurement(
        contender,
        repeats=min(MAX_REPEATS, math.ceil(MIN_TIMED_SECONDS / spent)) if 0 < spent < MIN_TIMED_SECONDS else 1,
    )
    if reference is not None and isinstance(result, Tensor) and not contender.is_yardstick:
        measured.error = relative_error(result, reference)
    return measured


def _run_repeats(measurement: Measurement) -> None:
    for _ in range(measurement.repeats):
        measurement.contender.run()


def round_order(measurements: Sequence[Measurement], round_index: int) -> list[Measurement]:
    """The order of a round: each begins with the one after the first of the round before."""
    start = round_index % len(measurements) if measurements else 0
    return [*measurements[start:], *measurements[:start]]


def relative_error(result: Tensor, reference: Tensor) -> float:
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


def error_line(error: BaseException) -> str:
    """In one line."""
    return f"{type(error).__name__}: {error}".strip().partition("\n")[0][:300]


def host_clock(task: Task) -> float:
    began = time.perf_counter()
    task()
    return time.perf_counter() - began


def cuda_clock(task: Task) -> float:
    """By events on the device: what the host does before the first kernel and after the last is not in it."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    task()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 1000
