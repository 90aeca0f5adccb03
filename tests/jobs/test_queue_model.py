"""A model of the queue: any order of submitting, claiming, crashing and restarting keeps what is promised of jobs.

`KADR_QUEUE_STEPS=10000 pytest tests/jobs/test_queue_model.py -s` takes so many steps instead of 1000.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from kadr.jobs.claims import MAX_SERVER_LOSSES, MAX_WORKER_LOSSES, Claim, JobClaims
from kadr.jobs.database import Database
from kadr.jobs.expiry import Retention, delete_expired
from kadr.jobs.job import (
    COMPLETED,
    FAILED,
    IN_PROGRESS,
    QUEUED,
    Job,
    JobConflictError,
    JobError,
    LostClaimError,
    QueueFullError,
    QueueLimits,
    StorageError,
    UnknownJobError,
    canonical_json,
)
from kadr.jobs.store import JobStore
from kadr.jobs.table import DATABASE_FILE, JobChange
from tests.jobs.jobs_by_hand import write_video

STEPS = int(os.environ.get("KADR_QUEUE_STEPS", "1000"))
STEPS_PER_RUN = 100
LIMITS = QueueLimits(max_queued=6, max_queued_per_owner=4, max_passes=2)
RETENTION = Retention(max_age=5000.0, max_bytes=2500)
OWNERS, ENGINES = ("ann", "bob", "cat"), ("small", "big")
ENGINE = st.sampled_from(ENGINES)
ALLOWED = {QUEUED: {QUEUED, IN_PROGRESS, FAILED}, IN_PROGRESS: {QUEUED, IN_PROGRESS, COMPLETED, FAILED}}
KEYS = st.sampled_from((None, None, "k"))
# Actions about as often as they happen; what is rare in a queue must not be rare here.
WEIGHTS = {
    "submit": 16,
    "submit_with_used_key": 2,
    "submit_without_room": 1,
    "cancel": 3,
    "delete": 2,
    "move": 3,
    "claim": 20,
    "complete": 6,
    "fail": 2,
    "lose_worker": 6,
    "use_old_fence": 4,
    "crash": 2,
    "lose_database": 1,
    "set_clock": 2,
    "expire": 2,
    "pause": 1,
    "resume": 6,
}
ACTIONS = tuple(action for action, weight in WEIGHTS.items() for _ in range(weight))


@dataclass
class Expected:
    """A job as the model knows it.

    Args:
        num_passed: how often a job that was submitted later was claimed before it.
        is_whole: its result is on disk: nobody may make it again.
        is_cancelled: it was cancelled while it was in progress.
        outcome: status and result of a finished job, for ever.
    """

    number: int
    owner: str
    key: tuple[str, str] | None
    num_passed: int = 0
    is_whole: bool = False
    is_cancelled: bool = False
    outcome: tuple[str, Any] | None = None
    worker_losses: int = 0
    server_losses: int = 0


class QueueModel(RuleBasedStateMachine):
    """Does what clients, workers and the system do to a queue, and looks after each step at all that is promised."""

    num_steps: ClassVar[int] = 0

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="kadr-queue-"))
        self.now, self.num_ids = 1e6, 0
        self.jobs: dict[str, Expected] = {}
        self.gone: set[str] = set()  # deleted and expired
        self.going: set[str] = set()  # deleted while in progress: the worker has not stopped yet
        self.live: list[Claim] = []
        self.stale: list[Claim] = []
        self.last_seq, self.statuses = 0, dict[str, str]()
        self.open()

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.folder)

    def open(self) -> None:
        """Opens the queue, as a server does that starts."""
        self.store = JobStore(self.folder, LIMITS, announce=self.take_change, clock=lambda: self.now)
        self.store.table.database._connection.execute("PRAGMA synchronous = OFF")  # nobody pulls the plug here
        self.claims = JobClaims(self.store)
        self.claims.recover()

    def take_change(self, change: JobChange) -> None:
        """Looks at each change that is announced: numbers rise, and a finished job never changes."""
        job = change.job
        assert job.seq > self.last_seq
        self.last_seq = job.seq
        if change.is_deleted:
            self.statuses.pop(job.id)
            return
        before = self.statuses.get(job.id, QUEUED)
        assert job.status in ALLOWED.get(before, ()), f"{job.id}: {before} -> {job.status}"
        self.statuses[job.id] = job.status

    def new_id(self) -> str:
        """Returns an id that is the same when hypothesis repeats a run."""
        self.num_ids += 1
        return f"video_{self.num_ids:032x}"

    def waiting(self) -> list[Job]:
        return self.store.waiting()

    def pick(self, data: st.DataObject, *statuses: str) -> str | None:
        """Draws the id of a job, of any status or of some, or None where there is none."""
        ids = [job_id for job_id, status in self.statuses.items() if not statuses or status in statuses]
        return data.draw(st.sampled_from(ids)) if ids else None

    def end_claim(self, claim: Claim) -> None:
        """Notes that a claim is over; a job that was deleted is then gone for good."""
        self.live.remove(claim)
        self.stale.append(claim)
        self.going.discard(claim.job.id)

    @rule(data=st.data(), action=st.sampled_from(ACTIONS))
    def act(self, data: st.DataObject, action: str) -> None:
        """Does one thing: one rule for all, because hypothesis leaves whole rules out of many runs."""
        getattr(self, action)(data)

    # What clients do.

    def submit(self, data: st.DataObject) -> None:
        owner, engine, key = (data.draw(strategy) for strategy in (st.sampled_from(OWNERS), ENGINE, KEYS))
        priority = data.draw(st.integers(-1, 2))
        request, engine_json = {"prompt": f"{len(self.jobs)}"}, {"model": engine}
        earlier = [job_id for job_id, job in self.jobs.items() if key is not None and job.key == (owner, key)]
        if earlier:
            first = self.store.get(earlier[0])
            request, engine_json = dict(first.request), dict(first.engine)
        waiting = self.waiting()
        is_full = len(waiting) >= 6 or sum(job.owner == owner for job in waiting) >= 4
        new_job = _new_job(request, engine_json, owner, priority)
        try:
            job = self.store.submit(new_job, idempotency_key=key, job_id=self.new_id())
        except QueueFullError:
            assert is_full
            assert not earlier
            return
        if earlier:
            assert job.id == earlier[0]
            return
        assert not is_full
        assert job.id not in self.jobs
        assert all(job.number > other.number for other in self.jobs.values())
        self.jobs[job.id] = Expected(job.number, owner, None if key is None else (owner, key))

    def submit_with_used_key(self, data: st.DataObject) -> None:
        keys = sorted({job.key for job in self.jobs.values() if job.key is not None})
        if keys:
            owner, key = data.draw(st.sampled_from(keys))
            with pytest.raises(JobConflictError):
                self.store.submit(_new_job({"prompt": "another"}, {}, owner, 0), idempotency_key=key)

    def submit_without_room(self, data: st.DataObject) -> None:
        def fill(folder: Path) -> None:
            raise OSError(28, "No space left on device")

        new_job = _new_job({"prompt": "x"}, {}, "ann", 0)
        with pytest.raises((StorageError, QueueFullError)):
            self.store.submit(new_job, fill=fill, job_id=self.new_id())

    def cancel(self, data: st.DataObject) -> None:
        if (job_id := self.pick(data)) is None:
            return
        others = {other: self.store.get(other) for other in self.statuses if other != job_id}
        try:
            job = self.store.cancel(job_id)
        except JobConflictError:
            assert self.jobs[job_id].outcome is not None
        else:
            self.jobs[job_id].is_cancelled = True
            assert job.cancel_requested or (job.error is not None and job.error.code == "cancelled")
        assert others == {other: self.store.get(other) for other in self.statuses if other != job_id}

    def delete(self, data: st.DataObject) -> None:
        if (job_id := self.pick(data)) is not None:
            self.forget(job_id)
            self.store.delete(job_id)

    def forget(self, job_id: str) -> None:
        del self.jobs[job_id]
        self.gone.add(job_id)
        if any(claim.job.id == job_id for claim in self.live):
            self.going.add(job_id)

    def move(self, data: st.DataObject) -> None:
        job_id = self.pick(data, QUEUED)
        other = None if data.draw(st.booleans()) else self.pick(data, QUEUED)
        if job_id is None:
            return
        try:
            self.store.move(job_id, before=other)
        except JobConflictError:
            assert other is not None
            assert self.store.get(job_id).priority != self.store.get(other).priority
            return
        order = [job.id for job in self.waiting() if job.priority == self.store.get(job_id).priority]
        place = order.index(job_id)
        assert order[place + 1] == other if other not in (None, job_id) else other == job_id or place == len(order) - 1

    # What workers do.

    def claim(self, data: st.DataObject) -> None:
        warm = data.draw(st.sampled_from(("", *ENGINES)))
        only = data.draw(st.sampled_from(("", "", "", *ENGINES)))
        waiting = [job for job in self.waiting() if not only or job.engine == {"model": only}]
        engines = [canonical_json({"model": only})] if only else None
        claim = self.claims.claim(warm_engines=[canonical_json({"model": warm})], engines=engines)
        if claim is None:
            assert self.store.is_paused or not waiting
            return
        assert not self.store.is_paused
        job = claim.job
        assert job.id in {other.id for other in waiting}
        assert not self.jobs[job.id].is_whole, "it is made twice"
        assert all(claim.fence > other.fence for other in (*self.live, *self.stale))
        for other in waiting:
            if other.number < job.number:
                self.jobs[other.id].num_passed += 1
        self.live.append(claim)

    def draw_claim(self, data: st.DataObject) -> Claim | None:
        return data.draw(st.sampled_from(self.live)) if self.live else None

    def write_result(self, claim: Claim) -> dict[str, Any]:
        """Writes the whole result of a claim, unless it is there."""
        if (result := self.store.folders.read_result(claim.job.id, claim.fence)) is None:
            result = write_video(self.store.folders, claim, "x" * 700)
            result_file = self.store.folders.attempt(claim.job.id, claim.fence) / "result.json"
            os.utime(result_file, (self.now, self.now))
        if claim.job.id in self.jobs:
            self.jobs[claim.job.id].is_whole = True
        return result

    def complete(self, data: st.DataObject) -> None:
        if (claim := self.draw_claim(data)) is None:
            return
        result = self.write_result(claim)
        if data.draw(st.booleans()):
            with _full_disk(self.store.table.database), pytest.raises(StorageError):
                self.claims.complete(claim, result)
            if data.draw(st.booleans()):
                return  # the worker's thread tries again later
        self.claims.complete(claim, result)
        self.end_claim(claim)

    def fail(self, data: st.DataObject) -> None:
        claim = self.draw_claim(data)
        if claim is not None and self.store.folders.read_result(claim.job.id, claim.fence) is None:
            self.store.folders.attempt(claim.job.id, claim.fence).mkdir(exist_ok=True)
            self.claims.fail(claim, JobError("failed", "it did not work"))
            self.end_claim(claim)

    def lose_worker(self, data: st.DataObject) -> None:
        if (claim := self.draw_claim(data)) is None:
            return
        if data.draw(st.booleans()):
            self.write_result(claim)
        else:
            self.store.folders.attempt(claim.job.id, claim.fence).mkdir(exist_ok=True)
        if data.draw(st.booleans()):
            self.claims.give_back(claim)
        else:
            if claim.job.id in self.jobs and not self.jobs[claim.job.id].is_whole:
                self.jobs[claim.job.id].worker_losses += 1
            self.claims.lose_worker(claim, "the worker ended")
        self.end_claim(claim)

    def use_old_fence(self, data: st.DataObject) -> None:
        if not self.stale:
            return
        again = [claim for claim in self.stale if self.statuses.get(claim.job.id) == IN_PROGRESS]
        claim = data.draw(st.sampled_from(again or self.stale))
        before = self.store.table.database.rows("SELECT * FROM jobs ORDER BY number")
        ends: list[Callable[[], object]] = [
            lambda: self.claims.complete(claim, {"fence": "old"}),
            lambda: self.claims.fail(claim, JobError("failed", "old")),
            lambda: self.claims.give_back(claim),
            lambda: self.claims.lose_worker(claim, "old"),
        ]
        with pytest.raises(LostClaimError):
            data.draw(st.sampled_from(ends))()
        after = self.store.table.database.rows("SELECT * FROM jobs ORDER BY number")
        assert list(map(tuple, before)) == list(map(tuple, after))

    # What the system and the operator do.

    def pause(self, data: st.DataObject) -> None:
        self.store.set_paused(True)

    def resume(self, data: st.DataObject) -> None:
        self.store.set_paused(False)

    def crash(self, data: st.DataObject) -> None:
        """The process ends; some workers had written their results, which may be published."""
        num_whole, is_published = data.draw(st.integers(0, 2)), data.draw(st.booleans())
        for claim in self.live[:num_whole]:
            self.write_result(claim)
            if is_published:
                self.store.folders.publish(claim.job.id, claim.fence)
        for claim in self.live[num_whole:]:
            self.store.folders.attempt(claim.job.id, claim.fence).mkdir(exist_ok=True)
            expected = self.jobs.get(claim.job.id)
            is_counted = expected is not None and not expected.is_whole
            if expected is not None and is_counted and not self.store.get(claim.job.id).cancel_requested:
                expected.server_losses += 1
        interrupted = self.new_id()  # a submission that was not accepted yet
        self.store.folders.create(interrupted, {"id": interrupted, "request": {}})
        is_paused = self.store.is_paused
        self.store.close()
        for claim in list(self.live):
            self.end_claim(claim)
        self.open()
        assert self.store.is_paused == is_paused
        assert all(status != IN_PROGRESS for status in self.statuses.values())

    def lose_database(self, data: st.DataObject) -> None:
        if self.going or len(self.jobs) < 4:  # that a job in progress was deleted is lost too
            return
        self.store.close()
        (self.folder / DATABASE_FILE).unlink()
        for claim in list(self.live):
            self.store.folders.attempt(claim.job.id, claim.fence).mkdir(exist_ok=True)
            self.end_claim(claim)
        before, self.statuses = self.statuses, {}
        self.last_seq, self.stale = 0, []  # numbers begin again: it is another history
        for job_id in before:
            self.jobs[job_id].num_passed = 0
            self.statuses[job_id] = IN_PROGRESS
        self.open()
        numbers = {job.id: job.number for job in self.store.jobs(limit=1000).jobs}
        for job_id, expected in self.jobs.items():
            expected.number = numbers[job_id]

    def set_clock(self, data: st.DataObject) -> None:
        self.now += data.draw(st.sampled_from((-3600.0, 1.0, 600.0, 3000.0)))

    def expire(self, data: st.DataObject) -> None:
        for job_id in delete_expired(self.store, RETENTION):
            assert self.jobs[job_id].outcome is not None
            self.forget(job_id)

    # What is promised.

    @invariant()
    def each_job_has_one_state(self) -> None:
        type(self).num_steps += 1
        found = {job.id: job for job in self.store.jobs(limit=1000).jobs}
        assert found.keys() == self.jobs.keys() == self.statuses.keys()
        for job_id, job in found.items():
            expected = self.jobs[job_id]
            assert (job.owner, job.number) == (expected.owner, expected.number)
            assert job.status == self.statuses[job_id]
            assert (job.error is not None) == (job.status == FAILED)
            assert (job.finished_at is not None) == job.is_finished
            assert job.created_at <= (job.started_at or job.created_at)
            assert not job.is_finished or (job.finished_at or 0.0) >= (job.started_at or job.created_at)
            assert not job.cancel_requested or job.status == IN_PROGRESS
            if expected.outcome is not None:
                assert (job.status, job.result) == expected.outcome
            elif job.is_finished:
                expected.outcome = (job.status, job.result)
            if expected.is_whole and job.is_finished:
                assert job.status == COMPLETED
            if not job.is_finished:
                assert expected.worker_losses < MAX_WORKER_LOSSES
                assert expected.server_losses < MAX_SERVER_LOSSES
            _check_reason(job, expected)

    @invariant()
    def deleted_jobs_stay_away(self) -> None:
        for job_id in sorted(self.gone)[:3]:
            with pytest.raises(UnknownJobError):
                self.store.get(job_id)

    @invariant()
    def files_and_jobs_belong_together(self) -> None:
        folders = self.store.folders
        assert set(folders.job_ids()) == self.jobs.keys() | self.going
        for job_id in self.jobs:
            job = self.store.get(job_id)
            result_file = folders.output(job_id) / "result.json"
            if job.status == COMPLETED:
                assert json.loads(result_file.read_text("utf-8")) == job.result
                assert (folders.output(job_id) / "video.mp4").stat().st_size == 700
            if job.status != IN_PROGRESS:
                assert folders.attempts(job_id) == []
                assert result_file.exists() == (job.status == COMPLETED)
            if job.is_finished:
                assert job.size_bytes == folders.size_bytes(job_id)

    @invariant()
    def no_job_has_two_workers(self) -> None:
        in_progress = {job_id for job_id, status in self.statuses.items() if status == IN_PROGRESS}
        ids = [claim.job.id for claim in self.live]
        assert len(ids) == len(set(ids))
        assert set(ids) == in_progress | self.going
        assert all(self.claims.current(claim).fence == claim.fence for claim in self.live)

    @invariant()
    def nobody_is_passed_too_often(self) -> None:
        for job in self.waiting():
            assert job.passed == self.jobs[job.id].num_passed <= LIMITS.max_passes


def _check_reason(job: Job, expected: Expected) -> None:
    """A job fails as cancelled if it was, and for lost workers or servers only after as many as it may cost."""
    if job.error is not None and expected.is_cancelled:
        assert job.error.code in ("cancelled", "database_lost")
    if job.error is not None and job.error.code == "worker_lost":
        assert expected.worker_losses == MAX_WORKER_LOSSES
    if job.error is not None and job.error.code == "server_lost":
        assert expected.server_losses == MAX_SERVER_LOSSES


def _new_job(request: dict[str, Any], engine: dict[str, Any], owner: str, priority: int) -> Any:
    from kadr.jobs.job import NewJob

    return NewJob(request=request, engine=engine, owner=owner, priority=priority)


@contextmanager
def _full_disk(database: Database) -> Iterator[None]:
    """Lets the next transaction fail when it is committed."""

    class Full:
        def __init__(self, connection: Any) -> None:
            self._real = connection

        def __getattr__(self, name: str) -> Any:
            return getattr(self._real, name)

        def execute(self, statement: str, *values: Any) -> Any:
            if statement == "COMMIT":
                raise OSError(28, "No space left on device")
            return self._real.execute(statement, *values)

    connection = database._connection
    database._connection = Full(connection)  # type: ignore[assignment]
    try:
        yield
    finally:
        database._connection = connection


def test_any_order_of_events_keeps_what_is_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    QueueModel.num_steps = 0
    quick = settings(
        max_examples=max(1, STEPS // STEPS_PER_RUN),
        stateful_step_count=STEPS_PER_RUN,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    while QueueModel.num_steps < STEPS:
        run_state_machine_as_test(QueueModel, settings=quick)
    print(f"{QueueModel.num_steps} steps")
