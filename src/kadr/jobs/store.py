"""`JobStore`: accepts jobs, shows them, cancels, moves and deletes them. Workers take them through `claims`."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kadr.errors import RequestError
from kadr.jobs.folders import JobFolders, storage_error
from kadr.jobs.job import (
    CANCELLED,
    FAILED,
    IN_PROGRESS,
    QUEUED,
    STATUSES,
    Job,
    JobConflictError,
    JobError,
    NewJob,
    QueueFullError,
    QueueLimits,
    canonical_json,
    new_job_id,
)
from kadr.jobs.table import PAUSED_FILE, Announce, Change, JobTable, find_job
from kadr.quoting import quote
from kadr.validation import check_range

MAX_PAGE = 1000
DEFAULT_RETRY_SECONDS = 10.0  # of a full queue, before any job has finished
_CANCELLED_ERROR = JobError(CANCELLED, "it was cancelled")
_VISIBLE = "is_deleted = 0"


@dataclass(frozen=True)
class JobPage:
    """Some jobs of a list. has_more: others follow."""

    jobs: Sequence[Job]
    has_more: bool


class JobStore:
    """The queue: jobs on disk, each in exactly one status. Threads may share it.

    An owner of None in the arguments below stands for all owners.

    Args:
        folder: of the database and of the jobs' files; made where it is missing.
        limits: bounds of the queue.
        announce: see `JobTable`.
        clock: seconds since 1970.

    Raises:
        StorageError: as `JobTable`.
    """

    def __init__(
        self,
        folder: Path,
        limits: QueueLimits | None = None,
        *,
        announce: Announce = lambda change: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.limits, self.clock = limits or QueueLimits(), clock
        self.table = JobTable(folder, announce)
        self.folders = JobFolders(folder / "jobs")
        self._paused_file = folder / PAUSED_FILE
        self.is_paused = self._paused_file.exists()
        self.seconds_per_job: float | None = None  # a moving average, for `QueueFullError.retry_after`

    def submit(
        self,
        new_job: NewJob,
        *,
        idempotency_key: str | None = None,
        fill: Callable[[Path], object] = lambda folder: None,
        job_id: str | None = None,
        max_queued: int | None = None,
    ) -> Job:
        """Accepts a job: when this returns, it is on disk.

        Args:
            idempotency_key: chosen by whoever submits; a second job of one owner with the same key is the first one.
            fill: called with the job's folder, to put its media there.
            job_id: its id; by default a new one.
            max_queued: of this owner's jobs, instead of the limit for every owner.

        Raises:
            QueueFullError: there is no room, or none for this owner.
            JobConflictError: the key was used for another job.
            StorageError: the disk is full, or the folder cannot be written.
        """
        digest = hashlib.sha256(
            canonical_json({"request": new_job.request, "engine": new_job.engine, "labels": new_job.labels}).encode()
        ).hexdigest()
        if (earlier := self._find_earlier(new_job.owner, idempotency_key, digest)) is not None:
            return earlier
        self._refuse_if_full(new_job.owner, max_queued)
        job_id, created_at = job_id or new_job_id(), self.clock()
        columns = {
            "id": job_id,
            "owner": new_job.owner,
            "priority": new_job.priority,
            "created_at": created_at,
            "engine": new_job.engine,
            "request": new_job.request,
            "labels": new_job.labels,
        }
        folder = self.folders.create(job_id, columns)
        try:
            fill(folder)
            with self.table.change() as change:  # looked at again: the lock was free meanwhile
                if (earlier := self._find_earlier(new_job.owner, idempotency_key, digest)) is None:
                    self._refuse_if_full(new_job.owner, max_queued)
                    key = {"idempotency_key": idempotency_key, "idempotency_digest": digest} if idempotency_key else {}
                    return change.insert(**columns, **key, status=QUEUED, position=_last_position(change) + 1)
        except BaseException:
            self.folders.remove(job_id)
            raise
        self.folders.remove(job_id)
        return earlier

    def get(self, job_id: str, owner: str | None = None) -> Job:
        """Returns a job.

        Raises:
            UnknownJobError: there is none, or it is another owner's.
        """
        condition, values = _of_owner(owner)
        return find_job(self.table.rows(f"id = ? AND {condition}", (job_id, *values)), job_id)

    def jobs(
        self,
        owner: str | None = None,
        *,
        statuses: Sequence[str] = (),
        after: str | None = None,
        limit: int = 20,
        newest_first: bool = True,
    ) -> JobPage:
        """Returns jobs in the order of their submission.

        Args:
            statuses: () for all.
            after: id of the last job of the page before.
            limit: 1 to 1000.

        Raises:
            RequestError: the limit is out of its range, or there is no job `after`.
        """
        check_range("limit", limit, 1, MAX_PAGE, is_whole=True)
        condition, values = _of_owner(owner)
        if statuses:
            condition += f" AND status IN ({', '.join('?' * len(statuses))})"
            values += tuple(statuses)
        if after is not None:
            of_owner, owner_values = _of_owner(owner)
            found = self.table.rows(f"id = ? AND {of_owner}", (after, *owner_values))
            if not found:
                raise RequestError(f"after is {quote(after)}; there is no such job. Begin again without it.")
            condition += f" AND number {'<' if newest_first else '>'} ?"
            values += (found[0].number,)
        order = "DESC" if newest_first else "ASC"
        found = self.table.rows(f"{condition} ORDER BY number {order} LIMIT ?", (*values, limit + 1))
        return JobPage(found[:limit], len(found) > limit)

    def waiting(self) -> list[Job]:
        """Returns the jobs that wait, of all owners, by priority and position: about the order they are claimed in."""
        return self.table.rows(f"status = ? AND {_VISIBLE} ORDER BY priority DESC, position, number", (QUEUED,))

    def positions(self) -> dict[str, int]:
        """Returns the place of each job that waits, from 1, in the order of `waiting`."""
        query = f"SELECT id FROM jobs WHERE status = ? AND {_VISIBLE} ORDER BY priority DESC, position, number"
        return {row[0]: place for place, row in enumerate(self.table.database.rows(query, (QUEUED,)), 1)}

    def counts(self, owner: str | None = None) -> dict[str, int]:
        """Returns the number of jobs in each status."""
        condition, values = _of_owner(owner)
        query = f"SELECT status, COUNT(*) FROM jobs WHERE {condition} GROUP BY status"
        return {**dict.fromkeys(STATUSES, 0), **dict(map(tuple, self.table.database.rows(query, values)))}

    def cancel(self, job_id: str, owner: str | None = None) -> Job:
        """Cancels a job that waits, at once, or one in progress, whose worker is told. Never touches another job.

        Raises:
            UnknownJobError: there is none, or it is another owner's.
            JobConflictError: it is finished.
        """
        with self.table.change() as change:
            job = self.get(job_id, owner)
            if job.is_finished:
                raise JobConflictError(f"{job.id} is {job.status}; only a job that is not finished can be cancelled.")
            if job.status == QUEUED:
                return self._finish_cancelled(change, job_id)
            return _require(change.update("id = ? AND status = ?", (job_id, IN_PROGRESS), cancel_requested=1))

    def delete(self, job_id: str, owner: str | None = None) -> None:
        """Deletes a job and its files. One in progress is cancelled first, and is gone for everyone at once.

        Raises:
            UnknownJobError: there is none, or it is another owner's.
        """
        with self.table.change() as change:
            job = self.get(job_id, owner)
            if job.status == IN_PROGRESS:
                change.update("id = ?", (job_id,), cancel_requested=1, is_deleted=1)
                return
            change.delete(job_id)
        self.folders.remove(job_id)

    def move(self, job_id: str, *, before: str | None = None, owner: str | None = None) -> Job:
        """Moves a job that waits to just before another one of its priority; None: to the end of the queue.

        Raises:
            UnknownJobError: either is not there, or another owner's.
            JobConflictError: either does not wait, or they differ in priority.
        """
        with self.table.change() as change:
            job = self._require_waiting(job_id, owner)
            if before is None:
                return _require(change.update("id = ?", (job_id,), position=_last_position(change) + 1))
            other = self._require_waiting(before, owner)
            if other.priority != job.priority:
                raise JobConflictError(
                    f"{job.id} has the priority {job.priority}, {other.id} {other.priority}; a job moves only among "
                    "those of its own priority."
                )
            position = _position_before(change, other, job_id)
            if position is None:
                _renumber(change)
                position = _position_before(change, self.get(before), job_id)
            return _require(change.update("id = ?", (job_id,), position=position))

    def set_paused(self, is_paused: bool) -> None:
        """Stops claims, or lets them go on; jobs in progress are not touched. A restart does not change it.

        Raises:
            StorageError: the folder cannot be written.
        """
        try:
            if is_paused:
                self._paused_file.touch()
            else:
                self._paused_file.unlink(missing_ok=True)
        except OSError as error:
            raise storage_error(self._paused_file, error) from error
        with self.table.lock:
            self.is_paused = is_paused
            self.table.changed.notify_all()

    def close(self) -> None:
        """Closes the queue; jobs in progress stay so, until it is opened again and `recover` decides."""
        self.table.close()

    def _finish_cancelled(self, change: Change, job_id: str) -> Job:
        return _require(
            change.update("id = ?", (job_id,), status=FAILED, error=_CANCELLED_ERROR, finished_at=self.clock())
        )

    def _find_earlier(self, owner: str, key: str | None, digest: str) -> Job | None:
        """Returns the job that this owner submitted with this key."""
        if key is None:
            return None
        query = "SELECT id, idempotency_digest FROM jobs WHERE owner = ? AND idempotency_key = ? AND is_deleted = 0"
        for job_id, earlier_digest in self.table.database.rows(query, (owner, key)):
            if earlier_digest != digest:
                raise JobConflictError(
                    f"the idempotency key {quote(key)} was used for another request. Use a new key for a new request."
                )
            return self.get(job_id)
        return None

    def _refuse_if_full(self, owner: str, max_queued: int | None) -> None:
        query = "SELECT COUNT(*), COALESCE(SUM(owner = ?), 0) FROM jobs WHERE status = 'queued' AND is_deleted = 0"
        ((waiting, own),) = self.table.database.rows(query, (owner,))
        if waiting >= self.limits.max_queued:
            raise QueueFullError(
                f"{waiting} jobs wait, as many as the queue takes. Try again later.", retry_after=self._retry_after(1)
            )
        share = self.limits.max_queued_per_owner if max_queued is None else max_queued
        if share is not None and own >= share:
            raise QueueFullError(
                f"{own} of your jobs wait, as many as you may have. Try again when one has finished.",
                retry_after=self._retry_after(1 + (waiting - own) / max(own, 1)),
            )

    def _retry_after(self, jobs: float) -> float:
        """Returns the seconds until about so many jobs have finished."""
        return max(1.0, jobs * (self.seconds_per_job or DEFAULT_RETRY_SECONDS))

    def _require_waiting(self, job_id: str, owner: str | None) -> Job:
        job = self.get(job_id, owner)
        if job.status != QUEUED:
            raise JobConflictError(f"{job.id} is {job.status}; only a job that waits can be moved.")
        return job


def _of_owner(owner: str | None) -> tuple[str, tuple[Any, ...]]:
    """Returns a condition in SQL for the visible jobs of an owner, with its values."""
    return (_VISIBLE, ()) if owner is None else (f"{_VISIBLE} AND owner = ?", (owner,))


def _last_position(change: Change) -> float:
    ((position,),) = change.rows("SELECT COALESCE(MAX(position), 0) FROM jobs")
    return float(position)


def _position_before(change: Change, other: Job, job_id: str) -> float | None:
    """Returns a position between a job and the one before it; None where no number is left between them."""
    query = "SELECT MAX(position) FROM jobs WHERE status = 'queued' AND position < ? AND id <> ?"
    ((previous,),) = change.rows(query, (other.position, job_id))
    lower = other.position - 2 if previous is None else previous
    middle = (lower + other.position) / 2
    return float(middle) if lower < middle < other.position else None


def _renumber(change: Change) -> None:
    """Gives the jobs that wait the positions 1, 2, 3 ... in their order."""
    change.rows(
        "UPDATE jobs SET position = ranked.place FROM (SELECT id, ROW_NUMBER() OVER (ORDER BY position, number) "
        "AS place FROM jobs WHERE status = 'queued') AS ranked WHERE jobs.id = ranked.id"
    )


def _require(job: Job | None) -> Job:
    assert job is not None  # read in the same transaction
    return job
