"""A batch on stderr: one bar over all rows on a terminal, a line for each finished row elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from kadr.cli.terminal.errors import MAX_ERROR_LINE, is_quiet, print_stderr
from kadr.pipeline.display.progress_lines import STAGE_LABELS, format_duration

if TYPE_CHECKING:
    from kadr.batch.outcome import RowOutcome
    from kadr.batch.progress import BatchProgress
    from kadr.batch.row import BatchRow
    from kadr.batch.run import BatchWatch

SECONDS_BETWEEN_STAGE_LINES = 30.0  # about a row that takes long, without a terminal
MAX_FAILURES_SHOWN = 100  # the manifest has all


@contextmanager
def watch_batch() -> Iterator[BatchWatch]:
    """Yields what shows a batch until the block ends."""
    if is_quiet() or not sys.stderr.isatty():
        yield LineWatch()
        return
    # Imported here, because rich takes as long to load as all of `kadr --help`.
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("rows"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[state]}"))
    with Bars(*columns, console=Console(stderr=True), redirect_stdout=False) as bars:
        yield _BarWatch(bars)


class LineWatch:
    """Prints a line for each row that is finished, and every half a minute about one that is made."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._last = clock, clock()
        self._failures = 0

    def show_progress(self, progress: BatchProgress, row: BatchRow | None, stage: Mapping[str, Any]) -> None:
        if row is not None and self._clock() - self._last >= SECONDS_BETWEEN_STAGE_LINES:
            self._last = self._clock()
            print_stderr(f"row {row.number}: {_stage(stage)}; {_counts(progress)}")

    def show_outcome(self, progress: BatchProgress, outcome: RowOutcome) -> None:
        if outcome.is_failed:
            self._show_failure(outcome)
        elif outcome.path is not None:
            self._last = self._clock()
            print_stderr(
                f"row {outcome.number}: {outcome.path} in {format_duration(outcome.seconds or 0)}; {_counts(progress)}"
            )

    def show_line(self, line: str) -> None:
        print_stderr(line, limit=MAX_ERROR_LINE)

    def _show_failure(self, outcome: RowOutcome) -> None:
        self._failures += 1
        if self._failures > MAX_FAILURES_SHOWN:
            return
        message = outcome.error.message if outcome.error else ""
        print_stderr(f"row {outcome.number} (line {outcome.line}) failed: {message}", limit=MAX_ERROR_LINE)
        if self._failures == MAX_FAILURES_SHOWN:
            print_stderr("further rows that fail are only in the manifest")


class _BarWatch(LineWatch):
    """Shows one bar for all rows; failures are lines above it.

    Args:
        bars: of rich.
    """

    def __init__(self, bars: Any) -> None:
        super().__init__()
        self._bars, self._task, self._stage = bars, bars.add_task("rows", total=None, state=""), ""

    def show_progress(self, progress: BatchProgress, row: BatchRow | None, stage: Mapping[str, Any]) -> None:
        if row is not None:
            self._stage = f"row {row.number}: {_stage(stage)}"
        state = "; ".join(filter(None, (_counts(progress), self._stage)))
        finished = progress.num_completed + progress.num_failed
        self._bars.update(self._task, completed=finished, total=progress.total, state=state)

    def show_outcome(self, progress: BatchProgress, outcome: RowOutcome) -> None:
        if outcome.is_failed:
            self._show_failure(outcome)
        self._stage = ""
        self.show_progress(progress, None, {})


def _counts(progress: BatchProgress) -> str:
    """Returns "3 done, 1 failed, 46 left, 1:02 to go"."""
    seconds = progress.seconds_left
    to_go = "" if seconds is None or not progress.num_left else f", {format_duration(seconds)} to go"
    return f"{progress.num_completed} done, {progress.num_failed} failed, {progress.num_left} left{to_go}"


def _stage(stage: Mapping[str, Any]) -> str:
    """Returns what a row is at, from its newest report."""
    name = STAGE_LABELS.get(stage["stage"], stage["stage"])
    window = f", window {stage['window'][0]} of {stage['window'][1]}" if stage.get("window") else ""
    return f"{name}{window}, {stage['step']} of {stage['of']}"
