"""The queue as those who submit see it: jobs are accepted once and whole, or not at all; owners see their own."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kadr.errors import CheckpointError, RequestError
from kadr.jobs.claims import JobClaims
from kadr.jobs.database import Database
from kadr.jobs.folders import JobFolders
from kadr.jobs.job import (
    FAILED,
    IN_PROGRESS,
    QUEUED,
    Job,
    JobConflictError,
    JobError,
    QueueFullError,
    QueueLimits,
    StorageError,
    UnknownJobError,
    new_job_id,
)
from kadr.jobs.store import JobStore
from kadr.jobs.table import JobChange
from tests.jobs.conftest import Clock
from tests.jobs.jobs_by_hand import DEMO, new_job, write_video

OpenStore = Callable[..., JobStore]


def prompts(jobs: list[Job]) -> list[str]:
    return [job.request["prompt"] for job in jobs]


def folder_names(store: JobStore) -> set[str]:
    return set(store.folders.job_ids())


def test_submitted_job_is_as_it_was_said(store: JobStore, clock: Clock) -> None:
    job = store.submit(new_job("a", owner="ann", priority=3, labels={"model": "x"}))
    assert (job.status, job.owner, job.priority, job.labels) == (QUEUED, "ann", 3, {"model": "x"})
    assert (job.request, job.engine, job.created_at) == ({"prompt": "a"}, DEMO, clock.now)
    assert (job.attempt, job.passed, job.started_at, job.finished_at, job.error, job.result) == (0, 0) + (None,) * 4
    assert store.get(job.id) == job
    submitted = store.folders.read_submitted(job.id) or {}
    assert submitted["id"] == job.id
    assert submitted["request"] == job.request


def test_job_survives_closing(open_store: OpenStore) -> None:
    store = open_store()
    job = store.submit(new_job("кадр 🎬 \ud800"))  # JSON holds half a character too
    store.close()
    assert open_store().get(job.id) == job


def test_media_is_in_the_folder_before_the_job_is_accepted(store: JobStore, changes: list[JobChange]) -> None:
    def fill(folder: Path) -> None:
        assert changes == []
        (folder / "media.png").write_bytes(b"image")

    job = store.submit(new_job(), fill=fill)
    assert (store.folders.path(job.id) / "media.png").read_bytes() == b"image"


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), StorageError),
        (CheckpointError("media cannot be written"), StorageError),
        (RequestError("the image is damaged"), RequestError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_fill_that_raises_leaves_nothing(
    store: JobStore, changes: list[JobChange], error: BaseException, raised: type[BaseException]
) -> None:
    def fill(folder: Path) -> None:
        (folder / "media.png").write_bytes(b"image")
        raise error

    with pytest.raises(raised):
        store.submit(new_job(), fill=fill, idempotency_key="k")
    assert folder_names(store) == set()
    assert changes == []
    assert store.submit(new_job(), idempotency_key="k").status == QUEUED


def test_job_is_kept_where_only_its_announcement_fails(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(change: JobChange) -> None:
        raise RuntimeError("a bug of whoever listens")

    monkeypatch.setattr(store.table, "_announce", fail)
    with pytest.raises(RuntimeError):
        store.submit(new_job())
    (job,) = store.jobs().jobs
    assert folder_names(store) == {job.id}


def test_folder_of_a_job_that_was_not_recorded_is_removed(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(database: Database) -> None:
        raise StorageError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(Database, "restore_if_deleted", fail)
        with pytest.raises(StorageError):
            store.submit(new_job())
    assert folder_names(store) == set()
    assert store.jobs().jobs == []


def test_same_key_of_one_owner_is_the_same_job(store: JobStore) -> None:
    first = store.submit(new_job("a", owner="ann"), idempotency_key="k")
    assert store.submit(new_job("a", owner="ann"), idempotency_key="k") == first
    assert store.submit(new_job("a", owner="bob"), idempotency_key="k").id != first.id
    with pytest.raises(JobConflictError, match="the idempotency key 'k' was used for another request"):
        store.submit(new_job("b", owner="ann"), idempotency_key="k")
    assert len(folder_names(store)) == 2


def test_same_key_while_the_first_is_submitted_is_the_same_job(store: JobStore) -> None:
    jobs = []
    job = store.submit(
        new_job(), idempotency_key="k", fill=lambda _: jobs.append(store.submit(new_job(), idempotency_key="k"))
    )
    assert jobs == [job]
    assert folder_names(store) == {job.id}


def test_key_of_a_deleted_job_is_free(store: JobStore, claims: JobClaims) -> None:
    first = store.submit(new_job(), idempotency_key="k")
    assert claims.claim() is not None
    store.delete(first.id)  # its worker has not stopped yet
    second = store.submit(new_job("other"), idempotency_key="k")
    assert second.id != first.id


@pytest.mark.parametrize("key", ["half \udc80"])
def test_key_that_cannot_be_stored_is_refused(store: JobStore, key: str) -> None:
    with pytest.raises(RequestError, match="the idempotency key is"):
        store.submit(new_job(), idempotency_key=key)


def test_id_that_is_taken_is_refused_and_its_job_untouched(store: JobStore) -> None:
    job_id = new_job_id()
    job = store.submit(new_job("a"), job_id=job_id, fill=lambda folder: (folder / "a.png").touch())
    with pytest.raises(JobConflictError, match="is taken"):
        store.submit(new_job("b"), job_id=job_id)
    assert store.get(job_id) == job
    assert (store.folders.path(job_id) / "a.png").exists()
    assert (store.folders.read_submitted(job_id) or {})["request"] == {"prompt": "a"}


def test_queue_takes_so_many_jobs(open_store: OpenStore) -> None:
    store = open_store(QueueLimits(max_queued=2))
    store.submit(new_job("a"))
    store.submit(new_job("b"))
    with pytest.raises(QueueFullError, match="2 jobs wait, as many as the queue takes") as caught:
        store.submit(new_job("c"))
    assert caught.value.retry_after >= 1
    assert len(folder_names(store)) == 2
    JobClaims(store).claim()
    assert store.submit(new_job("c")).status == QUEUED


def test_owner_has_a_share(open_store: OpenStore) -> None:
    store = open_store(QueueLimits(max_queued_per_owner=1))
    store.submit(new_job(owner="ann"))
    with pytest.raises(QueueFullError, match="1 of your jobs wait, as many as you may have"):
        store.submit(new_job("b", owner="ann"))
    assert store.submit(new_job(owner="bob")).status == QUEUED
    assert store.submit(new_job("b", owner="ann"), max_queued=2).status == QUEUED


def test_retry_time_follows_the_time_of_a_job(open_store: OpenStore) -> None:
    store = open_store(QueueLimits(max_queued=1))
    store.submit(new_job())
    for seconds, expected in ((None, 10.0), (40.0, 40.0), (40.0, 40.0), (15.0, 35.0), (0.0, 28.0)):
        if seconds is not None:
            store.observe(seconds)
        with pytest.raises(QueueFullError) as caught:
            store.submit(new_job())
        assert caught.value.retry_after == pytest.approx(expected)


def test_bound_holds_for_threads(open_store: OpenStore) -> None:
    store, refused = open_store(QueueLimits(max_queued=5)), []

    def submit(index: int) -> None:
        try:
            store.submit(new_job(f"{index}"))
        except QueueFullError:
            refused.append(index)

    threads = [threading.Thread(target=submit, args=(index,)) for index in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.counts()[QUEUED] == len(folder_names(store)) == 5
    assert len(refused) == 7


def test_other_owners_jobs_are_unknown(store: JobStore) -> None:
    job = store.submit(new_job(owner="ann"))
    store.submit(new_job("b", owner="bob"))
    calls: list[Callable[..., Any]] = [store.get, store.cancel, store.delete]
    for call in calls:
        with pytest.raises(UnknownJobError, match="there is no job"):
            call(job.id, "bob")
    with pytest.raises(UnknownJobError):
        store.move(job.id, owner="bob")
    assert store.get(job.id, "ann") == store.get(job.id)
    assert [found.id for found in store.jobs("ann").jobs] == [job.id]
    assert store.counts("ann")[QUEUED] == 1
    assert store.counts()[QUEUED] == 2


@pytest.mark.parametrize("job_id", ["", "video_1", "' OR 1=1 --", "half \ud800", "a\0b", "x" * 10_000])
def test_text_that_is_no_id_is_unknown(store: JobStore, job_id: str) -> None:
    for call in (store.get, store.cancel, store.delete, store.move):
        with pytest.raises(UnknownJobError) as caught:
            call(job_id)
        assert len(str(caught.value)) < 300
    with pytest.raises(RequestError, match="after is"):
        store.jobs(after=job_id)


def test_pages_follow_each_other_in_both_directions(store: JobStore) -> None:
    for name in "abcde":
        store.submit(new_job(name))
    for newest_first, expected in ((True, "edcba"), (False, "abcde")):
        after, seen = None, []
        while True:
            page = store.jobs(after=after, limit=2, newest_first=newest_first)
            seen += prompts(list(page.jobs))
            if not page.has_more:
                break
            after = page.jobs[-1].id
        assert seen == list(expected)


@pytest.mark.parametrize("limit", [0, 1001, 1.5])
def test_page_of_a_wrong_length_is_refused(store: JobStore, limit: Any) -> None:
    with pytest.raises(RequestError, match="limit is"):
        store.jobs(limit=limit)


def test_jobs_are_found_by_status(store: JobStore, claims: JobClaims) -> None:
    for name in "abc":
        store.submit(new_job(name))
    claims.claim()
    store.cancel(store.waiting()[0].id)
    assert prompts(list(store.jobs(statuses=(IN_PROGRESS,)).jobs)) == ["a"]
    assert prompts(list(store.jobs(statuses=(QUEUED, FAILED)).jobs)) == ["c", "b"]
    assert store.counts() == {"queued": 1, "in_progress": 1, "completed": 0, "failed": 1}


def test_words_are_found_beside_half_a_character(store: JobStore) -> None:
    store.submit(new_job("кадр \ud800 Лиса"))
    store.submit(new_job("a fox"))
    assert prompts(store.jobs(words=("ЛИСА", "кадр")).jobs) == ["кадр \ud800 Лиса"]


def test_cancelled_job_that_waits_has_failed_at_once(store: JobStore, claims: JobClaims) -> None:
    job = store.submit(new_job())
    cancelled = store.cancel(job.id)
    assert cancelled.error == JobError("cancelled", "it was cancelled")
    assert cancelled.finished_at is not None
    assert cancelled.size_bytes == store.folders.size_bytes(job.id) > 0
    assert claims.claim() is None
    with pytest.raises(JobConflictError, match="is failed; only a job that is not finished can be cancelled"):
        store.cancel(job.id)


def test_cancelling_a_job_touches_no_other(store: JobStore, claims: JobClaims) -> None:
    first, second = store.submit(new_job("a")), store.submit(new_job("b"))
    assert claims.claim() is not None
    store.cancel(second.id)
    assert not store.get(first.id).cancel_requested
    assert store.cancel(first.id).cancel_requested
    assert store.get(first.id).status == IN_PROGRESS


def test_deleted_job_is_gone_with_its_files(store: JobStore, changes: list[JobChange]) -> None:
    job = store.submit(new_job())
    store.delete(job.id)
    with pytest.raises(UnknownJobError):
        store.get(job.id)
    with pytest.raises(UnknownJobError):
        store.delete(job.id)
    assert folder_names(store) == set()
    assert store.table.database.rows("SELECT * FROM jobs") == []
    assert [change.is_deleted for change in changes] == [False, True]
    assert changes[1].job.seq > changes[0].job.seq


def test_deleting_a_job_in_progress_announces_it_once(
    store: JobStore, claims: JobClaims, changes: list[JobChange]
) -> None:
    job = store.submit(new_job())
    claim = claims.claim()
    assert claim is not None
    store.delete(job.id)
    assert changes[-1].is_deleted
    assert changes[-1].job.cancel_requested
    assert folder_names(store) == {job.id}  # its worker still writes there
    count = len(changes)
    claims.complete(claim, write_video(store.folders, claim))
    assert len(changes) == count
    assert folder_names(store) == set()
    assert store.table.database.rows("SELECT * FROM jobs") == []


def test_files_that_cannot_be_removed_go_later(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    job = store.submit(new_job())
    with monkeypatch.context() as patch:
        patch.setattr(JobFolders, "remove", lambda folders, job_id: False)  # Windows, while a client reads them
        store.delete(job.id)
    assert folder_names(store) == {job.id}
    with pytest.raises(UnknownJobError):
        store.get(job.id)
    store.remove_deleted()
    assert folder_names(store) == set()


def test_full_disk_does_not_keep_anyone_from_deleting(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    finished, waiting = store.cancel(store.submit(new_job("a")).id), store.submit(new_job("b"))
    begin = Database.restore_if_deleted

    def refuse_while_full(database: Database) -> None:
        if store.folders.path(finished.id).exists():
            raise StorageError("the disk is full")
        begin(database)

    monkeypatch.setattr(Database, "restore_if_deleted", refuse_while_full)
    with pytest.raises(StorageError):
        store.delete(waiting.id)
    assert folder_names(store) == {finished.id, waiting.id}
    store.delete(finished.id)
    assert folder_names(store) == {waiting.id}


def test_moved_job_is_where_it_was_put(store: JobStore) -> None:
    a, b, c, d = (store.submit(new_job(name)) for name in "abcd")
    store.move(d.id, before=b.id)
    assert prompts(store.waiting()) == list("adbc")
    store.move(a.id)
    assert prompts(store.waiting()) == list("dbca")
    store.move(c.id, before=d.id)
    assert prompts(store.waiting()) == list("cdba")
    store.move(c.id, before=c.id)
    assert prompts(store.waiting()) == list("cdba")
    assert store.positions() == {c.id: 1, d.id: 2, b.id: 3, a.id: 4}


def test_moving_works_where_no_number_is_left_between(store: JobStore, claims: JobClaims) -> None:
    for name in "xabc":
        store.submit(new_job(name))
    claim = claims.claim()  # x, which goes back to where it was
    assert claim is not None
    for _ in range(60):  # more than a float has bits
        _, second, third = store.waiting()
        store.move(third.id, before=second.id)
    assert prompts(store.waiting()) == list("abc")
    claims.give_back(claim)
    assert prompts(store.waiting()) == list("xabc")


def test_job_moves_only_among_those_that_wait_with_its_priority(store: JobStore) -> None:
    a, b, c = store.submit(new_job("a")), store.submit(new_job("b", priority=1)), store.submit(new_job("c"))
    store.cancel(c.id)
    with pytest.raises(JobConflictError, match="a job moves only among those of its own priority"):
        store.move(a.id, before=b.id)
    with pytest.raises(JobConflictError, match="is failed; only a job that waits can be moved"):
        store.move(c.id)
    with pytest.raises(JobConflictError):
        store.move(a.id, before=c.id)


def test_pause_survives_closing(open_store: OpenStore) -> None:
    store = open_store()
    store.submit(new_job())
    store.set_paused(True)
    store.close()
    store = open_store()
    assert store.is_paused
    assert JobClaims(store).claim() is None
    store.set_paused(False)
    store.set_paused(False)
    store.close()
    store = open_store()
    assert JobClaims(store).claim() is not None


def test_pause_that_cannot_be_stored_is_refused(store: JobStore) -> None:
    store._paused_file.mkdir()  # stands for a folder that cannot be written
    with pytest.raises(StorageError, match="paused cannot be written"):
        store.set_paused(False)
    assert not store.is_paused


def test_seq_rises_over_all_changes_and_restarts(open_store: OpenStore, changes: list[JobChange]) -> None:
    store = open_store()
    a, b = store.submit(new_job("a")), store.submit(new_job("b"))
    store.move(a.id)
    store.cancel(b.id)
    store.delete(b.id)
    progress = store.table.next_seq()
    store.close()
    store = open_store()
    store.cancel(a.id)
    seqs = [change.job.seq for change in changes]
    assert seqs == sorted(set(seqs))
    assert seqs[-2] < progress < seqs[-1]


def test_threads_wait_for_changes(store: JobStore) -> None:
    with store.table.changed:
        thread = threading.Thread(target=store.submit, args=(new_job(),))
        thread.start()
        assert store.table.changed.wait(5.0)
    thread.join()
    assert store.counts()[QUEUED] == 1
