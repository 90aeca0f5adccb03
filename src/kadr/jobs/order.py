"""The order of jobs: by priority and position, in turns among owners, warm models first while nobody waits too long.

Nobody is passed over more often than a bound: a job is passed when one that was submitted later is claimed before it.
Jobs that were passed that often go first, in the order of their submission, and then every older job has been passed
less often, so that each may still be passed once more.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from kadr.jobs.job import Job
from kadr.jobs.table import Change

_UNFINISHED = "status IN ('queued', 'in_progress')"  # a job in progress may go back to where it was


@dataclass(frozen=True)
class Waiting:
    """A job that waits, with what the order depends on; see `Job`. engine: as canonical JSON."""

    number: int
    owner: str
    priority: int
    position: float
    passed: int
    engine: str


def next_job(
    waiting: Sequence[Waiting],
    *,
    max_passes: int,
    warm_engines: Collection[str] = (),
    running: Mapping[str, int] | None = None,
    last_served: Mapping[str, int] | None = None,
) -> Waiting | None:
    """Returns the job to claim, or None where none waits.

    Args:
        max_passes: see `QueueLimits`.
        warm_engines: models that the worker has in memory.
        running: owner -> number of its jobs in progress.
        last_served: owner -> fence of its last claim; an owner that was served longer ago goes first.
    """
    if not waiting:
        return None
    overdue = [job for job in waiting if job.passed >= max_passes]
    if overdue:
        return min(overdue, key=lambda job: job.number)
    highest = max(job.priority for job in waiting)
    candidates = [job for job in waiting if job.priority == highest]
    warm = [job for job in candidates if job.engine in warm_engines]
    running, last_served = running or {}, last_served or {}
    return min(
        warm or candidates,
        key=lambda job: (running.get(job.owner, 0), last_served.get(job.owner, 0), job.position, job.number),
    )


def last_position(change: Change) -> float:
    """Returns the highest position of a job that is not finished; 0 where there is none."""
    ((position,),) = change.rows(f"SELECT COALESCE(MAX(position), 0) FROM jobs WHERE {_UNFINISHED}")
    return float(position)


def position_before(change: Change, other: Job, job_id: str) -> float:
    """Returns a position for a job between another one and the one before that; renumbers where no number is left."""
    for position in (other.position, None):
        if position is None:
            _renumber(change)
            ((position,),) = change.rows("SELECT position FROM jobs WHERE id = ?", (other.id,))
        query = f"SELECT MAX(position) FROM jobs WHERE {_UNFINISHED} AND position < ? AND id <> ?"
        ((previous,),) = change.rows(query, (position, job_id))
        lower = position - 2 if previous is None else previous
        middle = float((lower + position) / 2)
        if lower < middle < position:
            return middle
    raise AssertionError("no position between whole numbers")


def _renumber(change: Change) -> None:
    """Gives the jobs that are not finished the positions 1, 2, 3 ... in their order."""
    change.rows(
        "UPDATE jobs SET position = ranked.place FROM (SELECT id, ROW_NUMBER() OVER (ORDER BY position, number) "
        f"AS place FROM jobs WHERE {_UNFINISHED}) AS ranked WHERE jobs.id = ranked.id"
    )
