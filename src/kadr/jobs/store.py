"""`JobStore`: accepts jobs, shows them, cancels, moves and deletes them. Workers take them through `claims`."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kadr.errors import CheckpointError, RequestError
from kadr.jobs.folders import JobFolders, storage_error
from kadr.jobs.job import (
    CANCELLED_ERROR,
    FAILED,
    IN_PROGRESS,
    QUEUED,
    STATUSES,
    Job,
    JobConflictError,
    NewJob,
    QueueFullError,
    QueueLimits,
    StorageError,
    UnknownJobError,
    canonical_json,
    is_job_id,
    is_utf8,
    new_job_id,
)
from kadr.jobs.order import last_position, position_before
from kadr.jobs.table import PAUSED_FILE, Announce, Change, JobTable, find_job
from kadr.quoting import quote
from kadr.validation import check_range

MAX_PAGE = 1000
DEFAULT_RETRY_SECONDS = 10.0  # of a full queue, before any job has finished
_SMOOTHING = 0.2  # weight of the newest job in the average time of one
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

    Attributes:
        seconds_per_job: a moving average, for `QueueFullError.retry_after`; None before any job has finished.
        last_served: owner -> fence of its last claim, also of jobs that were deleted.
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
        self.seconds_per_job: float | None = None
        query = "SELECT owner, MAX(fence) FROM jobs GROUP BY owner"
        self.last_served: dict[str, int] = dict(map(tuple, self.table.database.rows(query)))

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
            fill: called with the job's folder, to put its media there. If it raises, there is no job.
            job_id: its id; by default a new one.
            max_queued: of this owner's jobs, instead of the limit for every owner.

        Raises:
            QueueFullError: there is no room, or none for this owner.
            JobConflictError: the key was used for another job, or the id is taken.
            StorageError: the disk is full, or the folder cannot be written.
        """
        if idempotency_key is not None and not is_utf8(idempotency_key):
            raise RequestError(f"the idempotency key is {quote(idempotency_key)}; it must be text.")
        digest = hashlib.sha256(
            canonical_json({"request": new_job.request, "engine": new_job.engine, "labels": new_job.labels}).encode()
        ).hexdigest()
        if (earlier := self._find_earlier(new_job.owner, idempotency_key, digest)) is not None:
            return earlier
        self._refuse_if_full(new_job.owner, max_queued)
        job_id = job_id or new_job_id()
        columns = {
            "id": job_id,
            "owner": new_job.owner,
            "priority": new_job.priority,
            "created_at": self.clock(),
            "engine": new_job.engine,
            "request": new_job.request,
            "labels": new_job.labels,
            "idempotency_key": idempotency_key,
            "idempotency_digest": digest,
        }
        try:
            folder = self.folders.create(job_id, columns)
        except FileExistsError as error:
            raise JobConflictError(f"the id {quote(job_id)} is taken. Use a new one.") from error
        try:
            _fill_folder(folder, fill)
            self.folders.sync_media(job_id)
            with self.table.change() as change:  # looked at again: the lock was free meanwhile
                if (earlier := self._find_earlier(new_job.owner, idempotency_key, digest)) is None:
                    self._refuse_if_full(new_job.owner, max_queued)
                    return change.insert(**columns, status=QUEUED, position=last_position(change) + 1)
        except BaseException:
            self._remove_unless_accepted(job_id)
            raise
        self.folders.remove(job_id)
        return earlier

    def get(self, job_id: str, owner: str | None = None) -> Job:
        """Returns a job.

        Raises:
            UnknownJobError: there is none, or it is another owner's.
        """
        condition, values = _of_owner(owner)
        found = self.table.rows(f"id = ? AND {condition}", (job_id, *values)) if is_job_id(job_id) else []
        return find_job(found, job_id)

    def jobs(
        self,
        owner: str | None = None,
        *,
        statuses: Sequence[str] = (),
        after: str | None = None,
        limit: int = 20,
        newest_first: bool = True,
        words: Sequence[str] = (),
        is_favorite: bool | None = None,
    ) -> JobPage:
        """Returns jobs in the order of their submission.

        Args:
            statuses: () for all.
            words: that the prompt has, all of them, in small letters or capitals.
            is_favorite: None for both.
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
        if is_favorite is not None:
            condition += " AND is_favorite = ?"
            values += (int(is_favorite),)
        if words:  # behind all that is quicker to look at
            condition += " AND has_words(CAST(json_extract(request, '$.prompt') AS BLOB), ?)"
            values += (" ".join(words).casefold(),)
        if after is not None:
            try:
                last = self.get(after, owner)
            except UnknownJobError as error:
                message = f"after is {quote(after)}; there is no such job. Begin again without it."
                raise RequestError(message) from error
            condition += f" AND number {'<' if newest_first else '>'} ?"
            values += (last.number,)
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
                return self._finish_cancelled(change, job)
            return _require(change.update("id = ? AND status = ?", (job_id, IN_PROGRESS), cancel_requested=1))

    def delete(self, job_id: str, owner: str | None = None) -> None:
        """Deletes a job and its files. One in progress is cancelled first, and is gone for everyone at once.

        Raises:
            UnknownJobError: there is none, or it is another owner's.
            StorageError: this could not be recorded.
        """
        try:
            self._mark_deleted(job_id, owner)
        except StorageError:  # a full disk: the files of a finished job go first, which makes room to record it
            if not self.get(job_id, owner).is_finished:
                raise
            self.folders.remove(job_id)
            self._mark_deleted(job_id, owner)
        with suppress(StorageError):  # it is deleted; its files go later
            self.remove_deleted()

    def remove_deleted(self) -> None:
        """Removes the files and then the rows of deleted jobs, but for those whose worker has not stopped yet.

        The files go first: a folder without a row is never a deleted job's, so that `recover` may make it one again.

        Raises:
            StorageError: the database cannot be written.
        """
        query = "SELECT id FROM jobs WHERE is_deleted = 1 AND status <> 'in_progress'"
        for (job_id,) in self.table.database.rows(query):
            if self.folders.remove(job_id):
                with self.table.change() as change:
                    change.rows("DELETE FROM jobs WHERE id = ?", (job_id,))

    def move(self, job_id: str, *, before: str | None = None, owner: str | None = None) -> Job:
        """Moves a job that waits to just before another one of its priority; None: to the end of the queue.

        Raises:
            UnknownJobError: either is not there, or another owner's.
            JobConflictError: either does not wait, or they differ in priority.
        """
        with self.table.change() as change:
            job = self._require_waiting(job_id, owner)
            if before is None:
                return _require(change.update("id = ?", (job_id,), position=last_position(change) + 1))
            other = self._require_waiting(before, owner)
            if other.priority != job.priority:
                raise JobConflictError(
                    f"{job.id} has the priority {job.priority}, {other.id} {other.priority}; a job moves only among "
                    "those of its own priority."
                )
            return _require(change.update("id = ?", (job_id,), position=position_before(change, other, job_id)))

    def set_favorite(self, job_id: str, is_favorite: bool, owner: str | None = None) -> Job:
        """Makes a job a favourite, which does not expire, or no longer one.

        Raises:
            UnknownJobError: there is none, or it is another owner's.
            StorageError: this could not be recorded.
        """
        with self.table.change() as change:
            self.get(job_id, owner)
            self.folders.set_favorite(job_id, is_favorite)
            return _require(change.update("id = ?", (job_id,), is_favorite=int(is_favorite)))

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

    def end_time(self, job: Job) -> float:
        """Returns the time for a job that ends now: not before it began, though the clock was set back."""
        return max(self.clock(), job.started_at or job.created_at)

    def observe(self, seconds: float) -> None:
        """Takes the time that a job took into the average."""
        average = self.seconds_per_job
        self.seconds_per_job = seconds if average is None else average + _SMOOTHING * (seconds - average)

    def _finish_cancelled(self, change: Change, job: Job) -> Job:
        columns = {"finished_at": self.end_time(job), "size_bytes": self.folders.size_bytes(job.id)}
        return _require(change.update("id = ?", (job.id,), status=FAILED, error=CANCELLED_ERROR, **columns))

    def _mark_deleted(self, job_id: str, owner: str | None) -> None:
        with self.table.change() as change:
            job = self.get(job_id, owner)
            cancel_requested = int(job.status == IN_PROGRESS)
            change.update("id = ?", (job_id,), is_deleted=1, idempotency_key=None, cancel_requested=cancel_requested)

    def _remove_unless_accepted(self, job_id: str) -> None:
        """Removes the folder of a job that was refused; it was accepted where only what came afterwards failed."""
        with suppress(StorageError):  # then `recover` removes it
            if not self.table.database.rows("SELECT 1 FROM jobs WHERE id = ?", (job_id,)):
                self.folders.remove(job_id)

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


def _fill_folder(folder: Path, fill: Callable[[Path], object]) -> None:
    """Calls `fill` with a folder.

    Raises:
        StorageError: the disk is full, or the folder cannot be written.
    """
    try:
        fill(folder)
    except (OSError, CheckpointError) as error:
        raise storage_error(folder, error) from error


def _of_owner(owner: str | None) -> tuple[str, tuple[Any, ...]]:
    """Returns a condition in SQL for the visible jobs of an owner, with its values."""
    return (_VISIBLE, ()) if owner is None else (f"{_VISIBLE} AND owner = ?", (owner,))


def _require(job: Job | None) -> Job:
    assert job is not None  # read in the same transaction
    return job
