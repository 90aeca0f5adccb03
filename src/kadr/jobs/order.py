"""Decides which job is next: by priority, in turns among owners, with warm models used while nobody waits too long.

Nobody is passed over more often than a bound: a job is passed when one that was submitted later is claimed before it.
Jobs that were passed that often go first, in the order of their submission, and then every older job has been passed
less often, so that each may still be passed once more.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass


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
