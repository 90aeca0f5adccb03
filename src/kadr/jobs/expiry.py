"""Deletes finished jobs: those that are old, and the oldest where they take more of the disk than they may."""

from __future__ import annotations

from dataclasses import dataclass

from kadr.jobs.job import Job, UnknownJobError
from kadr.jobs.store import JobStore
from kadr.validation import check_range

SECONDS_PER_DAY = 24 * 3600


@dataclass(frozen=True)
class Retention:
    """Bounds on the finished jobs that are kept. Favourites are kept whatever the bounds, and do not count.

    Args:
        max_age: seconds since they finished; None: for ever.
        max_bytes: of the files of all of them; None: as much as there is.
    """

    max_age: float | None = None
    max_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.max_age is not None:
            check_range("the age at which videos expire", self.max_age, 1, 100 * 365 * SECONDS_PER_DAY)
        if self.max_bytes is not None:
            check_range("the disk budget of videos", self.max_bytes, 1, 2**60, is_whole=True)

    def expires_at(self, job: Job) -> float | None:
        """Returns when a job expires by its age; None where it does not."""
        if job.finished_at is None or self.max_age is None or job.is_favorite:
            return None
        return job.finished_at + self.max_age


def delete_expired(store: JobStore, retention: Retention) -> list[str]:
    """Deletes the jobs that are not kept any longer, and returns their ids; those that finished first go first.

    A clock that was set back only delays that.

    Raises:
        StorageError: the queue cannot be written.
    """
    expired = []
    if retention.max_age is not None:
        oldest = store.clock() - retention.max_age
        query = "SELECT id FROM jobs WHERE finished_at < ? AND is_deleted = 0 AND is_favorite = 0"
        expired += store.table.database.rows(query, (oldest,))
    if retention.max_bytes is not None:
        expired += store.table.database.rows(
            "SELECT id FROM (SELECT id, SUM(size_bytes) OVER (ORDER BY seq DESC) AS total FROM jobs "
            "WHERE status IN ('completed', 'failed') AND is_deleted = 0 AND is_favorite = 0) WHERE total > ?",
            (retention.max_bytes,),
        )
    ids = list(dict.fromkeys(row[0] for row in expired))
    for job_id in ids:
        try:
            store.delete(job_id)
        except UnknownJobError:  # somebody deleted it meanwhile
            continue
    return ids
