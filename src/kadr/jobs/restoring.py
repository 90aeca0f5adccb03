"""Makes jobs of folders without a row: those that a lost database leaves, or one that was put back from a backup."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from kadr.jobs.job import COMPLETED, DATABASE_LOST, FAILED, MAX_PRIORITY, JobError, is_utf8
from kadr.jobs.store import JobStore
from kadr.jobs.table import Change
from kadr.validation import is_number, is_whole_number

_LOST = JobError(DATABASE_LOST, "the queue's database was lost before this was made. Submit it again.")


def restore_jobs(store: JobStore) -> None:
    """Gives each folder without a row one, or removes it. It is not a deleted job's; see `JobStore.remove_deleted`.

    A folder with a result is a completed job. One without is a job that was not made: where the database was lost, it
    becomes one that failed, which nobody makes twice without being asked to; otherwise it was never accepted, and is
    removed.

    Raises:
        StorageError: the queue cannot be read or written.
    """
    table, folders = store.table, store.folders
    known = {job_id for (job_id,) in table.database.rows("SELECT id FROM jobs")}
    found = [(job_id, folders.read_submitted(job_id)) for job_id in folders.job_ids() if job_id not in known]
    rows = [row for job_id, submitted in found if (row := _restored_row(store, job_id, submitted)) is not None]
    with table.change() as change:
        for position, row in enumerate(sorted(rows, key=lambda row: (row["created_at"], row["id"]))):
            change.insert(**_with_own_key(change, row), position=position)
        if table.database.is_new:
            table.database.mark_complete(change.connection)
    for job_id in {job_id for job_id, _ in found} - {row["id"] for row in rows}:
        folders.remove(job_id)


def _restored_row(store: JobStore, job_id: str, submitted: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Returns the columns of a job for a folder; None where there is nothing to make one of."""
    folders = store.folders
    for fence in (-1, *folders.attempts(job_id)):  # -1 is no attempt's: the result that was published
        if (result := folders.read_result(job_id, fence)) is not None and folders.publish(job_id, fence):
            break
    else:
        if submitted is None or not store.table.database.is_new:
            return None
        result = None
    folders.remove_attempts(job_id)
    finished_at = folders.finished_at(job_id) if result is not None else None
    columns = {name: default for name, (default, _) in _SUBMITTED.items()}
    for name, value in (submitted or {}).items():
        if name in _SUBMITTED and _SUBMITTED[name][1](value):
            columns[name] = value
    columns["created_at"] = columns["created_at"] or finished_at or 0.0
    return {
        **columns,
        "id": job_id,
        "finished_at": max(finished_at or 0.0, columns["created_at"]),  # the clock may have been set back
        "size_bytes": folders.size_bytes(job_id),
        "is_favorite": int(folders.is_favorite(job_id)),
        **({"status": FAILED, "error": _LOST} if result is None else {"status": COMPLETED, "result": result}),
    }


def _with_own_key(change: Change, row: dict[str, Any]) -> dict[str, Any]:
    """Returns a row without its idempotency key where another job has it: it was about to be refused."""
    query = "SELECT 1 FROM jobs WHERE owner = ? AND idempotency_key = ?"
    is_taken = change.rows(query, (row["owner"], row["idempotency_key"]))
    return {**row, "idempotency_key": None} if is_taken else row


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and is_utf8(value)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _is_priority(value: Any) -> bool:
    return is_whole_number(value) and abs(value) <= MAX_PRIORITY


# Column -> its value where `job.json` has none that can be used, and a function that tells whether it can.
_SUBMITTED: Mapping[str, tuple[Any, Callable[[Any], bool]]] = {
    "owner": ("", _is_text),
    "priority": (0, _is_priority),
    "created_at": (None, is_number),
    "engine": ({}, _is_object),
    "request": ({}, _is_object),
    "labels": ({}, _is_object),
    "idempotency_key": (None, _is_text),
    "idempotency_digest": (None, _is_text),
}
