"""Runs a batch: submits what is missing to its queue, moves finished videos into the folder, and keeps the manifest.

DIR/001-a-red-circle.mp4      the videos
    results.jsonl             the manifest
    .kadr/                    the queue: its database, and a folder for each job
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Protocol

from kadr.batch.check_rows import RowChecker
from kadr.batch.ledger import Ledger
from kadr.batch.outcome import MANIFEST_FILE, RowOutcome, write_manifest
from kadr.batch.progress import BatchProgress
from kadr.batch.row import BatchRow
from kadr.cancellation import cancellable, check_cancelled
from kadr.errors import CheckpointError
from kadr.jobs.events import JOB, NOTICE, PROGRESS, Event
from kadr.jobs.job import Job, QueueLimits
from kadr.jobs.queue import JobQueue
from kadr.jobs.worker import MakerFactory

QUEUE_FOLDER = ".kadr"
_MANY = 10**6  # a batch may be that long, and its rows may pass each other that often: nobody else waits
_AHEAD_PER_WORKER = 4  # rows that are submitted before a worker needs them
_POLL_SECONDS = 0.2
_STORAGE_SECONDS = 5.0  # between looks at the disk
_MANIFEST_SECONDS = 1.0  # between two manifests
_MANIFEST_SHARE = 0.05  # of the time may go into writing them


class BatchWatch(Protocol):
    """Shows a batch to whoever waits for it. One thread calls it, but for `show_line`, which any may call."""

    def show_progress(self, progress: BatchProgress, row: BatchRow | None, stage: Mapping[str, Any]) -> None:
        """Called often. row, stage: one that is being made, and its newest report; None and {} where there is none."""

    def show_outcome(self, progress: BatchProgress, outcome: RowOutcome) -> None:
        """Called when a row is finished, and with each row that cannot be made."""

    def show_line(self, line: str) -> None:
        """Called with something else to know."""


@dataclass(frozen=True)
class BatchResult:
    """The outcome of a batch.

    Args:
        outcomes: of all rows, in the order of the file.
        num_made: rows completed in this run.
        manifest: its path.
    """

    outcomes: Sequence[RowOutcome]
    num_made: int
    manifest: Path

    @property
    def failed(self) -> list[RowOutcome]:
        return [outcome for outcome in self.outcomes if outcome.is_failed]


@dataclass(frozen=True)
class Batch:
    """A batch in a folder.

    Args:
        folder: of the videos; made where it is missing.
        rows: that can be made, with their keys.
        invalid: rows that cannot.
        checker: checks the rows that are not made yet, and fetches what they need.
        makers: what each worker makes videos with, one worker for each.
        watch: see `BatchWatch`.
        retries_failed: rows that failed in an earlier run are made again.
    """

    folder: Path
    rows: Sequence[BatchRow]
    invalid: Sequence[RowOutcome]
    checker: RowChecker
    makers: Sequence[MakerFactory]
    watch: BatchWatch
    retries_failed: bool = False

    def run(self) -> BatchResult:
        """Makes what is missing, and returns what became of each row.

        Raises:
            StorageError: another process makes this batch, or the folder cannot be used.
            CheckpointError: a video or the manifest cannot be written.
            Cancelled: the work was cancelled; rows in progress are made when it runs again.
        """
        limits = QueueLimits(max_queued=_MANY, max_passes=_MANY)
        queue = JobQueue(self.folder / QUEUE_FOLDER, self.makers, limits=limits, log=self.watch.show_line)
        with ExitStack() as stack:
            stack.callback(queue.close)
            run = _Run(self, queue)
            stack.enter_context(run.settled_at_end())
            stack.enter_context(cancellable())
            run.check()
            run.make()
        return BatchResult(list(run.ledger.outcomes.values()), run.progress.num_made, self.folder / MANIFEST_FILE)


class _Run:
    """A batch while it is made."""

    def __init__(self, batch: Batch, queue: JobQueue) -> None:
        self.batch, self.queue, self.watch = batch, queue, batch.watch
        self._inbox: SimpleQueue[Event] = SimpleQueue()
        queue.events.subscribe(self._inbox.put)
        self.ledger = Ledger(queue.store, batch.folder, batch.rows, batch.invalid, retries_failed=batch.retries_failed)
        self.progress = BatchProgress.of_outcomes(self.ledger.outcomes.values())
        self._manifest_due, self._storage_due, self._storage_problem = 0.0, 0.0, ""

    def check(self) -> None:
        """Checks the rows that are to be made, and shows all that cannot be."""
        checker, progress = self.batch.checker, self.progress
        if progress.num_completed:
            self.watch.show_line(f"{progress.num_completed} of {progress.total} rows are done already")
        for outcome in self.batch.invalid:
            self.watch.show_outcome(self.progress, outcome)
        checked = checker.fetch(checker.check(self.ledger.pending))
        refused = [self.ledger.refuse(number, error) for number, error in checker.refused.items()]
        for outcome in sorted([*refused, *self.ledger.keep_pending(checked)], key=lambda outcome: outcome.number):
            self.progress.num_failed += 1
            self.watch.show_outcome(self.progress, outcome)

    def make(self) -> None:
        """Makes all rows that are left."""
        self._write_manifest()
        if not self._is_done:
            self.queue.start()
            self.progress.begin([*self.ledger.pending, *self.ledger.waiting.values()])
        while not self._is_done:
            check_cancelled()
            self._submit()
            self._look_at_storage()
            self._take_next()

    @property
    def _is_done(self) -> bool:
        return not self.ledger.pending and not self.ledger.waiting

    def _submit(self) -> None:
        ahead = _AHEAD_PER_WORKER * len(self.batch.makers)
        while self.ledger.pending and len(self.ledger.waiting) < ahead:
            self.ledger.submit_next()

    def _take_next(self) -> None:
        """Takes the next event, if there is one soon."""
        try:
            event = self._inbox.get(timeout=_POLL_SECONDS)
        except Empty:
            self.watch.show_progress(self.progress, None, {})
            return
        row = self.ledger.waiting.get(event.job_id or "")
        if row is None:
            return
        if event.kind == JOB:
            self._take_job(row, event.data)
        elif event.kind == PROGRESS and not event.data.get("is_loading"):
            self.progress.advance(row, event.data)
            self.watch.show_progress(self.progress, row, event.data)
        elif event.kind == NOTICE:
            self.watch.show_line(f"warning: row {row.number}: {event.data['message']}")

    def _take_job(self, row: BatchRow, job: Job) -> None:
        if job.is_finished:
            outcome = self.ledger.finish(job)
            self.progress.finish(row, outcome)
            self.watch.show_outcome(self.progress, outcome)
            if time.monotonic() >= self._manifest_due:
                self._write_manifest()

    @contextmanager
    def settled_at_end(self) -> Iterator[None]:
        """Stops the workers when the block ends, and takes what they have finished by then; writes the manifest.

        What cannot be written now, after another error, is settled when the batch runs again.
        """
        try:
            yield
        except BaseException:
            with suppress(CheckpointError):
                self._settle()
            progress = self.progress
            self.watch.show_line(
                f"{progress.num_completed} of {progress.total} rows are done; run the command again for the others"
            )
            raise
        self._settle()

    def _settle(self) -> None:
        self.queue.close()
        while not self._inbox.empty():
            event = self._inbox.get()
            if event.kind == JOB and (row := self.ledger.waiting.get(event.job_id or "")) is not None:
                self._take_job(row, event.data)
        self._write_manifest()

    def _write_manifest(self) -> None:
        began = time.monotonic()
        write_manifest(self.batch.folder, self.ledger.outcomes.values())
        now = time.monotonic()
        self._manifest_due = now + max(_MANIFEST_SECONDS, (now - began) / _MANIFEST_SHARE)

    def _look_at_storage(self) -> None:
        """Says why no row begins, when the disk is full."""
        if time.monotonic() < self._storage_due:
            return
        self._storage_due = time.monotonic() + _STORAGE_SECONDS
        problem = self.queue.supervisor.storage_problem() or ""
        if problem != self._storage_problem:
            self.watch.show_line(problem or "the disk has room again")
            self._storage_problem = problem
