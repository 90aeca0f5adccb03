"""The queue as workers use it: a job is made once, by one worker at a time, whatever becomes of workers and servers."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from kadr.jobs.claims import MAX_SERVER_LOSSES, MAX_WORKER_LOSSES, Claim, JobClaims
from kadr.jobs.database import Database
from kadr.jobs.folders import JobFolders
from kadr.jobs.job import (
    COMPLETED,
    FAILED,
    IN_PROGRESS,
    QUEUED,
    Job,
    JobError,
    LostClaimError,
    QueueLimits,
    StorageError,
    UnknownJobError,
    canonical_json,
)
from kadr.jobs.store import JobStore
from kadr.jobs.table import JobChange
from tests.jobs.conftest import Clock
from tests.jobs.jobs_by_hand import DEMO, new_job, write_video

OpenStore = Callable[..., JobStore]
ERROR = JobError("failed", "it did not work")


def claim_next(claims: JobClaims, **arguments: object) -> Claim:
    claim = claims.claim(**arguments)  # type: ignore[arg-type]
    assert claim is not None
    return claim


def reopen(store: JobStore, open_store: OpenStore) -> JobStore:
    """Opens a queue again, as after the death of its process."""
    store.close()
    store = open_store()
    JobClaims(store).recover()
    return store


def every_end(claims: JobClaims, claim: Claim) -> list[Callable[[], object]]:
    """Returns everything that a worker can say at the end of a claim."""
    return [
        lambda: claims.complete(claim, {}),
        lambda: claims.fail(claim, ERROR),
        lambda: claims.give_back(claim),
        lambda: claims.lose_worker(claim, "the worker ended"),
        lambda: claims.current(claim),
    ]


def test_claimed_job_is_in_progress(store: JobStore, claims: JobClaims, clock: Clock) -> None:
    job = store.submit(new_job())
    clock.now += 5
    claim = claim_next(claims)
    assert claim.job == store.get(job.id)
    assert (claim.job.status, claim.job.attempt, claim.job.started_at) == (IN_PROGRESS, 1, clock.now)
    assert claims.claim() is None


def test_completed_job_has_its_result_and_files(store: JobStore, claims: JobClaims, clock: Clock) -> None:
    job = store.submit(new_job())
    claim = claim_next(claims)
    store.folders.attempt(job.id, 0).mkdir()  # of an earlier worker
    clock.now += 30
    result = write_video(store.folders, claim)
    claims.complete(claim, result)
    job = store.get(job.id)
    assert (job.status, job.result, job.finished_at, job.error) == (COMPLETED, result, clock.now, None)
    assert job.size_bytes == store.folders.size_bytes(job.id) > 0
    assert (store.folders.output(job.id) / "video.mp4").read_text("utf-8") == "video"
    assert store.folders.attempts(job.id) == []


def test_failed_job_has_its_error_and_no_half_made_files(store: JobStore, claims: JobClaims) -> None:
    job = store.submit(new_job())
    claim = claim_next(claims)
    store.folders.attempt(job.id, claim.fence).mkdir()
    claims.fail(claim, ERROR)
    job = store.get(job.id)
    assert (job.status, job.error, job.result) == (FAILED, ERROR, None)
    assert job.size_bytes > 0
    assert store.folders.attempts(job.id) == []


def test_finished_job_never_changes(store: JobStore, claims: JobClaims) -> None:
    store.submit(new_job())
    claim = claim_next(claims)
    claims.complete(claim, write_video(store.folders, claim))
    job = store.get(claim.job.id)
    for end in every_end(claims, claim):
        with pytest.raises(LostClaimError, match="is no longer this worker's; what it made is not used"):
            end()
    assert store.get(job.id) == job


def test_older_fence_cannot_write_over_its_successor(store: JobStore, claims: JobClaims) -> None:
    store.submit(new_job())
    old = claim_next(claims)
    claims.lose_worker(old, "the worker ended")
    for end in every_end(claims, old):  # while nobody has it
        with pytest.raises(LostClaimError):
            end()
    new = claim_next(claims)
    write_video(store.folders, old, "late")
    for end in every_end(claims, old):
        with pytest.raises(LostClaimError):
            end()
    claims.complete(new, write_video(store.folders, new, "new"))
    assert (store.folders.output(new.job.id) / "video.mp4").read_text("utf-8") == "new"
    assert store.folders.attempts(new.job.id) == []


def test_fences_rise_though_jobs_are_deleted(store: JobStore, claims: JobClaims) -> None:
    fences = []
    for _ in range(3):
        job = store.submit(new_job())
        claim = claim_next(claims)
        fences.append(claim.fence)
        claims.complete(claim, write_video(store.folders, claim))
        store.delete(job.id)
    assert fences == [1, 2, 3]


def test_job_that_was_given_back_is_where_it_was(store: JobStore, claims: JobClaims) -> None:
    first = store.submit(new_job("a"))
    store.submit(new_job("b"))
    claim = claim_next(claims)
    store.folders.attempt(first.id, claim.fence).mkdir()
    claims.give_back(claim)
    job = store.get(first.id)
    assert (job.status, job.attempt, job.position, job.started_at) == (QUEUED, 0, first.position, None)
    assert store.folders.attempts(first.id) == []
    assert claim_next(claims).job.id == first.id


def test_job_that_kills_every_worker_fails(store: JobStore, claims: JobClaims) -> None:
    job = store.submit(new_job())
    for loss in range(MAX_WORKER_LOSSES):
        claim = claim_next(claims)
        store.folders.attempt(job.id, claim.fence).mkdir()
        claims.lose_worker(claim, "the worker was killed by signal 9")
        assert store.folders.attempts(job.id) == [], loss
    job = store.get(job.id)
    assert job.attempt == MAX_WORKER_LOSSES
    assert job.error is not None
    assert job.error.code == "worker_lost"
    assert job.error.message.startswith("the worker was killed by signal 9, 2 times.")


def test_giving_back_does_not_count_as_a_loss(store: JobStore, claims: JobClaims) -> None:
    store.submit(new_job())
    for _ in range(5):
        claims.give_back(claim_next(claims))
    claims.lose_worker(claim_next(claims), "the worker ended")
    assert claim_next(claims).job.attempt == 2


@pytest.mark.parametrize("method", ["lose_worker", "give_back"])
def test_whole_result_of_a_dead_worker_is_used(store: JobStore, claims: JobClaims, method: str) -> None:
    store.submit(new_job())
    claim = claim_next(claims)
    result = write_video(store.folders, claim)
    if method == "lose_worker":
        claims.lose_worker(claim, "the worker ended")
    else:
        claims.give_back(claim)
    assert store.get(claim.job.id).result == result
    assert claims.claim() is None


@pytest.mark.parametrize("end", range(1, 4), ids=["fail", "give_back", "lose_worker"])
def test_cancelled_job_ends_as_cancelled_whatever_its_worker_says(store: JobStore, claims: JobClaims, end: int) -> None:
    job = store.submit(new_job())
    claim = claim_next(claims)
    store.cancel(job.id)
    every_end(claims, claim)[end]()
    job = store.get(job.id)
    assert job.error == JobError("cancelled", "it was cancelled")
    assert not job.cancel_requested


def test_cancelling_that_came_too_late_is_forgotten(store: JobStore, claims: JobClaims) -> None:
    store.submit(new_job())
    claim = claim_next(claims)
    store.cancel(claim.job.id)
    claims.complete(claim, write_video(store.folders, claim))
    job = store.get(claim.job.id)
    assert (job.status, job.cancel_requested) == (COMPLETED, False)


@pytest.mark.parametrize("end", range(4), ids=["complete", "fail", "give_back", "lose_worker"])
def test_deleted_job_is_gone_when_its_worker_stops(
    store: JobStore, claims: JobClaims, changes: list[JobChange], end: int
) -> None:
    store.submit(new_job())
    claim = claim_next(claims)
    store.delete(claim.job.id)
    count = len(changes)
    assert claims.current(claim).cancel_requested
    if end == 0:
        write_video(store.folders, claim)
    every_end(claims, claim)[end]()
    assert store.table.database.rows("SELECT * FROM jobs") == []
    assert list(store.folders.job_ids()) == []
    assert len(changes) == count


def test_job_whose_files_somebody_removed_fails(store: JobStore, claims: JobClaims) -> None:
    store.submit(new_job())
    claim = claim_next(claims)
    result = write_video(store.folders, claim)
    store.folders.remove(claim.job.id)
    claims.complete(claim, result)
    error = store.get(claim.job.id).error
    assert error is not None
    assert error.code == "storage"


def test_result_that_could_not_be_recorded_may_be_tried_again(
    store: JobStore, claims: JobClaims, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.submit(new_job())
    claim = claim_next(claims)
    result = write_video(store.folders, claim)
    with full_disk(monkeypatch), pytest.raises(StorageError):
        claims.complete(claim, result)
    assert store.get(claim.job.id).status == IN_PROGRESS
    claims.complete(claim, result)
    assert store.get(claim.job.id).result == result


@contextmanager
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lets every transaction fail at its end, as a full disk does."""

    @contextmanager
    def transaction(database: Database) -> Iterator[sqlite3.Connection]:
        with database._lock:
            database._connection.execute("BEGIN IMMEDIATE")
            yield database._connection
            database._connection.execute("ROLLBACK")
            raise StorageError("database or disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(Database, "transaction", transaction)
        yield


def test_failed_claim_leaves_the_job_in_the_queue(
    store: JobStore, claims: JobClaims, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.submit(new_job())
    with full_disk(monkeypatch), pytest.raises(StorageError):
        claims.claim()
    assert store.counts()[QUEUED] == 1
    assert claim_next(claims).job.attempt == 1


def test_warm_engine_is_preferred(store: JobStore, claims: JobClaims) -> None:
    store.submit(new_job("a"))
    store.submit(new_job("b", engine={"model": "other"}))
    claim = claim_next(claims, warm_engines=[canonical_json({"model": "other"})])
    assert claim.job.request == {"prompt": "b"}


def test_worker_gets_only_jobs_that_it_can_make(store: JobStore, claims: JobClaims) -> None:
    store.submit(new_job("a"))
    assert claims.claim(engines=[]) is None
    assert claims.claim(engines=['{"model":"other"}']) is None
    assert claim_next(claims, engines=[canonical_json(DEMO)]).job.request == {"prompt": "a"}


def test_jobs_of_other_engines_are_not_passed(open_store: OpenStore) -> None:
    store = open_store(QueueLimits(max_passes=2))
    claims = JobClaims(store)
    big = store.submit(new_job("big", engine={"model": "big"}))
    first = store.submit(new_job("first", priority=-1))
    small = [canonical_json(DEMO)]
    for _ in range(4):
        store.submit(new_job())
    passed = [claim_next(claims, engines=small).job.id for _ in range(3)]
    assert passed[2] == first.id  # after two that came later
    assert store.get(big.id).passed == 0
    assert store.get(first.id).passed == 2
    for _ in range(2):
        claim_next(claims, engines=small)
    assert claim_next(claims).job.id == big.id


def test_owners_take_turns_though_one_deletes_its_jobs(store: JobStore, claims: JobClaims) -> None:
    served = []
    for name in ("ann", "bob"):
        for index in range(4):
            store.submit(new_job(f"{index}", owner=name))
    for _ in range(6):
        claim = claim_next(claims)
        served.append(claim.job.owner)
        claims.fail(claim, ERROR)
        if claim.job.owner == "ann":
            store.delete(claim.job.id)
    assert served == ["ann", "bob"] * 3


def test_turns_are_remembered_over_restarts(store: JobStore, claims: JobClaims, open_store: OpenStore) -> None:
    for name in ("ann", "bob", "ann"):
        store.submit(new_job(owner=name))
    claims.fail(claim_next(claims), ERROR)
    assert claim_next(JobClaims(reopen(store, open_store))).job.owner == "bob"


def test_average_time_is_of_jobs_that_were_watched(
    store: JobStore, claims: JobClaims, open_store: OpenStore, clock: Clock
) -> None:
    store.submit(new_job())
    claim = claim_next(claims)
    write_video(store.folders, claim)
    clock.now += 10**6  # the server was away for days
    store = reopen(store, open_store)
    assert store.get(claim.job.id).status == COMPLETED
    assert store.seconds_per_job is None
    claims = JobClaims(store)
    store.submit(new_job())
    claim = claim_next(claims)
    clock.now -= 3600  # and the clock was set back
    claims.complete(claim, write_video(store.folders, claim))
    assert store.seconds_per_job is not None
    assert 0 <= store.seconds_per_job < 60
    job = store.get(claim.job.id)
    assert job.finished_at == job.started_at


def test_server_that_died_puts_jobs_back(store: JobStore, claims: JobClaims, open_store: OpenStore) -> None:
    waiting, running = store.submit(new_job("a", priority=-1)), store.submit(new_job("b"))
    claim = claim_next(claims)
    store.folders.attempt(running.id, claim.fence).mkdir()
    store = reopen(store, open_store)
    assert [job.id for job in store.waiting()] == [running.id, waiting.id]
    assert store.folders.attempts(running.id) == []


@pytest.mark.parametrize("is_published", [False, True])
def test_result_without_a_commit_is_used_after_a_crash(
    store: JobStore, claims: JobClaims, open_store: OpenStore, is_published: bool
) -> None:
    store.submit(new_job())
    claim = claim_next(claims)
    result = write_video(store.folders, claim)
    if is_published:
        store.folders.publish(claim.job.id, claim.fence)
    store = reopen(store, open_store)
    job = store.get(claim.job.id)
    assert (job.status, job.result, job.attempt) == (COMPLETED, result, 1)
    assert (store.folders.output(job.id) / "video.mp4").exists()


def test_job_in_progress_at_the_death_of_many_servers_fails(store: JobStore, open_store: OpenStore) -> None:
    job = store.submit(new_job())
    for _ in range(MAX_SERVER_LOSSES):
        assert store.get(job.id).status == QUEUED
        claim_next(JobClaims(store))
        store = reopen(store, open_store)
    error = store.get(job.id).error
    assert error is not None
    assert error.code == "server_lost"


@pytest.mark.parametrize("is_whole", [False, True])
def test_cancelled_or_deleted_job_is_settled_after_a_crash(
    store: JobStore, claims: JobClaims, open_store: OpenStore, is_whole: bool
) -> None:
    cancelled, deleted = store.submit(new_job("a")), store.submit(new_job("b"))
    for claim in (claim_next(claims), claim_next(claims)):
        if is_whole:
            write_video(store.folders, claim)
    store.cancel(cancelled.id)
    store.delete(deleted.id)
    store = reopen(store, open_store)
    job: Job = store.get(cancelled.id)
    assert job.status == (COMPLETED if is_whole else FAILED)
    assert job.error == (None if is_whole else JobError("cancelled", "it was cancelled"))
    with pytest.raises(UnknownJobError):
        store.get(deleted.id)
    assert list(store.folders.job_ids()) == [cancelled.id]


def test_deletion_that_a_crash_interrupted_is_finished(
    store: JobStore, open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = claim_next(JobClaims(store)) if store.submit(new_job()) else None
    assert claim is not None
    JobClaims(store).complete(claim, write_video(store.folders, claim))
    with monkeypatch.context() as patch:
        patch.setattr(JobFolders, "remove", lambda folders, job_id: False)
        store.delete(claim.job.id)
    store = reopen(store, open_store)
    assert list(store.folders.job_ids()) == []
    assert store.table.database.rows("SELECT * FROM jobs") == []


def test_claims_of_two_workers_are_two_jobs(store: JobStore, claims: JobClaims) -> None:
    for name in "abc":
        store.submit(new_job(name))
    jobs = [claim_next(claims).job.id for _ in range(3)]
    assert len(set(jobs)) == 3
    assert claims.claim() is None
