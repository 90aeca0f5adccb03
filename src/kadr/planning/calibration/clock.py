"""Times a piece of work: the fastest of a few runs, in little time."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from kadr.cancellation import check_cancelled
from kadr.kernels.cpu.malloc import retain_freed_memory

Task = Callable[[], object]
MIN_RUNS, MAX_RUNS, SECONDS_PER_TASK = 2, 20, 0.2


@dataclass(frozen=True)
class Clock:
    """Times tasks on a device.

    Args:
        device: its queue is empty before and after a task.
    """

    device: torch.device

    def once(self, task: Task) -> float:
        """Returns the seconds of one run.

        Raises:
            Cancelled: the work is cancelled; looked at before the run.
        """
        check_cancelled()
        self._synchronize()
        start = time.perf_counter()
        task()
        self._synchronize()
        return time.perf_counter() - start

    def fastest(self, task: Task, *, warm_up: bool = True) -> float:
        """Returns the seconds of the fastest of at least `MIN_RUNS` runs, besides a first one that warms up.

        Freed memory is reused by the next run, as it is by the next step or chunk of a model.
        """
        with retain_freed_memory():
            if warm_up:
                self.once(task)
            times = [self.once(task) for _ in range(MIN_RUNS)]
            while sum(times) < SECONDS_PER_TASK and len(times) < MAX_RUNS:
                times.append(self.once(task))
        return min(times)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()
