"""`Job`: one video in the queue, from the moment it is accepted until it is deleted."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kadr.errors import KadrError, RequestError
from kadr.quoting import MAX_LINE, one_line, quote
from kadr.validation import check_range

QUEUED, IN_PROGRESS, COMPLETED, FAILED = "queued", "in_progress", "completed", "failed"
STATUSES = (QUEUED, IN_PROGRESS, COMPLETED, FAILED)
MAX_PRIORITY = 100  # and as far below 0
ID_PREFIX = "video_"
_ID_BYTES = 16

# Codes of a `JobError`.
CANCELLED = "cancelled"
WORKER_LOST = "worker_lost"
SERVER_LOST = "server_lost"
DATABASE_LOST = "database_lost"
STORAGE = "storage"
DISK_FULL = "disk_full"


class UnknownJobError(KadrError):
    """The queue has no such job, or it belongs to another owner."""


class JobConflictError(KadrError):
    """The job is not in a status that allows what was asked."""


class QueueFullError(KadrError):
    """The queue, or the owner's share of it, has no room.

    Args:
        retry_after: seconds after which it may have.
    """

    def __init__(self, message: str, *, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class LostClaimError(KadrError):
    """The job was taken from this worker: it is another's now, or it is finished."""


class StorageError(KadrError):
    """The queue's folder or database cannot be read or written: the disk is full, or it is read-only."""


@dataclass(frozen=True)
class JobError:
    """The reason why a job failed. code: a word for programs; message: a line for people."""

    code: str
    message: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "message", one_line(self.message, MAX_LINE))


CANCELLED_ERROR = JobError(CANCELLED, "it was cancelled")


@dataclass(frozen=True, kw_only=True)
class NewJob:
    """A job to submit.

    Args:
        request: a request as `Request.to_json` writes it. Paths of its media are relative to the job's folder.
        engine: what opens its model, for the worker: jobs with equal ones share a warm model.
        owner: whose share of the queue it counts in; who sees it.
        priority: -100 to 100; a higher one goes first, within the bound on passing.
        labels: stored with the job and given back, for whoever submits it.
    """

    request: Mapping[str, Any]
    engine: Mapping[str, Any]
    owner: str = ""
    priority: int = 0
    labels: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_range("priority", self.priority, -MAX_PRIORITY, MAX_PRIORITY, is_whole=True)
        if not isinstance(self.owner, str) or not is_utf8(self.owner):
            raise RequestError(f"the owner of a job is {quote(self.owner)}; it must be text.")


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job as it is stored. Times are seconds since 1970, for people to read: nothing is decided by them but expiry.

    Args:
        id: "video_" and 32 hexadecimal digits.
        number: order of submission, rising.
        status: one of `STATUSES`; a cancelled job is one that failed, with the code "cancelled".
        position: order in the queue within a priority, rising.
        passed: how many jobs submitted later were claimed before it.
        attempt: how often a worker has claimed it.
        fence: number of the claim, rising; whoever has an older one may not write.
        seq: number of the last change, rising over all jobs.
        cancel_requested: it was cancelled while it was in progress, and its worker has not stopped yet.
        error: of a failed job.
        result: of a completed one, as the worker reported it.
        size_bytes: of its files.
        is_favorite: it is kept until somebody deletes it.
    """

    id: str
    number: int
    owner: str
    status: str
    priority: int
    position: float
    passed: int
    engine: Mapping[str, Any]
    request: Mapping[str, Any]
    labels: Mapping[str, Any]
    created_at: float
    started_at: float | None
    finished_at: float | None
    attempt: int
    fence: int
    seq: int
    cancel_requested: bool
    error: JobError | None
    result: Mapping[str, Any] | None
    size_bytes: int
    is_favorite: bool

    @property
    def is_finished(self) -> bool:
        """True for a job that is completed or failed: its status no longer changes."""
        return self.status in (COMPLETED, FAILED)


@dataclass(frozen=True)
class QueueLimits:
    """Bounds of the queue.

    Args:
        max_queued: jobs that wait, of all owners.
        max_queued_per_owner: jobs of one owner that wait; None: as many as the queue has room for.
        max_passes: jobs submitted later that may be claimed before one that waits.
    """

    max_queued: int = 1000
    max_queued_per_owner: int | None = None
    max_passes: int = 8

    def __post_init__(self) -> None:
        check_range("the bound on the queue", self.max_queued, 1, 10**6, is_whole=True)
        if self.max_queued_per_owner is not None:
            check_range("the bound on one owner's jobs", self.max_queued_per_owner, 1, 10**6, is_whole=True)
        check_range("the bound on passing", self.max_passes, 0, 10**6, is_whole=True)


def new_id(prefix: str) -> str:
    """Returns an id that nobody can guess: the prefix and 32 hexadecimal digits."""
    return prefix + secrets.token_hex(_ID_BYTES)


def is_id(text: str, prefix: str) -> bool:
    """Tells whether a text has the form of such an id, and so is safe as the name of a folder."""
    digits = text.removeprefix(prefix)
    return text.startswith(prefix) and len(digits) == 2 * _ID_BYTES and not set(digits) - set("0123456789abcdef")


def new_job_id() -> str:
    """Returns the id of a new job."""
    return new_id(ID_PREFIX)


def is_job_id(text: str) -> bool:
    """Tells whether a text has the form of a job's id; see `is_id`."""
    return is_id(text, ID_PREFIX)


def is_utf8(text: str) -> bool:
    """Tells whether a text can be stored: it has no half of a character in it."""
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def canonical_json(data: Mapping[str, Any]) -> str:
    """Returns data as JSON that is equal for equal data."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"))
