"""`JobClaims`: gives jobs to workers, takes what became of them, and settles what a crash left open.

Each claim has a fence, which rises with every claim. A worker that was given up has an older one, and its writes are
refused: it cannot write over its successor.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from kadr.jobs.job import (
    CANCELLED,
    COMPLETED,
    DATABASE_LOST,
    FAILED,
    IN_PROGRESS,
    QUEUED,
    SERVER_LOST,
    WORKER_LOST,
    Job,
    JobError,
    LostClaimError,
)
from kadr.jobs.order import Waiting, next_job
from kadr.jobs.store import JobStore
from kadr.jobs.table import Change

MAX_WORKER_LOSSES = 2  # a job that has cost so many workers is what kills them
MAX_SERVER_LOSSES = 5  # more: a server dies for many reasons that are not its job's
_SMOOTHING = 0.2  # weight of the newest job in the average time of one


@dataclass(frozen=True)
class Claim:
    """A job that a worker makes. fence: see above."""

    job: Job

    @property
    def fence(self) -> int:
        return self.job.fence


class JobClaims:
    """The side of a queue that workers use.

    Args:
        store: the queue.
    """

    def __init__(self, store: JobStore) -> None:
        self.store = store

    def claim(self, *, warm_engines: Collection[str] = (), engines: Collection[str] | None = None) -> Claim | None:
        """Claims the job that is next, or returns None where none waits or the queue is paused.

        Args:
            warm_engines: canonical JSON of the engines that the worker has in memory.
            engines: those that it can open; None: all.
        """
        store = self.store
        if store.is_paused or not self._any_waits():
            return None
        with store.table.change() as change:
            waiting = [Waiting(*row) for row in change.rows(
                "SELECT number, owner, priority, position, passed, engine FROM jobs "
                "WHERE status = 'queued' AND is_deleted = 0"
            )]  # fmt: skip
            chosen = next_job(
                [job for job in waiting if engines is None or job.engine in engines],
                max_passes=store.limits.max_passes,
                warm_engines=warm_engines,
                running=Counter(row[0] for row in change.rows("SELECT owner FROM jobs WHERE status = 'in_progress'")),
                last_served=dict(map(tuple, change.rows("SELECT owner, MAX(fence) FROM jobs GROUP BY owner"))),
            )
            if chosen is None:
                return None
            change.rows(
                "UPDATE jobs SET passed = passed + 1 WHERE status = 'queued' AND is_deleted = 0 AND number < ?",
                (chosen.number,),
            )
            ((attempt, fence),) = change.rows(
                "SELECT (SELECT attempt FROM jobs WHERE number = ?), MAX(fence) FROM jobs", (chosen.number,)
            )
            job = change.update(
                "number = ? AND status = ?",
                (chosen.number, QUEUED),
                status=IN_PROGRESS,
                started_at=store.clock(),
                attempt=attempt + 1,
                fence=fence + 1,
            )
            return None if job is None else Claim(job)

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
        job = self.current(claim)
        folders = self.store.folders
        folders.publish(job.id, claim.fence)
        folders.remove_attempts(job.id)
        finished_at, size_bytes = self.store.clock(), folders.size_bytes(job.id)
        self._finish(claim, status=COMPLETED, result=result, finished_at=finished_at, size_bytes=size_bytes)
        self._observe(finished_at - (job.started_at or finished_at))

    def fail(self, claim: Claim, error: JobError) -> None:
        """Ends a job with an error; a cancelled one with that, whatever the worker said.

        Raises:
            LostClaimError, StorageError: as `complete`.
        """
        if self.current(claim).cancel_requested:
            error = JobError(CANCELLED, "it was cancelled")
        self._finish(claim, status=FAILED, error=error, finished_at=self.store.clock())
        self.store.folders.remove_attempts(claim.job.id)

    def give_back(self, claim: Claim) -> None:
        """Puts a job back where it was in the queue, because its worker stops; it costs no attempt.

        Raises:
            LostClaimError, StorageError: as `complete`.
        """
        if self.current(claim).cancel_requested:
            self.fail(claim, JobError(CANCELLED, "it was cancelled"))
            return
        with self.store.table.change() as change:
            condition, values = _of_claim(claim)
            if change.update(condition, values, status=QUEUED, attempt=claim.job.attempt - 1, started_at=None) is None:
                raise _lost(claim)

    def lose_worker(self, claim: Claim, reason: str) -> None:
        """Puts the job of a worker that died back into the queue, or fails it if it was not the first.

        Args:
            reason: says what became of the worker, as the subject of a sentence: "the worker ended with -9".

        Raises:
            LostClaimError, StorageError: as `complete`.
        """
        self._lose(claim, "worker_losses", MAX_WORKER_LOSSES, WORKER_LOST, reason)

    def recover(self) -> None:
        """Settles jobs that were in progress when the queue was last closed or its process died.

        What is on disk whole is completed; what was cancelled has failed; the rest goes back into the queue, but for a
        job that has been in progress at the death of too many servers. Folders without a job are removed; where the
        database was lost, they become jobs again, which nobody makes twice without being asked to.

        Raises:
            StorageError: as `complete`.
        """
        if self.store.table.database.is_new:
            self._restore_jobs()
        for job in self.store.table.rows("status = ?", (IN_PROGRESS,)):
            claim = Claim(job)
            if (result := self.store.folders.read_result(job.id, job.fence)) is not None:
                self.complete(claim, result)
            else:
                reason = "the server ended while it was made"
                self._lose(claim, "server_losses", MAX_SERVER_LOSSES, SERVER_LOST, reason)
        known = {job_id for (job_id,) in self.store.table.database.rows("SELECT id FROM jobs WHERE is_deleted = 0")}
        for job_id in set(self.store.folders.job_ids()) - known:
            self.store.folders.remove(job_id)
        with self.store.table.change() as change:
            change.rows("DELETE FROM jobs WHERE is_deleted = 1")

    def _lose(self, claim: Claim, counter: str, limit: int, code: str, reason: str) -> None:
        if self.current(claim).cancel_requested:
            self.fail(claim, JobError(CANCELLED, "it was cancelled"))
            return
        condition, values = _of_claim(claim)
        with self.store.table.change() as change:
            rows = change.rows(f"SELECT {counter} FROM jobs WHERE {condition}", values)
            if not rows:
                raise _lost(claim)
            losses = rows[0][0] + 1
            if losses < limit:
                change.update(condition, values, status=QUEUED, started_at=None, **{counter: losses})
            else:
                error = JobError(code, f"{reason}, {losses} times. Ask for less, or look into the server's log.")
                self._fail_in(change, condition, values, error, **{counter: losses})

    def _finish(self, claim: Claim, **columns: Any) -> None:
        condition, values = _of_claim(claim)
        with self.store.table.change() as change:
            job = change.update(condition, values, **columns, cancel_requested=0)
            if job is None:
                raise _lost(claim)
            is_deleted = change.announced[-1].is_deleted
            if is_deleted:
                change.rows("DELETE FROM jobs WHERE id = ?", (job.id,))
        if is_deleted:
            self.store.folders.remove(job.id)

    def _fail_in(self, change: Change, condition: str, values: Any, error: JobError, **columns: Any) -> None:
        change.update(condition, values, status=FAILED, error=error, finished_at=self.store.clock(), **columns)

    def _any_waits(self) -> bool:
        query = "SELECT 1 FROM jobs WHERE status = 'queued' AND is_deleted = 0 LIMIT 1"
        return bool(self.store.table.database.rows(query))

    def _observe(self, seconds: float) -> None:
        """Takes the time that a job took into the average."""
        average = self.store.seconds_per_job
        self.store.seconds_per_job = seconds if average is None else average + _SMOOTHING * (seconds - average)

    def _restore_jobs(self) -> None:
        """Makes jobs of the folders that a lost database leaves: completed with their result, or failed."""
        submitted = {job_id: self.store.folders.read_submitted(job_id) for job_id in self.store.folders.job_ids()}
        found = [(data.get("created_at", 0.0), job_id, data) for job_id, data in submitted.items() if data]
        for position, (created_at, job_id, data) in enumerate(sorted(found, key=lambda item: item[:2])):
            result = self.store.folders.read_result(job_id, -1)
            lost = JobError(DATABASE_LOST, "the queue's database was lost before this was made. Submit it again.")
            outcome = {"status": FAILED, "error": lost} if result is None else {"status": COMPLETED, "result": result}
            columns = {key: data[key] for key in ("owner", "priority", "engine", "request", "labels")}
            with self.store.table.change() as change:
                size_bytes = self.store.folders.size_bytes(job_id)
                times = {"created_at": created_at, "finished_at": created_at, "size_bytes": size_bytes}
                change.insert(id=job_id, position=position, **columns, **outcome, **times)


def _of_claim(claim: Claim) -> tuple[str, tuple[Any, ...]]:
    """Returns a condition in SQL that only the job of a claim that is not over meets, with its values."""
    return "id = ? AND fence = ? AND status = 'in_progress'", (claim.job.id, claim.fence)


def _lost(claim: Claim) -> LostClaimError:
    return LostClaimError(f"{claim.job.id} is no longer this worker's; what it made is not used.")
