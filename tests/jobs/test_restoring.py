"""Folders without a row: finished videos are found again, nothing is made twice, and what was refused is removed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kadr.errors import KadrWarning
from kadr.jobs.claims import Claim, JobClaims
from kadr.jobs.database import Database
from kadr.jobs.job import COMPLETED, FAILED, Job, new_job_id
from kadr.jobs.store import JobStore
from kadr.jobs.table import DATABASE_FILE
from tests.jobs.conftest import Clock
from tests.jobs.jobs_by_hand import new_job, write_video

OpenStore = Callable[..., JobStore]


def make_job(store: JobStore, prompt: str = "a", **arguments: Any) -> Job:
    """Submits a job and completes it."""
    claims = JobClaims(store)
    store.submit(new_job(prompt, owner="ann", priority=2, labels={"name": prompt}), **arguments)
    claim = claims.claim()
    assert claim is not None
    claims.complete(claim, write_video(store.folders, claim, prompt))
    return store.get(claim.job.id)


def reopen(store: JobStore, open_store: OpenStore, change_files: Callable[[Path], object]) -> JobStore:
    """Opens a queue again, after something happened to its files."""
    store.close()
    change_files(store.table.folder / DATABASE_FILE)
    store = open_store()
    JobClaims(store).recover()
    return store


def claim_one(store: JobStore, prompt: str) -> Claim:
    store.submit(new_job(prompt, priority=100))
    claim = JobClaims(store).claim()
    assert claim is not None
    return claim


def test_deleted_database_is_made_again_from_the_folders(store: JobStore, open_store: OpenStore, clock: Clock) -> None:
    made = make_job(store, idempotency_key="k")
    clock.now += 10
    waiting = store.submit(new_job("b"))
    running, whole = claim_one(store, "c"), claim_one(store, "d")
    write_video(store.folders, whole)
    store = reopen(store, open_store, Path.unlink)
    for column in ("owner", "priority", "labels", "engine", "request", "created_at", "result", "size_bytes"):
        assert getattr(store.get(made.id), column) == getattr(made, column), column
    statuses = {job.id: job.status for job in store.jobs().jobs}
    assert statuses == {made.id: COMPLETED, waiting.id: FAILED, running.job.id: FAILED, whole.job.id: COMPLETED}
    error = store.get(waiting.id).error
    assert error is not None
    assert error.code == "database_lost"
    assert JobClaims(store).claim() is None
    assert store.folders.attempts(running.job.id) == []
    key_of_ann = store.submit(new_job("a", owner="ann", labels={"name": "a"}), idempotency_key="k")
    assert key_of_ann.id == made.id


def test_favourites_survive_a_lost_database(store: JobStore, open_store: OpenStore) -> None:
    favourite, former, other = (make_job(store, prompt).id for prompt in "abc")
    for job_id in (favourite, former):
        store.set_favorite(job_id, True)
    store.set_favorite(former, False)
    store = reopen(store, open_store, Path.unlink)
    found = [store.get(job_id).is_favorite for job_id in (favourite, former, other)]
    assert found == [True, False, False]


def test_damaged_database_is_made_again_from_the_folders(store: JobStore, open_store: OpenStore) -> None:
    made = make_job(store)
    with pytest.warns(KadrWarning, match="is damaged"):
        store = reopen(store, open_store, lambda path: path.write_bytes(b"\xff" * path.stat().st_size))
    assert store.get(made.id).result == made.result


def test_emptied_database_is_made_again_from_the_folders(store: JobStore, open_store: OpenStore) -> None:
    made = make_job(store)
    store = reopen(store, open_store, lambda path: path.write_bytes(b""))
    assert store.get(made.id).result == made.result


def test_crash_while_jobs_are_restored_loses_nothing(
    store: JobStore, open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, waiting = make_job(store), store.submit(new_job("b"))
    store.close()
    (store.table.folder / DATABASE_FILE).unlink()
    store = open_store()
    with monkeypatch.context() as patch:
        patch.setattr(Database, "mark_complete", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            JobClaims(store).recover()
    for _ in range(2):
        store = reopen(store, open_store, lambda path: None)
        assert {job.id for job in store.jobs().jobs} == {made.id, waiting.id}


def test_older_database_that_was_put_back_loses_and_repeats_nothing(store: JobStore, open_store: OpenStore) -> None:
    waiting = store.submit(new_job("a"))
    store.close()
    backup = store.table.folder / "backup"
    shutil.copy(store.table.folder / DATABASE_FILE, backup)
    store = open_store()
    claims = JobClaims(store)
    claim = claims.claim()
    assert claim is not None
    claims.complete(claim, write_video(store.folders, claim))
    later, never_made = make_job(store, "later"), store.submit(new_job("never made"))
    store = reopen(store, open_store, lambda path: shutil.copy(backup, path))
    assert {job.id: job.status for job in store.jobs().jobs} == {waiting.id: COMPLETED, later.id: COMPLETED}
    assert set(store.folders.job_ids()) == {waiting.id, later.id}
    assert never_made.id not in set(store.folders.job_ids())


def test_folder_of_a_submission_that_a_crash_interrupted_is_removed(store: JobStore, open_store: OpenStore) -> None:
    job_id = new_job_id()
    store.folders.create(job_id, {"id": job_id})
    store = reopen(store, open_store, lambda path: None)
    assert store.jobs().jobs == []
    assert list(store.folders.job_ids()) == []


@pytest.mark.parametrize(
    "submitted",
    [
        "{",
        "[]",
        "{}",
        json.dumps({"owner": 3, "priority": 1e9, "created_at": "today", "engine": [], "request": None, "labels": 1}),
        json.dumps({"owner": "\ud800", "created_at": True, "idempotency_key": 3, "status": "queued", "number": -1}),
    ],
)
def test_damaged_description_of_a_finished_job_loses_no_video(
    store: JobStore, open_store: OpenStore, submitted: str
) -> None:
    made = make_job(store)
    (store.folders.path(made.id) / "job.json").write_text(submitted, "utf-8")
    store = reopen(store, open_store, Path.unlink)
    job = store.get(made.id)
    assert (job.status, job.result, job.owner, job.priority) == (COMPLETED, made.result, "", 0)
    assert (job.engine, job.request, job.labels) == ({}, {}, {})
    assert job.created_at == job.finished_at == store.folders.finished_at(made.id)


def test_folder_with_nothing_that_can_be_read_is_removed(store: JobStore, open_store: OpenStore) -> None:
    job = store.submit(new_job())
    (store.folders.path(job.id) / "job.json").write_text("{", "utf-8")
    store = reopen(store, open_store, Path.unlink)
    assert store.jobs().jobs == []
    assert list(store.folders.job_ids()) == []


def test_second_folder_with_a_key_loses_it(store: JobStore, open_store: OpenStore) -> None:
    first = store.submit(new_job(), idempotency_key="k")
    refused = new_job_id()  # a crash interrupted the second submission with its key
    submitted = store.folders.read_submitted(first.id) or {}
    store.folders.create(refused, {**submitted, "id": refused, "created_at": submitted["created_at"] + 1})
    store = reopen(store, open_store, Path.unlink)
    assert len(store.jobs().jobs) == 2
    assert store.submit(new_job(), idempotency_key="k").id == first.id


def test_folder_that_the_system_does_not_let_be_read_is_not_removed(store: JobStore, open_store: OpenStore) -> None:
    made = make_job(store)
    result = store.folders.output(made.id) / "result.json"
    result.unlink()
    result.mkdir()  # stands for a file without permission, which root may read

    with pytest.raises(Exception, match="cannot be read"):
        reopen(store, open_store, Path.unlink)
    assert (store.folders.output(made.id) / "video.mp4").exists()


def test_restored_jobs_are_in_the_order_of_their_submission(
    store: JobStore, open_store: OpenStore, clock: Clock
) -> None:
    made = []
    for name in "abc":
        made.append(make_job(store, name).id)
        clock.now += 1
    store = reopen(store, open_store, Path.unlink)
    assert [job.id for job in store.jobs(newest_first=False).jobs] == made
