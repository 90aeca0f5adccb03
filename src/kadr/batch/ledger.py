"""`Ledger`: the outcome of each row, from the queue's jobs and the videos in the folder; submits what is missing."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from kadr.batch.outcome import RowOutcome, invalid_row
from kadr.batch.output_names import OutputNames
from kadr.batch.publishing import find_published, is_unpublished, publish
from kadr.batch.row import BatchRow
from kadr.errors import KadrError, RequestError
from kadr.jobs.job import (
    CANCELLED,
    COMPLETED,
    DATABASE_LOST,
    DISK_FULL,
    FAILED,
    SERVER_LOST,
    STORAGE,
    Job,
    NewJob,
    canonical_json,
)
from kadr.jobs.store import MAX_PAGE, JobStore
from kadr.schema import BATCH_ROW

KEY_LABEL, OUTPUT_LABEL, WORK_LABEL = "key", "output", "work"  # of a job
# Failures that say nothing of the row: the process ended, the database was lost, the disk was full.
_NOT_OF_THE_ROW = (CANCELLED, SERVER_LOST, DATABASE_LOST, DISK_FULL, STORAGE)


class Ledger:
    """The rows of a batch and their jobs. One thread uses it.

    Args:
        store: the batch's queue, recovered; its workers have not begun.
        folder: of the videos.
        rows: that can be made.
        invalid: outcomes of those that cannot.
        retries_failed: rows that failed earlier are made again.

    Attributes:
        pending: rows that are not submitted yet.
        outcomes: of all rows, by their numbers.
        waiting: job -> row, of those that are submitted and not finished.
    """

    def __init__(
        self,
        store: JobStore,
        folder: Path,
        rows: Sequence[BatchRow],
        invalid: Sequence[RowOutcome] = (),
        *,
        retries_failed: bool = False,
    ) -> None:
        self.store, self.folder = store, folder
        outcomes = [*invalid, *map(_outcome_of, rows)]
        self.outcomes = {outcome.number: outcome for outcome in sorted(outcomes, key=lambda outcome: outcome.number)}
        self.waiting: dict[str, BatchRow] = {}
        self.pending: deque[BatchRow] = deque()
        jobs = _jobs_by_key(store)
        self._names = OutputNames(folder, [job.labels[OUTPUT_LABEL] for job in jobs.values()], len(outcomes))
        self._earlier_names: dict[str, str] = {}  # by key, of jobs that are made again
        self._output_names: dict[int, str] = {}  # by number, of pending rows
        for key in jobs.keys() - {row.key for row in rows}:
            self._forget_unfinished(jobs[key])
        for row in rows:
            if (job := jobs.get(row.key)) is None:
                self.pending.append(row)
            else:
                self._take_over(row, job, retries_failed=retries_failed)

    def keep_pending(self, rows: Sequence[BatchRow]) -> list[RowOutcome]:
        """Replaces the pending rows by those that were checked, and names their videos.

        Rows of one engine follow each other.

        Returns:
            The outcomes of rows whose names are taken.
        """
        refused, by_engine = [], dict[str, list[BatchRow]]()
        for row in sorted(rows, key=lambda row: (row.output is None, row.number)):  # a name that is given goes first
            try:
                self._output_names[row.number] = self._earlier_names.get(row.key) or self._names.take(row)
            except RequestError as error:
                refused.append(self.refuse(row.number, error))
        for row in rows:
            if row.number in self._output_names:
                by_engine.setdefault(canonical_json(row.engine), []).append(row)
        self.pending = deque(row for group in by_engine.values() for row in group)
        return refused

    def refuse(self, number: int, error: KadrError) -> RowOutcome:
        """Takes the reason why a row cannot be made, and returns its outcome."""
        outcome = self.outcomes[number] = invalid_row(number, self.outcomes[number].line, error)
        return outcome

    def submit_next(self) -> None:
        """Submits the next pending row.

        Raises:
            StorageError: see `JobStore.submit`.
        """
        row = self.pending.popleft()
        labels = BATCH_ROW.stamp(
            {KEY_LABEL: row.key, OUTPUT_LABEL: self._output_names[row.number], WORK_LABEL: row.work}
        )
        new_job = NewJob(request=row.request.to_json(), engine=row.engine, labels=labels)
        job = self.store.submit(new_job, idempotency_key=row.key)
        self.waiting[job.id] = row

    def finish(self, job: Job) -> RowOutcome:
        """Takes a finished job that was waiting, moves its video into the folder, and returns the row's outcome.

        Raises:
            CheckpointError: see `publish`.
        """
        row = self.waiting.pop(job.id)
        if job.status == FAILED:
            outcome = replace(_outcome_of(row), status=FAILED, error=job.error)
        else:
            outcome = self._complete(row, job)
        self.outcomes[row.number] = outcome
        return outcome

    def _complete(self, row: BatchRow, job: Job) -> RowOutcome:
        """Returns the outcome of a completed job, after its video has been moved."""
        job_folder = self.store.folders.path(job.id)
        name = find_published(job_folder)
        if name is None:
            name = publish(job_folder, self.folder, job.labels[OUTPUT_LABEL], self._names.take_numbered)
        result: Mapping[str, Any] = job.result or {}
        return replace(
            _outcome_of(row),
            status=COMPLETED,
            path=name,
            seconds=result.get("inference_seconds"),
            notices=tuple(result.get("notices", ())),
        )

    def _take_over(self, row: BatchRow, job: Job, *, retries_failed: bool) -> None:
        """Decides what becomes of a row whose job is in the queue already."""
        if job.status == COMPLETED and self._has_video(job):
            self.outcomes[row.number] = self._complete(row, job)
        elif job.status == FAILED and not retries_failed and job.error and job.error.code not in _NOT_OF_THE_ROW:
            self.outcomes[row.number] = replace(_outcome_of(row), status=FAILED, error=job.error)
        elif not job.is_finished and _is_same(row, job):
            self.waiting[job.id] = replace(row, work=job.labels[WORK_LABEL])
        else:  # to be made again: its video is gone, or it failed, or its files lie elsewhere now
            self._earlier_names[row.key] = job.labels[OUTPUT_LABEL]
            self.store.delete(job.id)
            self.pending.append(row)

    def _has_video(self, job: Job) -> bool:
        job_folder = self.store.folders.path(job.id)
        name = find_published(job_folder)
        return is_unpublished(job_folder) or (name is not None and (self.folder / name).is_file())

    def _forget_unfinished(self, job: Job) -> None:
        """Takes the job of a row that is no longer in the file out of the queue, unless it is finished."""
        if not job.is_finished:
            self.store.delete(job.id)


def _outcome_of(row: BatchRow) -> RowOutcome:
    """Returns the outcome of a row that is not made."""
    return RowOutcome(number=row.number, line=row.line, seed=row.request.seed)


def _jobs_by_key(store: JobStore) -> dict[str, Job]:
    """Returns the jobs of all rows that the queue has, by their keys; one restored without its labels is no row's."""
    labels = ((BATCH_ROW.upgrade(job.labels), job) for job in _all_jobs(store))
    return {of_job[KEY_LABEL]: job for of_job, job in labels if KEY_LABEL in of_job}


def _is_same(row: BatchRow, job: Job) -> bool:
    """Tells whether a job finds its files where its row does: the key is equal, also after they have moved together."""
    request = row.request.to_json()
    if row.seconds is not None:
        request["frames"] = job.request["frames"]
    return bool(job.request == request and job.engine == row.engine)


def _all_jobs(store: JobStore) -> Iterator[Job]:
    after = None
    while True:
        page = store.jobs(after=after, limit=MAX_PAGE, newest_first=False)
        yield from page.jobs
        if not page.has_more:
            return
        after = page.jobs[-1].id
