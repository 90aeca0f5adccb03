"""Runs contenders in turns and measures them.

The speed of a machine drifts: other programs, heat, fragmented memory. So runs of different times are never compared.
In each round every contender runs once, each round begins with another one, and a ratio between two contenders is the
median of the ratios within each round.
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

MIN_TIMED_SECONDS = 0.2  # a task that takes less is repeated within a round, and its time is the mean
MAX_REPEATS = 100
Task = Callable[[], Any]
Clock = Callable[[Task], float]  # seconds that a task takes
PeakMemory = Callable[[Task], "int | None"]  # peak bytes of a task above what was in use before; None: unknown


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One implementation of a task.

    Args:
        run: does the task and returns its result, which is compared with the reference; or None, to compare nothing.
        dtype: dtype it computes in.
        products: dtype of its matrix products, where that is another: int8 where weights and activations are.
        weight_bytes: bytes of its weights in memory.
        note: what a reader of its figures must know.
        is_kadr: kadr itself. Its failure is an error; the failure of another contender only costs its figures.
        is_yardstick: a known amount of work that gives the machine's rate; not ranked among the contenders.
        is_peak: a yardstick that nothing on this machine exceeds.
        yardstick_flops: FLOPs of a yardstick's run.
        measure_peak: measures its memory, where it runs in a process of its own.
        time_runs: runs it so many times and returns the seconds of one, where it runs in a process of its own.
    """

    name: str
    run: Task
    dtype: str
    weight_bytes: int | None = None
    note: str = ""
    is_kadr: bool = False
    is_yardstick: bool = False
    is_peak: bool = False
    yardstick_flops: int = 0
    products: str = ""
    measure_peak: PeakMemory | None = None
    time_runs: Callable[[int], float] | None = None

    @property
    def arithmetic(self) -> str:
        """Dtype of its matrix products."""
        return self.products or self.dtype


@dataclass(frozen=True)
class SkippedContender:
    """A contender that does not run, and the reason."""

    name: str
    reason: str


@dataclass
class Measurement:
    """Figures of a contender.

    Args:
        repeats: runs in each round.
        seconds: seconds of one run, for each round.
        peak_bytes: peak memory above what was in use before.
        error: relative error against the reference.
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
        """Seconds between the first and third quartiles."""
        return interquartile_range(self.seconds)

    def ratio(self, other: Measurement) -> float:
        """Returns the time as a multiple of another contender's: the median of the ratios within each round."""
        return statistics.median(mine / theirs for mine, theirs in zip(self.seconds, other.seconds, strict=True))


def interquartile_range(values: Sequence[float]) -> float:
    """Returns the distance between the first and third quartiles; 0 for a single value."""
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
    """Runs contenders in turns.

    Args:
        warm_ups: runs of each before the first round. They are not timed; the result of the last is compared.

    Returns:
        The measurements, in the order of `contenders`, and the contenders that failed.
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
        for measurement in round_order(ready, number):
            measurement.seconds.append(_time_runs(measurement.contender, measurement.repeats, clock))
    for measurement in ready:  # in a run of its own: measuring memory takes time
        if not measurement.contender.is_yardstick:
            measurement.peak_bytes = (measurement.contender.measure_peak or peak)(measurement.contender.run)
    return ready, failed


def _warm_up(contender: Contender, warm_ups: int, clock: Clock, reference: Tensor | None) -> Measurement:
    for _ in range(warm_ups - 1):
        contender.run()
    results: list[Any] = []
    seconds = clock(lambda: results.append(contender.run()))
    if contender.time_runs:  # what the clock read includes moving the result between processes
        seconds = contender.time_runs(1)
    result = results.pop()
    is_short = 0 < seconds < MIN_TIMED_SECONDS
    repeats = min(MAX_REPEATS, math.ceil(MIN_TIMED_SECONDS / seconds)) if is_short else 1
    measurement = Measurement(contender, repeats=repeats)
    if reference is not None and isinstance(result, Tensor) and not contender.is_yardstick:
        measurement.error = relative_error(result, reference)
    return measurement


def _time_runs(contender: Contender, repeats: int, clock: Clock) -> float:
    """Returns the mean seconds of a run."""
    if contender.time_runs:
        return contender.time_runs(repeats)
    return clock(partial(run_repeatedly, contender.run, repeats)) / repeats


def run_repeatedly(task: Task, repeats: int) -> None:
    for _ in range(repeats):
        task()


def round_order(measurements: Sequence[Measurement], round_index: int) -> list[Measurement]:
    """Returns the order of a round. Each round starts one contender later than the one before."""
    start = round_index % len(measurements) if measurements else 0
    return [*measurements[start:], *measurements[:start]]


def relative_error(result: Tensor, reference: Tensor) -> float:
    """Returns ||result - reference|| / ||reference||, in float64, on the CPU.

    Raises:
        ValueError: the shapes differ.
    """
    if result.shape != reference.shape:
        raise ValueError(f"the result has the shape {tuple(result.shape)}, the reference {tuple(reference.shape)}")
    squared_error = squared_norm = 0.0
    for rows, expected in zip(result.flatten(0, -2).split(1024), reference.flatten(0, -2).split(1024), strict=True):
        expected = expected.double().cpu()
        squared_error += float((rows.cpu().double() - expected).square().sum())
        squared_norm += float(expected.square().sum())
    return (squared_error / squared_norm) ** 0.5 if squared_norm else float(squared_error > 0)


def error_line(error: BaseException) -> str:
    """Returns an exception in one line."""
    return f"{type(error).__name__}: {error}".strip().partition("\n")[0][:300]


def clock_for(device: torch.device) -> Clock:
    return cuda_clock if device.type == "cuda" else host_clock


def host_clock(task: Task) -> float:
    began = time.perf_counter()
    task()
    return time.perf_counter() - began


def cuda_clock(task: Task) -> float:
    """Returns the seconds between two events on the device, so without host work before and after the kernels."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    task()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 1000
