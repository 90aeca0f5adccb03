"""`JobClaims`: gives jobs to workers, takes what became of them, and settles what a crash left open.

Each claim has a fence, which rises with every claim. A worker that was given up has an older one, and its writes are
refused: it cannot write over its successor.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from kadr.jobs.job import (
    CANCELLED_ERROR,
    COMPLETED,
    FAILED,
    IN_PROGRESS,
    QUEUED,
    SERVER_LOST,
    STORAGE,
    WORKER_LOST,
    Job,
    JobError,
    LostClaimError,
    StorageError,
)
from kadr.jobs.order import Waiting, next_job
from kadr.jobs.restoring import restore_jobs
from kadr.jobs.store import JobStore
from kadr.jobs.table import Change, job_from_row

MAX_WORKER_LOSSES = 2  # a job that has cost so many workers is what kills them
MAX_SERVER_LOSSES = 5  # more: a server dies for many reasons that are not its job's


@dataclass(frozen=True)
class Claim:
    """A job that a worker makes. fence: see above; began: monotonic seconds."""

    job: Job
    began: float = field(default_factory=time.monotonic, compare=False)

    @property
    def fence(self) -> int:
        return self.job.fence


class JobClaims:
    """The side of a queue that workers use. Threads may share it.

    Args:
        store: the queue.
    """

    def __init__(self, store: JobStore) -> None:
        self.store = store

    def claim(self, *, warm_engines: Collection[str] = (), engines: Collection[str] | None = None) -> Claim | None:
        """Claims the job that is next, or returns None where none waits or the queue is paused.

        Args:
            warm_engines: canonical JSON of the engines that the worker has in memory.
            engines: those that it can open; None: all. Jobs of others are not passed, in the sense of the bound.

        Raises:
            StorageError: the queue cannot be read or written.
        """
        store = self.store
        if store.is_paused or not self._any_waits():
            return None
        with store.table.change() as change:
            waiting = [Waiting(*row) for row in change.rows(
                "SELECT number, owner, priority, position, passed, engine FROM jobs "
                "WHERE status = 'queued' AND is_deleted = 0"
            ) if engines is None or row["engine"] in engines]  # fmt: skip
            chosen = next_job(
                waiting,
                max_passes=store.limits.max_passes,
                warm_engines=warm_engines,
                running=Counter(row[0] for row in change.rows("SELECT owner FROM jobs WHERE status = 'in_progress'")),
                last_served=store.last_served,
            )
            if chosen is None:
                return None
            change.connection.executemany(
                "UPDATE jobs SET passed = passed + 1 WHERE number = ?",
                [(job.number,) for job in waiting if job.number < chosen.number],
            )
            job = self._start_in(change, chosen.number)
        store.last_served[job.owner] = job.fence
        return Claim(job)

    def current(self, claim: Claim) -> Job:
        """Returns the job of a claim as it is now, also if it was deleted.

        Raises:
            LostClaimError: the claim is over.
        """
        jobs = self.store.table.rows(*_of_claim(claim))
        if not jobs:
            raise _lost(claim)
        return jobs[0]

    def complete(self, claim: Claim, result: Mapping[str, Any]) -> None:
        """Makes what a worker has written the result of its job. A job that was deleted meanwhile is gone with it.

        Raises:
            LostClaimError: the claim is over; nothing was changed.
            StorageError: the result could not be recorded; it is on disk, and this may be tried again.
        """
        with self._claimed(claim) as (change, job):
            self._complete_in(change, job, result)
        self.store.observe(time.monotonic() - claim.began)

    def fail(self, claim: Claim, error: JobError) -> None:
        """Ends a job with an error; a cancelled one with that, whatever the worker said.

        Raises:
            LostClaimError, StorageError: as `complete`.
        """
        with self._claimed(claim) as (change, job):
            self._fail_in(change, job, error)

    def give_back(self, claim: Claim) -> None:
        """Puts a job back where it was in the queue, because its worker stops; it costs no attempt.

        If its result is on disk whole, it is completed.

        Raises:
            LostClaimError, StorageError: as `complete`.
        """
        with self._claimed(claim) as (change, job):
            if not self._end_if_settled(change, job):
                self._requeue_in(change, job, attempt=job.attempt - 1)

    def lose_worker(self, claim: Claim, reason: str) -> None:
        """Puts the job of a worker that died back into the queue, or fails it if it was not the first.

        If its result is on disk whole, it is completed.

        Args:
            reason: says what became of the worker, as the subject of a sentence: "the worker ended with -9".

        Raises:
            LostClaimError, StorageError: as `complete`.
        """
        self._lose(claim, "worker_losses", MAX_WORKER_LOSSES, WORKER_LOST, reason)

    def recover(self) -> None:
        """Settles jobs that were in progress when the queue was last closed or its process died.

        A job whose result is on disk whole is completed; one that was cancelled has failed; the others go back into the
        queue, but for one that has been in progress at the death of too many servers. See also `restore_jobs`.

        Raises:
            StorageError: as `complete`.
        """
        for job in self.store.table.rows("status IN (?, ?)", (QUEUED, IN_PROGRESS)):
            if job.status == IN_PROGRESS:
                reason = "the server ended while it was made"
                self._lose(Claim(job), "server_losses", MAX_SERVER_LOSSES, SERVER_LOST, reason)
            elif (result := self.store.folders.read_result(job.id, job.fence)) is not None:
                with self.store.table.change() as change:  # only of a database that was put back from a backup
                    self._complete_in(change, job, result)
        restore_jobs(self.store)
        self.store.remove_deleted()

    def _start_in(self, change: Change, number: int) -> Job:
        (row,) = change.rows("SELECT attempt, created_at FROM jobs WHERE number = ?", (number,))
        started_at = max(self.store.clock(), row["created_at"])  # though the clock was set back
        columns = {"started_at": started_at, "attempt": row["attempt"] + 1, "fence": self.store.table.next_fence()}
        job = change.update("number = ?", (number,), status=IN_PROGRESS, **columns)
        assert job is not None  # it was read in the same transaction
        return job

    @contextmanager
    def _claimed(self, claim: Claim) -> Iterator[tuple[Change, Job]]:
        """Opens a transaction for the end of a claim, with its job; removes the job afterwards if it was deleted.

        No other worker can claim the job before the block ends: until then its folder is this claim's.
        """
        with self.store.table.change() as change:
            condition, values = _of_claim(claim)
            rows = change.rows(f"SELECT * FROM jobs WHERE {condition}", values)
            if not rows:
                raise _lost(claim)
            yield change, job_from_row(rows[0])
        if rows[0]["is_deleted"]:
            with suppress(StorageError):  # its files go later
                self.store.remove_deleted()

    def _lose(self, claim: Claim, counter: str, limit: int, code: str, reason: str) -> None:
        with self._claimed(claim) as (change, job):
            if self._end_if_settled(change, job):
                return
            ((losses,),) = change.rows(f"SELECT {counter} + 1 FROM jobs WHERE id = ?", (job.id,))
            if losses < limit:
                self._requeue_in(change, job, **{counter: losses})
            else:
                error = JobError(code, f"{reason}, {losses} times. Ask for less, or look into the server's log.")
                self._fail_in(change, job, error, **{counter: losses})

    def _end_if_settled(self, change: Change, job: Job) -> bool:
        """Ends a job that is whole on disk, or that was cancelled; returns false for another."""
        if (result := self.store.folders.read_result(job.id, job.fence)) is not None:
            self._complete_in(change, job, result)
        elif job.cancel_requested:
            self._fail_in(change, job, CANCELLED_ERROR)
        else:
            return False
        return True

    def _complete_in(self, change: Change, job: Job, result: Mapping[str, Any]) -> None:
        if self.store.folders.publish(job.id, job.fence):
            self._end_in(change, job, status=COMPLETED, result=result)
        else:
            message = "its files were removed before it was completed. Submit it again."
            self._fail_in(change, job, JobError(STORAGE, message))

    def _fail_in(self, change: Change, job: Job, error: JobError, **columns: Any) -> None:
        error = CANCELLED_ERROR if job.cancel_requested else error
        self._end_in(change, job, status=FAILED, error=error, **columns)

    def _end_in(self, change: Change, job: Job, **columns: Any) -> None:
        self.store.folders.remove_attempts(job.id)
        times = {"finished_at": self.store.end_time(job), "size_bytes": self.store.folders.size_bytes(job.id)}
        change.update("id = ?", (job.id,), cancel_requested=0, **times, **columns)

    def _requeue_in(self, change: Change, job: Job, **columns: Any) -> None:
        self.store.folders.remove_attempts(job.id)
        change.update("id = ?", (job.id,), status=QUEUED, started_at=None, **columns)

    def _any_waits(self) -> bool:
        query = "SELECT 1 FROM jobs WHERE status = 'queued' AND is_deleted = 0 LIMIT 1"
        return bool(self.store.table.database.rows(query))


def _of_claim(claim: Claim) -> tuple[str, tuple[Any, ...]]:
    """Returns a condition in SQL that only the job of a claim that is not over meets, with its values."""
    return "id = ? AND fence = ? AND status = 'in_progress'", (claim.job.id, claim.fence)


def _lost(claim: Claim) -> LostClaimError:
    return LostClaimError(f"{claim.job.id} is no longer this worker's; what it made is not used.")
