"""`BatchProgress`: how far a batch is, and how long the rest will take."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from kadr.batch.outcome import RowOutcome
from kadr.batch.row import BatchRow


@dataclass
class BatchProgress:
    """Counts of the rows of a batch, and an estimate from the work of those made in this run.

    Args:
        total, num_completed, num_failed: rows of the batch, and those of them that are finished.
        clock: monotonic seconds.

    Attributes:
        num_made: rows completed in this run.
    """

    total: int
    num_completed: int
    num_failed: int
    clock: Callable[[], float] = time.monotonic
    num_made: int = field(default=0, init=False)
    _work_left: float = field(default=0.0, init=False)
    _work_made: float = field(default=0.0, init=False)
    _began: float | None = field(default=None, init=False)
    _fractions: dict[int, tuple[float, float]] = field(default_factory=dict, init=False)  # row -> fraction, work

    @classmethod
    def of_outcomes(cls, outcomes: Collection[RowOutcome]) -> BatchProgress:
        """Returns the progress of a batch whose workers have not begun."""
        completed = sum(outcome.is_completed for outcome in outcomes)
        return cls(len(outcomes), completed, sum(outcome.is_failed for outcome in outcomes))

    @property
    def num_left(self) -> int:
        return self.total - self.num_completed - self.num_failed

    def begin(self, rows: Iterable[BatchRow]) -> None:
        """Takes the rows that are to be made, when the workers begin."""
        self._work_left = sum(row.work for row in rows)

    def advance(self, row: BatchRow, progress: Mapping[str, Any]) -> None:
        """Takes the progress of a row; see `Event` of kind "progress"."""
        if self._began is None:  # only now: opening the model says nothing of the rows after it
            self._began = self.clock()
        self._fractions[row.number] = progress.get("fraction", 0.0), row.work

    def finish(self, row: BatchRow, outcome: RowOutcome) -> None:
        """Takes the outcome of a row."""
        self._fractions.pop(row.number, None)
        self._work_left -= row.work
        if outcome.is_completed:
            self.num_made += 1
            self.num_completed += 1
            self._work_made += row.work
        else:
            self.num_failed += 1

    @property
    def seconds_left(self) -> float | None:
        """Estimated seconds until all rows are made; None before there is anything to estimate from."""
        begun = sum(fraction * work for fraction, work in self._fractions.values())
        if self._began is None or self._work_made + begun <= 0:
            return None
        rate = (self._work_made + begun) / max(self.clock() - self._began, 1e-3)
        return max(0.0, self._work_left - begun) / rate
