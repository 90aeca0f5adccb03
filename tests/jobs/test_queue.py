"""The queue as a server opens it: it recovers first, expires what is old, and lets go of its folder."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from kadr.errors import KadrWarning
from kadr.jobs import queue as queue_module
from kadr.jobs.claims import JobClaims
from kadr.jobs.expiry import Retention
from kadr.jobs.job import COMPLETED, QueueLimits, StorageError
from kadr.jobs.queue import JobQueue
from tests.jobs.conftest import Clock
from tests.jobs.fake_maker import FakeMaker
from tests.jobs.jobs_by_hand import new_job, wait_until, write_video


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue_module, "MAINTENANCE_SECONDS", 0.05)


def test_queue_without_workers_takes_jobs(tmp_path: Path) -> None:
    queue = JobQueue(tmp_path, [], limits=QueueLimits(max_queued=1))
    queue.start()
    job = queue.store.submit(new_job())
    assert [event.job_id for event in queue.events.since(0) or ()] == [job.id]
    queue.close()
    queue.close()


def test_queue_that_was_never_started_closes(tmp_path: Path) -> None:
    JobQueue(tmp_path, [partial(FakeMaker, tmp_path / "log")]).close()


def test_queue_that_cannot_recover_lets_go_of_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(claims: JobClaims) -> None:
        raise StorageError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(JobClaims, "recover", fail)
        with pytest.raises(StorageError):
            JobQueue(tmp_path, [])
    JobQueue(tmp_path, []).close()


def test_old_jobs_are_deleted_in_the_background(tmp_path: Path, clock: Clock) -> None:
    lines: list[str] = []
    queue = JobQueue(tmp_path, [], retention=Retention(max_age=60), clock=clock, log=lines.append)
    queue.store.submit(new_job())
    claim = queue.claims.claim()
    assert claim is not None
    queue.claims.complete(claim, write_video(queue.store.folders, claim))
    assert queue.store.get(claim.job.id).status == COMPLETED
    queue.start()
    clock.now += 61
    wait_until(lambda: not queue.store.jobs().jobs)
    wait_until(lambda: lines == [f"{claim.job.id} has expired and was deleted"])
    queue.close()


def test_error_of_the_background_is_logged_and_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines, calls = [], []

    def fail_once() -> None:
        calls.append(1)
        if len(calls) == 1:
            raise StorageError("the disk is full")

    queue = JobQueue(tmp_path, [], log=lines.append)
    queue.housekeeping.append(fail_once)
    queue.start()
    wait_until(lambda: len(calls) > 2)
    queue.close()
    assert lines == ["the disk is full"]


def _run_until(queue: JobQueue, is_true: Callable[[], bool]) -> None:
    queue.start()
    wait_until(is_true)
    queue.close()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows deletes no open file")
def test_deleted_database_is_written_again_soon(tmp_path: Path) -> None:
    queue = JobQueue(tmp_path, [])
    job = queue.store.submit(new_job())
    path = queue.store.table.database.path
    path.unlink()
    with pytest.warns(KadrWarning, match="somebody deleted"):
        _run_until(queue, path.exists)
    queue = JobQueue(tmp_path, [])
    assert queue.store.get(job.id).id == job.id
    queue.close()
