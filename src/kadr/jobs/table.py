"""`JobTable`: the rows of the queue's database as jobs, changed in transactions whose outcome is announced."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Condition, RLock
from typing import Any

from filelock import FileLock, Timeout

from kadr.jobs.database import Database
from kadr.jobs.job import Job, JobError, StorageError, UnknownJobError, canonical_json, is_job_id
from kadr.quoting import quote

DATABASE_FILE, QUEUE_LOCK_FILE, PAUSED_FILE = "jobs.sqlite", "server.lock", "paused"
SEQ_GAP = 1 << 20  # past the numbers that progress took since the last stored one, before the process ended
_JSON_COLUMNS = ("engine", "request", "labels", "error", "result")


@dataclass(frozen=True)
class JobChange:
    """A change of a job that is on disk.

    Args:
        job: as it is now.
        is_deleted: it is no more.
        is_outcome: the job finished with this change; later ones of a finished job are none.
    """

    job: Job
    is_deleted: bool = False
    is_outcome: bool = False


Announce = Callable[[JobChange], object]


class JobTable:
    """The table of a queue's jobs, which this process alone has open. Threads may share it.

    Args:
        folder: of the queue; made where it is missing.
        announce: called with each change, in the order of `seq`, once it is on disk.

    Raises:
        StorageError: another process has the queue open, a newer kadr wrote it, or it cannot be read or written.

    Attributes:
        changed: notified after each change.
    """

    def __init__(self, folder: Path, announce: Announce = lambda change: None) -> None:
        self.folder, self._announce = folder, announce
        self._lock_file = _lock_folder(folder)
        try:
            self.database = Database(folder / DATABASE_FILE, job_from_row)
            query = "SELECT COALESCE(MAX(seq), 0), COALESCE(MAX(fence), 0) FROM counters"
            ((last_seq, self._fence),) = self.database.rows(query)
        except BaseException:
            self._lock_file.release()
            raise
        self._seq = last_seq + SEQ_GAP
        self.lock = RLock()
        self.changed = Condition(self.lock)

    def next_seq(self) -> int:
        """Returns the number of the next event, higher than every one before. Publish it before `lock` is released."""
        with self.lock:
            self._seq += 1
            return self._seq

    def next_fence(self) -> int:
        """Returns the number of the next claim, higher than every one before, also of jobs that were deleted."""
        with self.lock:
            self._fence += 1
            return self._fence

    @contextmanager
    def change(self) -> Iterator[Change]:
        """Runs the block as one transaction, and announces what it changed when that is on disk.

        Raises:
            StorageError: nothing was changed.
        """
        with self.lock:
            with self.database.transaction() as connection:
                change = Change(connection, self)
                yield change
                if change.announced:  # jobs may be deleted, and then numbers must rise all the same
                    change.rows("UPDATE counters SET seq = ?, fence = ?", (self._seq, self._fence))
            for announced in change.announced:
                self._announce(announced)
            self.changed.notify_all()

    def rows(self, condition: str, values: Any = ()) -> list[Job]:
        """Returns the jobs that meet a condition in SQL, which may end in ORDER BY and LIMIT."""
        return [job_from_row(row) for row in self.database.rows(f"SELECT * FROM jobs WHERE {condition}", values)]

    def close(self) -> None:
        """Closes the database and lets other processes open it."""
        self.database.close()
        self._lock_file.release()


class Change:
    """One transaction. `insert` and `update` are announced when it is on disk; of a deleted job, only that it is."""

    def __init__(self, connection: sqlite3.Connection, table: JobTable) -> None:
        self.connection, self._table = connection, table
        self.announced: list[JobChange] = []

    def rows(self, query: str, values: Any = ()) -> list[sqlite3.Row]:
        """Returns the rows of a query."""
        return self.connection.execute(query, values).fetchall()

    def insert(self, **columns: Any) -> Job:
        """Inserts a job and returns it."""
        columns = _to_row({**columns, "seq": self._table.next_seq()})
        names, marks = ", ".join(columns), ", ".join("?" * len(columns))
        query = f"INSERT INTO jobs ({names}) VALUES ({marks}) RETURNING *"
        job = job_from_row(self.rows(query, tuple(columns.values()))[0])
        self.announced.append(JobChange(job, is_outcome=job.is_finished))
        return job

    def update(self, condition: str, values: tuple[Any, ...], /, **columns: Any) -> Job | None:
        """Changes the one job that meets a condition in SQL; returns it as it is then, or None where none does."""
        columns = _to_row({**columns, "seq": self._table.next_seq()})
        assignments = ", ".join(f"{name} = ?" for name in columns)
        query = f"UPDATE jobs SET {assignments} WHERE {condition} RETURNING *"
        rows = self.rows(query, (*columns.values(), *values))
        if not rows:
            return None
        (row,) = rows
        job, is_deleted = job_from_row(row), bool(row["is_deleted"])
        if not is_deleted or "is_deleted" in columns:
            is_outcome = job.is_finished and "status" in columns
            self.announced.append(JobChange(job, is_deleted=is_deleted, is_outcome=is_outcome))
        return job


def find_job(jobs: list[Job], job_id: str) -> Job:
    """Returns the only job of a list.

    Raises:
        UnknownJobError: the list is empty.
    """
    if not jobs:
        raise UnknownJobError(f"there is no job {quote(job_id)}. It was deleted, or its id is mistyped.")
    return jobs[0]


def job_from_row(row: sqlite3.Row) -> Job:
    """Returns the job of a row.

    Raises:
        ValueError, TypeError, LookupError: the row is damaged.
    """
    if not is_job_id(row["id"]):
        raise ValueError(f"{quote(row['id'])} is not the id of a job")
    columns = {name: row[name] for name in Job.__dataclass_fields__}
    for name in _JSON_COLUMNS:
        columns[name] = None if columns[name] is None else json.loads(columns[name])
    columns["error"] = columns["error"] and JobError(**columns["error"])
    for name in ("cancel_requested", "is_favorite"):
        columns[name] = bool(columns[name])
    return Job(**columns)


def _to_row(columns: dict[str, Any]) -> dict[str, Any]:
    row = dict(columns)
    if isinstance(row.get("error"), JobError):
        row["error"] = asdict(row["error"])
    for name in _JSON_COLUMNS:
        if row.get(name) is not None and not isinstance(row[name], str):
            row[name] = canonical_json(row[name])
    return row


def _lock_folder(folder: Path) -> FileLock:
    """Takes the lock of the queue's folder, which the system releases when the process ends."""
    lock = FileLock(folder / QUEUE_LOCK_FILE, thread_local=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise StorageError(
            f"another process serves the queue in {folder}. Stop it, or choose another folder."
        ) from error
    except OSError as error:
        raise StorageError(
            f"the folder {folder} cannot be written: {error.strerror or error}. Make it writable, or choose another."
        ) from error
    return lock
